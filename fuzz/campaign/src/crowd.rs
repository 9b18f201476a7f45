//! Many processes at once on one store.

use std::collections::BTreeMap;

use fastrand::Rng;
use serde_json::Value;

use crate::check::check_rows;
use crate::child::{Ran, Trouble};
use crate::history::{Content, Depth, History, State};
use crate::inputs::{Inputs, args};
use crate::place::Place;
use crate::step::Step;
use crate::store::{Store, number};

const PROCESSES: usize = 8;

/// A change that was acknowledged, with the version that it named.
struct Acknowledged {
    version: u64,
    change: Change,
}

enum Change {
    Import {
        model: String,
        variant: usize,
    },
    Train {
        model: String,
        block: usize,
    },
    /// The version that became the latest again.
    Restore {
        from: u64,
    },
    Snapshot {
        name: String,
    },
    Forget {
        name: String,
    },
}

/// Imports from 8 processes at once into a store that is not there yet, with gc, snapshots, restores and indices among them; then
/// every version that is left holds what the acknowledgements, in order, amount to.
pub fn round(place: &mut Place, imports: usize) -> Result<(), Trouble> {
    let seeds: Vec<u64> = (0..PROCESSES).map(|_| place.rng.u64(..)).collect();
    let (store, inputs) = (&place.store, place.inputs);
    let done: Vec<_> = std::thread::scope(|scope| {
        let process = |(at, seed)| scope.spawn(move || Process::new(store, inputs, at, seed).run(imports));
        let running: Vec<_> = seeds.into_iter().enumerate().map(process).collect();
        running.into_iter().map(|running| running.join()).collect()
    });
    let mut all = vec![];
    for acknowledged in done {
        let crashed = |_| Trouble::from(std::io::Error::other("a thread of the campaign panicked"));
        all.extend(acknowledged.map_err(crashed)??);
    }
    place.counts.faults += all.len() as u64;
    place.history = replayed(all)?;
    place.check(Depth::All)?;
    place.finish()
}

/// One process after the other, of one of those at work.
struct Process<'a> {
    store: &'a Store<'a>,
    inputs: &'a Inputs,
    rng: Rng,
    /// The model that it alone imports.
    own: String,
    snapshots: BTreeMap<String, u64>,
    acknowledged: Vec<Acknowledged>,
}

impl<'a> Process<'a> {
    fn new(store: &'a Store<'a>, inputs: &'a Inputs, at: usize, seed: u64) -> Self {
        let (rng, own) = (Rng::with_seed(seed), format!("own-{at}"));
        Process { store, inputs, rng, own, snapshots: BTreeMap::new(), acknowledged: vec![] }
    }

    fn run(mut self, imports: usize) -> Result<Vec<Acknowledged>, Trouble> {
        for turn in 0..imports {
            let model = if self.rng.u8(..3) == 0 { "shared".to_owned() } else { self.own.clone() };
            let variant = self.rng.usize(..self.inputs.variants.len());
            let version = self.change(&Step::Import { model: model.clone(), variant })?;
            self.acknowledged.push(Acknowledged { version, change: Change::Import { model: model.clone(), variant } });
            self.look(version, &model, Content { variant: Some(variant), block: None })?;
            self.other(turn)?;
        }
        Ok(self.acknowledged)
    }

    /// Something else than an import, most of the time.
    fn other(&mut self, turn: usize) -> Result<(), Trouble> {
        let named = self.rng.choice(&self.snapshots).map(|(name, version)| (name.clone(), *version));
        match (self.rng.u8(..16), named) {
            (0..2, _) => {
                // Refused, and rightly, where imports are at work for as long as it waits.
                self.run_step(&Step::Collect).map(drop)
            }
            (2..6, _) => {
                let name = format!("{}-{turn}", self.own);
                let version = self.change(&Step::Snapshot(name.clone()))?;
                self.snapshots.insert(name.clone(), version);
                self.acknowledged.push(Acknowledged { version, change: Change::Snapshot { name } });
                Ok(())
            }
            (6, Some((name, from))) => {
                let version = self.change(&Step::Restore(name))?;
                self.acknowledged.push(Acknowledged { version, change: Change::Restore { from } });
                Ok(())
            }
            (7, Some((name, version))) => {
                self.change(&Step::Forget(name.clone()))?;
                self.snapshots.remove(&name);
                self.acknowledged.push(Acknowledged { version, change: Change::Forget { name } });
                Ok(())
            }
            (8, _) => match self.run_step(&Step::Index)? {
                ran if ran.is_done() => Ok(()),
                ran => Err(Trouble::lost(ran.told())),
            },
            (9, _) => {
                let (model, block) = (self.own.clone(), self.rng.usize(..self.inputs.blocks.len()));
                let version = self.change(&Step::Train { model: model.clone(), block })?;
                self.acknowledged.push(Acknowledged { version, change: Change::Train { model, block } });
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn run_step(&self, step: &Step) -> Result<Ran, Trouble> {
        self.store.run(&step.args(self.inputs))
    }

    /// Does a change that has no reason to be refused; returns the version that it names.
    fn change(&self, step: &Step) -> Result<u64, Trouble> {
        let ran = self.run_step(step)?;
        match ran.is_done() {
            true => version_of(&ran),
            false => Err(Trouble::lost(format!("refused beside others: {}", ran.told()))),
        }
    }

    /// A version that was just made holds what was put there, if a gc has left it.
    fn look(&self, version: u64, model: &str, content: Content) -> Result<(), Trouble> {
        match check_rows(self.store, self.inputs, version, model, content) {
            Err(_) if !self.store.run(&args!["--at", version, "layers", model])?.is_done() => Ok(()),
            result => result,
        }
    }
}

fn version_of(ran: &Ran) -> Result<u64, Trouble> {
    number(&serde_json::from_str::<Value>(&ran.out)?, "version")
}

/// What the acknowledged changes amount to, version by version.
fn replayed(mut all: Vec<Acknowledged>) -> Result<History, Trouble> {
    // Of those of one version one made it, and the others found that it held what they would have put there.
    all.sort_by_key(|done| (done.version, !matches!(done.change, Change::Restore { .. })));
    let first = all.first().map_or(0, |done| done.version);
    let mut history = History::default();
    (1..first).for_each(|version| history.commit(version, State::new()));
    let mut forgotten = vec![];
    let mut settled: BTreeMap<(u64, String), Content> = BTreeMap::new();
    for Acknowledged { version, change } in all {
        let mut state = history.state();
        match change {
            Change::Import { model, variant } => {
                let content = Content { variant: Some(variant), block: None };
                if settled.insert((version, model.clone()), content).is_some_and(|other| other != content) {
                    return Err(Trouble::lost(format!(
                        "two imports of '{model}' say that they made version {version}"
                    )));
                }
                state.insert(model, content);
            }
            Change::Train { model, block } => {
                // A restore of another process may have left no such model.
                state.entry(model).or_insert(Content { variant: None, block: None }).block = Some(block);
            }
            Change::Restore { from } if from == version => continue,
            Change::Restore { from } => match history.versions.get(&from) {
                Some(version) => state = version.state.clone(),
                None => return Err(Trouble::lost(format!("version {version} restores {from}, which nobody made"))),
            },
            Change::Snapshot { name } => {
                history.snapshots.insert(name, version);
                continue;
            }
            Change::Forget { name } => {
                forgotten.push(name);
                continue;
            }
        }
        history.commit(version, state);
    }
    history.snapshots.retain(|name, _| !forgotten.contains(name));
    history.collecting();
    Ok(history)
}
