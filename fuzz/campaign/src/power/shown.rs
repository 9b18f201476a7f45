//! What a store shows to the commands that read it.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::finding::{Stop, Wrong};
use crate::child::{Limits, Program, Trouble};
use crate::inputs::{Rows, args, rows};
use crate::store::number;

/// What a store shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Versions, with their operations.
    pub log: BTreeMap<u64, String>,
    pub snapshots: BTreeMap<String, u64>,
    /// Models of the latest version.
    pub models: Models,
}

/// The layers of models.
pub type Models = BTreeMap<String, Rows>;

impl Shown {
    /// Whether a gc that leads from one state to another has removed some of the versions that it removes.
    pub fn is_between(&self, before: &Shown, after: &Shown) -> bool {
        let is_in =
            |part: &Shown, whole: &Shown| part.log.iter().all(|(v, operation)| whole.log.get(v) == Some(operation));
        (&self.snapshots, &self.models) == (&before.snapshots, &before.models)
            && is_in(after, self)
            && is_in(self, before)
    }

    /// What a message says of it.
    pub fn told(&self) -> String {
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

/// A program on one store.
#[derive(Clone, Copy)]
pub struct On<'a> {
    pub program: &'a Program,
    pub folder: &'a Path,
    pub store: &'a Path,
}

impl On<'_> {
    /// What a command prints; a refusal is a finding of this kind.
    pub fn json(self, wrong: Wrong, args: &[String]) -> Result<Value, Stop> {
        let ran = self.program.run((self.folder, &[]), self.store, args, Limits::default(), |_| false)?;
        match ran.is_done() {
            true => serde_json::from_str(&ran.out).map_err(|e| Stop::found(wrong, format!("{e}: {}", ran.told()))),
            false => Err(Stop::found(wrong, ran.told())),
        }
    }

    pub fn shown(self) -> Result<Shown, Stop> {
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
    pub fn models(self, at: &[String]) -> Result<Models, Stop> {
        let list = self.json(Wrong::Lost, &[at, &args!["models"]].concat())?;
        let names = list.as_array().into_iter().flatten().filter_map(|model| model["model"].as_str());
        let layers = |name: &str| {
            let layers = self.json(Wrong::Lost, &[at, &args!["layers", name]].concat())?;
            Ok((name.to_owned(), rows(&layers)?))
        };
        names.map(layers).collect()
    }

    pub fn verify(self, wrong: Wrong) -> Result<(), Stop> {
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
