//! SIGKILL at random moments.

use std::path::Path;
use std::time::Duration;

use fastrand::Rng;

use crate::child::{Limits, Ran, Trouble};
use crate::place::Place;
use crate::step::Step;

/// Steps of a round.
const STEPS: usize = 24;

/// Kills some first imports of a store, then most of the commands on it.
pub fn round(place: &mut Place) -> Result<(), Trouble> {
    let first = Step::Import { model: "a".into(), variant: place.rng.usize(..place.inputs.variants.len()) };
    for _ in 0..place.rng.usize(..3) {
        killed(place, &first, &first.args(place.inputs))?;
    }
    place.begin_with(&first)?;
    for _ in 0..STEPS {
        let step = Step::random(&mut place.rng, &place.history, place.inputs);
        match place.rng.u8(..5) {
            0 => place.undisturbed(&step)?,
            _ => drop(place.attempt(&step, |place, args| killed(place, &step, args))?),
        }
        place.check(step.depth())?;
    }
    place.finish()
}

/// Runs a command and kills it: after some part of the time that such a command takes, or when it has written some files.
fn killed(place: &mut Place, step: &Step, args: &[String]) -> Result<Ran, Trouble> {
    let store = place.store.path();
    let moment = Moment::random(&mut place.rng, place.inputs.usual(step.name()), &store);
    let mut reached = None;
    let ran =
        place.store.disturbed(args, Limits::default(), |elapsed| moment.is_there(elapsed, &store, &mut reached))?;
    place.counts.faults += u64::from(ran.code.is_none());
    Ok(ran)
}

/// When a command is killed.
enum Moment {
    After(Duration),
    /// So long after the store's files have become so many more, or fewer.
    Files {
        before: usize,
        changed: usize,
        then: Duration,
    },
}

impl Moment {
    fn random(rng: &mut Rng, usual: Duration, store: &Path) -> Moment {
        match rng.bool() {
            true => Moment::After(usual.mul_f64(rng.f64())),
            false => {
                let then = Duration::from_micros(rng.u64(..5000));
                Moment::Files { before: count_files(store), changed: 1 << rng.u32(..5), then }
            }
        }
    }

    fn is_there(&self, elapsed: Duration, store: &Path, reached: &mut Option<Duration>) -> bool {
        match self {
            Moment::After(time) => elapsed >= *time,
            Moment::Files { before, changed, then } => {
                if reached.is_none() && count_files(store).abs_diff(*before) >= *changed {
                    *reached = Some(elapsed);
                }
                reached.is_some_and(|at| elapsed >= at + *then)
            }
        }
    }
}

/// Files under a folder, some of which may come and go meanwhile.
fn count_files(folder: &Path) -> usize {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let count = |path: &Path| if path.is_dir() { count_files(path) } else { 1 };
    entries.flatten().map(|entry| count(&entry.path())).sum()
}
