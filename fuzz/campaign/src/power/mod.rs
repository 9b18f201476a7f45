//! Losses of power that are simulated. A recorder notes what commands do to files and which of it they sync; from its log
//! every state is made that a disk may be left in which keeps what was synced, and of the rest any part.

mod check;
mod counts;
mod crash;
mod disk;
mod finding;
mod log;
mod record;
mod shown;
mod tree;

use std::collections::{BTreeMap, HashSet};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use fastrand::Rng;

use crate::child::{Program, Trouble, TroubleKind};
use crate::inputs::Inputs;
use crate::store::copy;
use check::Check;
use counts::shortened;
use crash::{Loss, Model, left};
use finding::Finding;
use log::wrong;
use record::{Recorder, Recording, commands, name, told_kills};

pub use counts::Counts;

/// Losses of each history with commands that are killed.
const OF_KILLED: usize = 100;

/// The last operations that are pending, each of which is lost alone, and kept alone, after each operation.
const LAST: usize = 12;

/// Of so many distinct trees, one is used further.
const USED_FURTHER: usize = 10;

/// Trees that are checked at once.
const THREADS: usize = 2;

/// What a campaign of losses is given.
pub struct Settings<'a> {
    pub losses: usize,
    pub seed: u64,
    pub library: &'a Path,
    /// Where folders are made meanwhile.
    pub parent: &'a Path,
    /// Where findings are kept.
    pub keep: &'a Path,
}

/// The recorder as it is built beside this program.
pub fn library() -> Result<PathBuf, Trouble> {
    Ok(std::env::current_exe()?.with_file_name("liblayerstore_recorder.so"))
}

/// Loses power so many times, and returns what came of it.
pub fn campaign(program: &Program, inputs: &Inputs, settings: &Settings) -> Result<Counts, Trouble> {
    let library = settings.library.canonicalize().map_err(|e| {
        wrong(format!(
            "the recorder {}: {e}; build the whole workspace, or give --recorder",
            settings.library.display()
        ))
    })?;
    let mut rng = Rng::with_seed(settings.seed);
    let (commands, mut counts) = (commands(inputs, &mut rng), Counts::default());
    let recorder = Recorder { program, inputs, library: &library };
    let folder = || tempfile::Builder::new().prefix("recorded-").tempdir_in(settings.parent);
    let first = folder()?;
    let whole = recorder.record(&commands, BTreeMap::new(), first.path())?;
    let losses = undisturbed(&whole, settings.losses.div_ceil(2), &mut rng);
    let check = Check { program, inputs, commands: &commands, recording: &whole };
    lose(&check, &losses, settings, &mut counts)?;
    let mut left = settings.losses - losses.len();
    while left > 0 {
        let (kills, folder) = (whole.random_kills(commands.len(), &mut rng), folder()?);
        let number = left.min(OF_KILLED);
        left -= number;
        match recorder.record(&commands, kills.clone(), folder.path()) {
            Ok(recording) => {
                let losses = killed(&recording, number, &mut rng);
                let check = Check { program, inputs, commands: &commands, recording: &recording };
                lose(&check, &losses, settings, &mut counts)?;
            }
            Err(trouble) if trouble.kind == TroubleKind::Campaign => {
                let kept = settings.keep.join(format!("power-{}-recorded", settings.seed));
                std::fs::create_dir_all(&kept)?;
                copy(folder.path(), &kept)?;
                let what =
                    format!("after kills of {}: {}; {}", told_kills(&kills, &commands), trouble.what, kept.display());
                return Err(Trouble { what, ..trouble });
            }
            // The kills alone were too much.
            Err(trouble) => {
                let kept = settings.keep.join(format!("power-{}-{}", settings.seed, counts.found.len()));
                let what = format!("after kills of {}: {}", told_kills(&kills, &commands), trouble.what);
                let finding = Finding::from_trouble(trouble.kind, what);
                if counts.add_finding("repeated command", &finding, kept.clone()) {
                    eprintln!("power {}: {}\n  the store: {}", trouble.name(), finding.what, kept.display());
                    std::fs::create_dir_all(&kept)?;
                    copy(folder.path(), &kept)?;
                }
            }
        }
    }
    Ok(counts)
}

/// Losses of a history without kills: after each operation some that differ in one operation, or as many of these as half of the
/// number allows; the others at random.
fn undisturbed(recording: &Recording, number: usize, rng: &mut Rng) -> Vec<Loss> {
    let end = recording.disk.ops.len();
    let mut each: Vec<(usize, Model)> = vec![];
    for at in 0..=end {
        each.extend([(at, Model::None), (at, Model::All)]);
        let pending = recording.disk.pending(at);
        each.extend(pending.iter().rev().take(LAST).flat_map(|op| [(at, Model::But(*op)), (at, Model::Only(*op))]));
    }
    rng.shuffle(&mut each);
    each.truncate(if each.len() < number { number } else { number.div_ceil(2) });
    let mut losses: Vec<Loss> = each.into_iter().map(|(at, model)| Loss { at, model, seed: rng.u64(..) }).collect();
    while losses.len() < number {
        losses.push(random(recording, 0, rng));
    }
    losses
}

/// Losses of a history with kills: what is certain after each command, then at random after the first kill.
fn killed(recording: &Recording, number: usize, rng: &mut Rng) -> Vec<Loss> {
    let first = recording.parts.iter().find(|part| recording.kills.contains_key(&part.step));
    let first = first.map_or(0, |part| part.begin);
    let ends = recording.parts.iter().map(|part| part.end).filter(|end| *end > first);
    let mut losses: Vec<Loss> = ends.map(|at| Loss { at, model: Model::None, seed: 0 }).take(number).collect();
    while losses.len() < number {
        losses.push(random(recording, first, rng));
    }
    losses
}

/// A loss at random.
fn random(recording: &Recording, first: usize, rng: &mut Rng) -> Loss {
    let at = rng.usize(first..=recording.disk.ops.len());
    let one = rng.choice(recording.disk.pending(at)).unwrap_or_default();
    let models =
        [Model::None, Model::All, Model::Prefix, Model::Names, Model::Split, Model::But(one), Model::Only(one)];
    Loss { at, model: models[rng.usize(..models.len())], seed: rng.u64(..) }
}

/// Loses power in these ways, and checks each tree that is another one, or to be held to something else.
fn lose(check: &Check, losses: &[Loss], settings: &Settings, counts: &mut Counts) -> Result<(), Trouble> {
    let (recording, mut seen, mut distinct) = (check.recording, HashSet::new(), vec![]);
    let command = |loss: &Loss| name(&check.commands[recording.command(loss.at)]);
    counts.histories += 1;
    for loss in losses {
        counts.losses += 1;
        *counts.commands.entry(command(loss)).or_default() += 1;
        *counts.models.entry(loss.model.name()).or_default() += 1;
        let tree = left(&recording.disk, loss);
        if seen.insert(BuildHasherDefault::<DefaultHasher>::new().hash_one((tree, recording.done(loss.at)))) {
            distinct.push(loss);
        }
    }
    let (before, mut found) = (counts.distinct as usize, 0);
    counts.distinct += distinct.len() as u64;
    let ended = on_threads(&distinct, |at, loss| {
        let folder = tempfile::Builder::new().prefix("lost-").tempdir_in(settings.parent)?;
        left(&recording.disk, loss).write(&recording.disk.ops, folder.path())?;
        check.check(loss.at, folder.path(), (before + at).is_multiple_of(USED_FURTHER))
    })?;
    for (loss, outcome) in distinct.into_iter().zip(ended) {
        match outcome {
            Ok(left) => counts.add(left),
            Err(finding) => {
                let kept = settings.keep.join(format!("power-{}-{}", settings.seed, counts.found.len()));
                if counts.add_finding(command(loss), &finding, kept.clone()) {
                    keep(check, loss, &finding, settings, &kept)?;
                }
                found += 1;
            }
        }
    }
    let kills = told_kills(&recording.kills, check.commands);
    eprintln!("power: {} of {} losses; killed: {kills}; {found} findings", counts.losses, settings.losses);
    Ok(())
}

/// What a check of each item returns, in their order.
fn on_threads<T: Sync, R: Send>(
    items: &[T],
    check: impl Fn(usize, &T) -> Result<R, Trouble> + Sync,
) -> Result<Vec<R>, Trouble> {
    let (next, results) = (Mutex::new(items.iter().enumerate()), Mutex::new(BTreeMap::new()));
    let take = || next.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some((at, item)) = take() {
                    let result = check(at, item);
                    results.lock().unwrap_or_else(PoisonError::into_inner).insert(at, result);
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
}

/// Keeps the tree of a finding, the log that it is from, and what is to be known of it, which it prints.
fn keep(check: &Check, loss: &Loss, finding: &Finding, settings: &Settings, kept: &Path) -> Result<(), Trouble> {
    if kept.exists() {
        std::fs::remove_dir_all(kept)?;
    }
    let (recording, tree) = (check.recording, kept.join("tree"));
    let disk = &recording.disk;
    std::fs::create_dir_all(&tree)?;
    left(disk, loss).write(&disk.ops, &tree)?;
    std::fs::copy(&recording.log, kept.join("log"))?;
    let last = loss.at.checked_sub(1).map_or("nothing".to_owned(), |last| disk.told(last));
    let one = match loss.model {
        Model::But(op) | Model::Only(op) => format!(": {}", disk.told(op)),
        _ => String::new(),
    };
    let lines = [
        format!(
            "power {}: {}: {}",
            finding.wrong.name(),
            name(&check.commands[recording.command(loss.at)]),
            finding.what.trim()
        ),
        format!("  lost after operation {} of {}, {last}", loss.at, disk.ops.len()),
        format!("  of what was pending was kept: {}{one}", loss.model.name()),
        format!("  killed and run again: {}", told_kills(&recording.kills, check.commands)),
        format!("  again: make power POWER=\"--losses {} --seed {}\"", settings.losses, settings.seed),
        format!("  the store: {}", tree.canonicalize()?.join(record::STORE).display()),
    ];
    std::fs::write(kept.join("what.txt"), lines.join("\n") + "\n")?;
    lines.iter().for_each(|line| eprintln!("{}", shortened(line)));
    Ok(())
}
