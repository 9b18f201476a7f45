//! What a store has to hold, by what its commands acknowledged.

use std::collections::{BTreeMap, BTreeSet};

/// What a model holds: a checkpoint under rules, an attention block, or both, by their places in the inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Content {
    pub variant: Option<usize>,
    pub block: Option<usize>,
}

/// The models of one version.
pub type State = BTreeMap<String, Content>;

#[derive(Debug, Clone)]
pub struct Version {
    pub state: State,
    /// A gc was run that may have removed it.
    pub may_be_gone: bool,
}

/// All versions and snapshots.
#[derive(Debug, Default, Clone)]
pub struct History {
    pub versions: BTreeMap<u64, Version>,
    pub snapshots: BTreeMap<String, u64>,
}

impl History {
    /// The latest version; 0 of a store that has none.
    pub fn latest(&self) -> u64 {
        self.versions.last_key_value().map_or(0, |(version, _)| *version)
    }

    /// The models of the latest version.
    pub fn state(&self) -> State {
        self.versions.last_key_value().map_or(State::new(), |(_, version)| version.state.clone())
    }

    /// Adds a version that is the latest now.
    pub fn commit(&mut self, version: u64, state: State) {
        self.versions.insert(version, Version { state, may_be_gone: false });
    }

    /// The latest version and those of snapshots, which no gc removes.
    pub fn kept(&self) -> BTreeSet<u64> {
        self.snapshots.values().copied().chain([self.latest()]).collect()
    }

    /// A gc of whatever age may begin.
    pub fn collecting(&mut self) {
        let kept = self.kept();
        self.versions.iter_mut().filter(|(version, _)| !kept.contains(version)).for_each(|(_, v)| v.may_be_gone = true);
    }
}

/// Which versions are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// The latest one, without exports.
    Latest,
    /// The latest one, and those of snapshots; some of them, where there are many.
    Kept,
    /// All that are there; some of them, where there are many.
    All,
}
