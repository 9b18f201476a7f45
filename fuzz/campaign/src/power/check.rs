//! Whether a store that a loss of power left is what its commands acknowledged.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::record::{Part, Recording, STORE};
use crate::child::{Limits, Program, Trouble, TroubleKind};
use crate::inputs::{Inputs, Rows, args, rows};
use crate::step::Step;
use crate::store::number;

/// What a store shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Versions, with their operations.
    log: BTreeMap<u64, String>,
    snapshots: BTreeMap<String, u64>,
    /// Models of the latest version.
    models: Models,
}

/// The layers of models.
type Models = BTreeMap<String, Rows>;

/// What a loss left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// What was acknowledged.
    Old,
    /// That, and what the command that was running does, or a part of it where it is a gc.
    New,
}

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
enum Stop {
    Found(Finding),
    Trouble(Trouble),
}

impl Stop {
    fn found(wrong: Wrong, what: impl Into<String>) -> Stop {
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

/// A program on one store.
#[derive(Clone, Copy)]
struct On<'a> {
    program: &'a Program,
    folder: &'a Path,
    store: &'a Path,
}

impl On<'_> {
    /// What a command prints; a refusal is a finding of this kind.
    fn json(self, wrong: Wrong, args: &[String]) -> Result<Value, Stop> {
        let ran = self.program.run(self.folder, self.store, args, Limits::default(), |_| false)?;
        match ran.is_done() {
            true => serde_json::from_str(&ran.out).map_err(|e| Stop::found(wrong, format!("{e}: {}", ran.told()))),
            false => Err(Stop::found(wrong, ran.told())),
        }
    }

    fn shown(self) -> Result<Shown, Stop> {
        let text = |entry: &Value, name: &str| entry[name].as_str().unwrap_or_default().to_owned();
        let log = self.json(Wrong::Lost, &args!["log"])?;
        let version = |entry: &Value| Ok((number(entry, "version")?, text(entry, "operation")));
        let log = log.as_array().into_iter().flatten().map(version).collect::<Result<_, Trouble>>()?;
        let list = self.json(Wrong::Lost, &args!["snapshot", "list"])?;
        let snapshot = |entry: &Value| Ok((text(entry, "name"), number(entry, "version")?));
        let snapshots = list.as_array().into_iter().flatten().map(snapshot).collect::<Result<_, Trouble>>()?;
        Ok(Shown { log, snapshots, models: self.models(&[])? })
    }

    /// The models of the latest version, or of the one that arguments name.
    fn models(self, at: &[String]) -> Result<Models, Stop> {
        let list = self.json(Wrong::Lost, &[at, &args!["models"]].concat())?;
        let names = list.as_array().into_iter().flatten().filter_map(|model| model["model"].as_str());
        let layers = |name: &str| {
            let layers = self.json(Wrong::Lost, &[at, &args!["layers", name]].concat())?;
            Ok((name.to_owned(), rows(&layers)?))
        };
        names.map(layers).collect()
    }

    fn verify(self, wrong: Wrong) -> Result<(), Stop> {
        let verified = self.json(wrong, &args!["verify"])?;
        let count = |name: &str| verified.get(name).and_then(Value::as_array).map(Vec::len);
        match (count("corrupt"), count("damaged").unwrap_or(0)) {
            (Some(0), 0) => Ok(()),
            _ => Err(Stop::found(wrong, format!("verify: {verified}"))),
        }
    }
}

/// What a store shows that nothing has disturbed.
pub fn shown(program: &Program, folder: &Path, store: &Path) -> Result<Shown, Trouble> {
    On { program, folder, store }.shown().map_err(|stop| match stop {
        Stop::Found(finding) => Trouble::lost(finding.what),
        Stop::Trouble(trouble) => trouble,
    })
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

impl Shown {
    /// Whether a gc that leads from one state to another has removed some of the versions that it removes.
    fn is_between(&self, before: &Shown, after: &Shown) -> bool {
        let is_in =
            |part: &Shown, whole: &Shown| part.log.iter().all(|(v, operation)| whole.log.get(v) == Some(operation));
        (&self.snapshots, &self.models) == (&before.snapshots, &before.models)
            && is_in(after, self)
            && is_in(self, before)
    }

    /// What a message says of it.
    fn told(&self) -> String {
        let versions = self.log.keys().map(u64::to_string).collect();
        let snapshots = self.snapshots.iter().map(|(name, version)| format!("{name} = {version}")).collect();
        let models = self.models.iter().map(|(model, rows)| format!("{model} of {} layers", rows.len())).collect();
        let [versions, snapshots, models] =
            [versions, snapshots, models].map(|names: Vec<String>| match names.is_empty() {
                true => "none".to_owned(),
                false => names.join(", "),
            });
        format!("[versions {versions} | snapshots {snapshots} | models {models}]")
    }
}
