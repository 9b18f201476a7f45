//! What a loss of power must not leave.

use crate::child::{Trouble, TroubleKind};

/// A kind of finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wrong {
    /// What was acknowledged is not there, is another, or cannot be read.
    Lost,
    /// `verify` finds something.
    Verify,
    /// An import or a gc fails, or `verify` finds something after them.
    CannotGoOn,
    Panicked,
    Hung,
}

impl Wrong {
    pub const ALL: [Wrong; 5] = [Wrong::Lost, Wrong::Verify, Wrong::CannotGoOn, Wrong::Panicked, Wrong::Hung];

    pub fn name(self) -> &'static str {
        match self {
            Wrong::Lost => "lost",
            Wrong::Verify => "verify",
            Wrong::CannotGoOn => "cannot go on",
            Wrong::Panicked => "panicked",
            Wrong::Hung => "hung",
        }
    }
}

/// Something that a loss must not leave.
#[derive(Debug)]
pub struct Finding {
    pub wrong: Wrong,
    pub what: String,
}

impl Finding {
    /// What a round of another kind would count as this.
    pub fn from_trouble(kind: TroubleKind, what: String) -> Finding {
        let wrong = match kind {
            TroubleKind::Panicked => Wrong::Panicked,
            TroubleKind::Hung => Wrong::Hung,
            TroubleKind::Lost | TroubleKind::Campaign => Wrong::Lost,
        };
        Finding { wrong, what }
    }
}

/// A finding, or what ends the campaign.
pub enum Stop {
    Found(Finding),
    Trouble(Trouble),
}

impl Stop {
    pub fn found(wrong: Wrong, what: impl Into<String>) -> Stop {
        Stop::Found(Finding { wrong, what: what.into() })
    }
}

impl From<Trouble> for Stop {
    fn from(trouble: Trouble) -> Stop {
        match trouble.kind {
            TroubleKind::Campaign => Stop::Trouble(trouble),
            kind => Stop::Found(Finding::from_trouble(kind, trouble.what)),
        }
    }
}
