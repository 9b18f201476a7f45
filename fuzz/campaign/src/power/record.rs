//! The history of commands, and how it is recorded: undisturbed, or with commands that are killed and repeated.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fastrand::Rng;

use super::crash::{Loss, Model, left};
use super::disk::Disk;
use super::log::{read, wrong};
use super::shown::{Shown, shown};
use crate::child::{Program, Ran, Recorded, Trouble, TroubleKind};
use crate::inputs::Inputs;
use crate::step::Step;

/// The store, in the directory that is recorded; the directories above it are made with it.
pub const STORE: &str = "new/deeper/store";

/// Bytes of a checkpoint, at most: trees are written thousands of times.
const SMALL: usize = 128 << 10;

/// Layers of keys of a small checkpoint that has enough of them for an index, at least.
const INDEXED: usize = 6;

/// The commands of a history. Each changes what the ones before it made; the first model has keys, which are indexed.
pub fn commands(inputs: &Inputs, rng: &mut Rng) -> Vec<Step> {
    let is_small = |at: &usize| inputs.variants[*at].export.len() < SMALL;
    let small: Vec<usize> = (0..inputs.variants.len()).filter(is_small).collect();
    let layers_of_keys =
        |at: usize| inputs.variants[at].rows.values().filter(|(method, _)| method == "key_value").count();
    let with_keys: Vec<usize> = small.iter().copied().filter(|at| layers_of_keys(*at) >= INDEXED).collect();
    let mut import = |model: &str, variants: &[usize]| Step::Import {
        model: model.to_owned(),
        variant: rng.choice(variants).copied().unwrap_or_default(),
    };
    vec![
        import("a", &with_keys),
        Step::Snapshot("first".to_owned()),
        import("b", &small),
        Step::Snapshot("second".to_owned()),
        import("a", &small),
        Step::Train { model: "b".to_owned(), block: 0 },
        Step::Restore("first".to_owned()),
        Step::Index,
        Step::Forget("second".to_owned()),
        import("c", &small),
        Step::Collect,
        Step::Forget("first".to_owned()),
        Step::Collect,
        import("d", &small),
    ]
}

/// A command's name; those of snapshots have two.
pub fn name(step: &Step) -> &'static str {
    match step {
        Step::Snapshot(_) => "snapshot create",
        Step::Forget(_) => "snapshot delete",
        other => other.name(),
    }
}

/// Kills, as a message names them.
pub fn told_kills(kills: &BTreeMap<usize, usize>, commands: &[Step]) -> String {
    let told = |(step, stop): (&usize, &usize)| {
        format!("command {} ({}) after its operation {stop}", step + 1, name(&commands[*step]))
    };
    match kills.is_empty() {
        true => "no command".to_owned(),
        false => kills.iter().map(told).collect::<Vec<_>>().join(", "),
    }
}

/// One run of a command.
#[derive(Debug)]
pub struct Part {
    /// The command's place in the history.
    pub step: usize,
    /// Operations of the log before it, and with it.
    pub begin: usize,
    pub end: usize,
    /// It ended with exit status 0.
    pub is_acknowledged: bool,
    /// What the store shows after it; `None` where a command that was killed left none that can be read.
    pub shown: Option<Shown>,
}

/// A history that was recorded.
pub struct Recording {
    pub disk: Disk,
    pub parts: Vec<Part>,
    /// The recorder's log.
    pub log: PathBuf,
    /// The operations after which commands were killed, counted within each.
    pub kills: BTreeMap<usize, usize>,
}

/// What histories are recorded with.
pub struct Recorder<'a> {
    pub program: &'a Program,
    pub inputs: &'a Inputs,
    pub library: &'a Path,
}

impl Recorder<'_> {
    /// Runs the commands in an empty folder. Those in `kills` are killed after so many operations, then run again.
    pub fn record(
        &self,
        commands: &[Step],
        kills: BTreeMap<usize, usize>,
        folder: &Path,
    ) -> Result<Recording, Trouble> {
        // The recorder knows paths without symbolic links.
        let (root, log) = (folder.canonicalize()?.join("root"), folder.join("log"));
        std::fs::create_dir(&root)?;
        let store = root.join(STORE);
        let mut parts: Vec<Part> = vec![];
        for (step, command) in commands.iter().enumerate() {
            let mut run = |stop: Option<usize>| {
                let recorded = Recorded { library: self.library, log: &log, root: &root, stop };
                let ran = self.program.recorded(folder, &store, &command.args(self.inputs), &recorded)?;
                let begin = parts.last().map_or(0, |part| part.end);
                let shown = match shown(self.program, folder, &store) {
                    Err(Trouble { kind: TroubleKind::Lost, .. }) if ran.code.is_none() => None,
                    shown => Some(shown?),
                };
                let (end, is_acknowledged) = (read(&log, &root)?.len(), ran.is_done());
                parts.push(Part { step, begin, end, is_acknowledged, shown });
                Ok::<_, Trouble>(ran)
            };
            let stopped = kills.get(&step).map(|stop| run(Some(*stop))).transpose()?;
            // It may have ended before.
            if stopped.as_ref().is_some_and(Ran::is_done) {
                continue;
            }
            let ran = run(None)?;
            // What was killed may have been done: the snapshot is there already, or is no longer there.
            let may_be_refused = stopped.is_some() && matches!(command, Step::Snapshot(_) | Step::Forget(_));
            if !ran.is_done() && !may_be_refused {
                return Err(Trouble::lost(ran.told()));
            }
        }
        let disk = Disk::new(read(&log, &root)?)?;
        if disk.ops.is_empty() {
            return Err(wrong("the recorder recorded nothing; is the binary linked statically?"));
        }
        let all = Loss { at: disk.ops.len(), model: Model::All, seed: 0 };
        left(&disk, &all).must_equal(&disk.ops, &root)?;
        Ok(Recording { disk, parts, log, kills })
    }
}

impl Recording {
    /// The runs that are acknowledged before a loss, with all before them, and those that have begun.
    pub fn done(&self, at: usize) -> (usize, usize) {
        let acknowledged = self.parts.iter().rposition(|part| part.is_acknowledged && part.end <= at);
        let begun = self.parts.iter().rposition(|part| part.begin < at);
        (acknowledged.map_or(0, |last| last + 1), begun.map_or(0, |last| last + 1))
    }

    /// The command that was running at a loss, or had just ended.
    pub fn command(&self, at: usize) -> usize {
        self.parts[self.done(at).1.saturating_sub(1)].step
    }

    /// Commands to kill, and after how many operations each: of any kind of operation as often as of any other, for some kinds are
    /// few.
    pub fn random_kills(&self, commands: usize, rng: &mut Rng) -> BTreeMap<usize, usize> {
        let mut steps: Vec<usize> = (0..commands).collect();
        rng.shuffle(&mut steps);
        steps.truncate(rng.usize(1..=3));
        let mut kills = BTreeMap::new();
        for step in steps {
            let Some(part) = self.parts.iter().find(|part| part.step == step) else { continue };
            let ops = &self.disk.ops[part.begin..part.end];
            let mut kinds: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
            for (at, op) in ops.iter().enumerate() {
                kinds.entry(op.name()).or_default().push(at + 1);
            }
            let kind = rng.choice(kinds.values());
            kills.extend(kind.and_then(|kind| rng.choice(kind)).map(|stop| (step, *stop)));
        }
        kills
    }
}
