//! One store of one round, and what its commands acknowledged.

use std::path::{Path, PathBuf};

use fastrand::Rng;
use serde_json::Value;

use crate::check::{check, check_copy};
use crate::child::{Program, Ran, Trouble};
use crate::history::{Depth, History, State};
use crate::inputs::{Inputs, args};
use crate::report::Counts;
use crate::step::Step;
use crate::store::{Store, number};

/// A store, and what it has to hold.
pub struct Place<'a> {
    pub store: Store<'a>,
    pub inputs: &'a Inputs,
    pub rng: Rng,
    pub history: History,
    pub counts: Counts,
}

/// A file that a command writes beside the store: what may be there once it has ended.
struct Written {
    path: PathBuf,
    before: Option<Vec<u8>>,
    after: Vec<u8>,
}

impl<'a> Place<'a> {
    /// Makes a folder in `parent`; the store is made by the first command.
    pub fn new(program: &'a Program, inputs: &'a Inputs, parent: &Path, seed: u64) -> Result<Self, Trouble> {
        let (store, rng) = (Store::new(program, parent)?, Rng::with_seed(seed));
        Ok(Place { store, inputs, rng, history: History::default(), counts: Counts::default() })
    }

    /// Whether the store holds what the history has.
    pub fn check(&mut self, depth: Depth) -> Result<(), Trouble> {
        check(&self.store, self.inputs, &mut self.history, &mut self.rng, depth)
    }

    /// Imports into the new store, undisturbed, then names a snapshot and imports again.
    pub fn begin(&mut self) -> Result<(), Trouble> {
        let first = Step::Import { model: "a".into(), variant: self.rng.usize(..self.inputs.variants.len()) };
        self.begin_with(&first)
    }

    /// As [`Place::begin`], with this first import.
    pub fn begin_with(&mut self, first: &Step) -> Result<(), Trouble> {
        let made = number(&self.store.json(&first.args(self.inputs))?, "version")?;
        for version in self.store.log()? {
            self.history.commit(version, State::new());
        }
        if self.history.latest() != made {
            return Err(Trouble::lost(format!(
                "the import made version {made}, the latest is {}",
                self.history.latest()
            )));
        }
        let state = first.state_after(&History::default()).unwrap_or_default();
        self.history.commit(made, state);
        let second = Step::Import { model: "b".into(), variant: self.rng.usize(..self.inputs.variants.len()) };
        for step in [Step::Snapshot("begun".into()), second] {
            self.undisturbed(&step)?;
        }
        self.check(Depth::All)
    }

    /// Does a step without a fault, which has to succeed.
    pub fn undisturbed(&mut self, step: &Step) -> Result<(), Trouble> {
        let ran = self.attempt(step, |place, args| place.store.run(args))?;
        match ran.is_done() {
            true => Ok(()),
            false => Err(Trouble::lost(ran.told())),
        }
    }

    /// Does a step in the way that `fault` has it, and takes what it acknowledged, or what became of it, into the history.
    pub fn attempt(
        &mut self,
        step: &Step,
        fault: impl FnOnce(&mut Self, &[String]) -> Result<Ran, Trouble>,
    ) -> Result<Ran, Trouble> {
        let written = self.written(step)?;
        for file in &written {
            match &file.before {
                Some(bytes) => std::fs::write(&file.path, bytes)?,
                None if file.path.exists() => std::fs::remove_file(&file.path)?,
                None => {}
            }
        }
        if *step == Step::Collect {
            self.history.collecting();
        }
        let ran = fault(self, &step.args(self.inputs))?;
        if ran.is_done() {
            self.inputs.took(step.name(), ran.took);
        }
        for file in written {
            let there = file.path.exists().then(|| std::fs::read(&file.path)).transpose()?;
            let is_new = there.as_ref() == Some(&file.after);
            if !is_new && (ran.is_done() || there != file.before) {
                return Err(Trouble::lost(format!("{} is not what was written: {}", file.path.display(), ran.told())));
            }
        }
        if let Step::Copy { model, layer } = step {
            if !ran.is_done() {
                // It can be made again.
                self.store.json(&step.args(self.inputs))?;
            }
            let rows = self.inputs.rows(self.history.state()[model]);
            check_copy(&self.store, &self.store.folder().join("copied"), (model, &rows), layer)?;
        }
        self.settle(step, &ran)?;
        Ok(ran)
    }

    /// The files beside the store that a step writes.
    fn written(&self, step: &Step) -> Result<Vec<Written>, Trouble> {
        let path = |name: &str| self.store.folder().join(name);
        let state = self.history.state();
        Ok(match step {
            Step::Export(model) => {
                let Some(after) = self.inputs.export(state[model]) else {
                    return Err(Trouble::lost("a step without its model"));
                };
                let after = after.to_vec();
                vec![Written { path: path("export.safetensors"), before: Some(b"what was there".to_vec()), after }]
            }
            Step::Attend { model, piece } => {
                let Some(block) = state[model].block else { return Err(Trouble::lost("a step without its block")) };
                let after = &self.inputs.blocks[block].after;
                let before = piece.checked_sub(1).map(|before| after[before].0.clone());
                vec![
                    Written { path: path("state.safetensors"), before, after: after[*piece].0.clone() },
                    Written { path: path("attended.npy"), before: None, after: after[*piece].1.clone() },
                ]
            }
            Step::Copy { .. } => {
                let copied = path("copied");
                if copied.exists() {
                    std::fs::remove_dir_all(copied)?;
                }
                vec![]
            }
            _ => vec![],
        })
    }

    /// Takes what a step did into the history.
    fn settle(&mut self, step: &Step, ran: &Ran) -> Result<(), Trouble> {
        let done: Option<Value> = ran.is_done().then(|| serde_json::from_str(&ran.out)).transpose()?;
        let (before, after) = (self.history.latest(), step.state_after(&self.history));
        let latest = match (&done, &after) {
            (Some(done), Some(_)) => number(done, "version")?,
            _ => self.store.log()?.last().copied().unwrap_or_default(),
        };
        match after {
            Some(state) if latest > before => self.history.commit(latest, state),
            // Nothing was to be changed.
            Some(state) if latest == before && (done.is_none() || state == self.history.state()) => {}
            None if latest == before => {}
            // On an object store gc makes versions that change nothing, and may remove those before.
            None if *step == Step::Collect && self.store.is_elsewhere() && latest > before => {
                let state = self.history.state();
                (before + 1..=latest).for_each(|version| self.history.commit(version, state.clone()));
                self.history.collecting();
            }
            _ => return Err(Trouble::lost(format!("version {before} was the latest, then {latest}: {}", ran.told()))),
        }
        match step {
            Step::Snapshot(name) => {
                let version = match &done {
                    Some(done) => Some(number(done, "version")?),
                    None => self.store.snapshots()?.remove(name),
                };
                self.history.snapshots.extend(version.map(|version| (name.clone(), version)));
            }
            Step::Forget(name) if done.is_some() || !self.store.snapshots()?.contains_key(name) => {
                self.history.snapshots.remove(name);
            }
            _ => {}
        }
        Ok(())
    }

    /// At the end of a round: what was left behind can be collected, and the store goes on being used.
    pub fn finish(&mut self) -> Result<(), Trouble> {
        self.check(Depth::All)?;
        self.undisturbed(&Step::Collect)?;
        self.check(Depth::Kept)?;
        let left = self.store.json(&args!["gc", "--older-than", "0s"])?;
        if left["stray_rows"] != 0 || left["artifacts"] != 0 {
            return Err(Trouble::lost(format!("gc left something: {left}")));
        }
        for _ in 0..2 {
            let variant = self.rng.usize(..self.inputs.variants.len());
            self.undisturbed(&Step::Import { model: "last".into(), variant })?;
        }
        self.check(Depth::Latest)
    }
}
