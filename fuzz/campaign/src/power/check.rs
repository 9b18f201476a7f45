//! Whether a store that a loss of power left is what its commands acknowledged.

use std::path::Path;

use super::finding::{Finding, Stop, Wrong};
use super::record::{Part, Recording, STORE};
use super::shown::{On, Shown};
use crate::child::{Program, Trouble};
use crate::inputs::{Inputs, args};
use crate::step::Step;

/// What a loss left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// What was acknowledged.
    Old,
    /// That, and what the command that was running does, or a part of it where it is a gc.
    New,
}

/// What trees of a recording are checked with.
pub struct Check<'a> {
    pub program: &'a Program,
    pub inputs: &'a Inputs,
    pub commands: &'a [Step],
    pub recording: &'a Recording,
}

impl Check<'_> {
    /// Checks the tree in `folder`, left by a loss after so many operations. Where it has to be used further, an import and a gc
    /// have to succeed as well, and all versions are read before.
    pub fn check(&self, at: usize, folder: &Path, goes_on: bool) -> Result<Result<Left, Finding>, Trouble> {
        match self.judge(at, folder, goes_on) {
            Ok(left) => Ok(Ok(left)),
            Err(Stop::Found(Finding { wrong, what })) => {
                // The folder goes; the tree is kept at another place.
                let what = what.replace(&format!("{}/", folder.display()), "");
                Ok(Err(Finding { wrong, what }))
            }
            Err(Stop::Trouble(trouble)) => Err(trouble),
        }
    }

    fn judge(&self, at: usize, folder: &Path, goes_on: bool) -> Result<Left, Stop> {
        let store = folder.join(STORE);
        let on = On { program: self.program, folder, store: &store };
        let shown = match on.shown() {
            Ok(shown) => shown,
            // Before the first command ended there need not be a store, but one can be made.
            Err(Stop::Found(Finding { wrong: Wrong::Lost, .. })) if self.recording.done(at).0 == 0 => {
                return self.go_on(on).map(|()| Left::Old);
            }
            Err(stop) => return Err(stop),
        };
        let left = self.left(&shown, at)?;
        on.verify(Wrong::Verify)?;
        if goes_on {
            self.read_versions(on, &shown)?;
            self.go_on(on)?;
        }
        Ok(left)
    }

    /// Which of the states that are allowed a store shows.
    fn left(&self, shown: &Shown, at: usize) -> Result<Left, Stop> {
        let ((acknowledged, begun), parts) = (self.recording.done(at), &self.recording.parts);
        let before = acknowledged.checked_sub(1).and_then(|last| parts[last].shown.as_ref());
        let is_old = match before {
            Some(before) => shown == before,
            // A store that was made, and holds nothing yet.
            None => shown.log.len() <= 1 && shown.snapshots.is_empty() && shown.models.is_empty(),
        };
        if is_old {
            return Ok(Left::Old);
        }
        let running = || parts.iter().take(begun).skip(acknowledged);
        let is_new = |part: &Part| {
            let collects = self.commands[part.step] == Step::Collect;
            let between = |after| before.is_some_and(|before| collects && shown.is_between(before, after));
            part.shown.as_ref().is_some_and(|after| shown == after || between(after))
        };
        if running().any(is_new) {
            return Ok(Left::New);
        }
        let allowed = before.into_iter().chain(running().filter_map(|part| part.shown.as_ref()));
        let mut allowed: Vec<String> = allowed.map(Shown::told).collect();
        allowed.dedup();
        Err(Stop::found(Wrong::Lost, format!("{}, expected {}", shown.told(), allowed.join(", or "))))
    }

    /// Reads all versions that are there.
    fn read_versions(&self, on: On, shown: &Shown) -> Result<(), Stop> {
        for version in shown.log.keys() {
            // The command that made it left its models as those of the latest version.
            let is_latest = |shown: &&Shown| shown.log.last_key_value().is_some_and(|(latest, _)| latest == version);
            let made = self.recording.parts.iter().filter_map(|part| part.shown.as_ref()).find(is_latest);
            let models = on.models(&args!["--at", version])?;
            if made.map_or(!models.is_empty(), |made| made.models != models) {
                return Err(Stop::found(
                    Wrong::Lost,
                    format!("version {version} has other layers than before: {models:?}"),
                ));
            }
        }
        Ok(())
    }

    /// Imports, and collects what is left over.
    fn go_on(&self, on: On) -> Result<(), Stop> {
        let wrong = Wrong::CannotGoOn;
        let Some(Step::Import { variant, .. }) = self.commands.first() else { return Ok(()) };
        let import = Step::Import { model: "later".to_owned(), variant: *variant };
        on.json(wrong, &import.args(self.inputs))?;
        on.json(wrong, &Step::Collect.args(self.inputs))?;
        on.verify(wrong)
    }
}
