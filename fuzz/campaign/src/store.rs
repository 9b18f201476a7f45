//! One store of one round, and the commands that are run on it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::child::{Limits, Program, Ran, Trouble};
use crate::inputs::args;

/// A store in a folder of its own.
pub struct Store<'a> {
    program: &'a Program,
    /// Of the commands that look at the store.
    pub limits: Limits,
    folder: TempDir,
    /// Its address, if it does not lie in the folder, and what the environment says of it.
    elsewhere: Option<(PathBuf, Vec<(&'static str, String)>)>,
}

impl<'a> Store<'a> {
    /// Makes a folder in `parent`; the store is made by the first command.
    pub fn new(program: &'a Program, parent: &Path) -> Result<Self, Trouble> {
        let folder = tempfile::Builder::new().prefix("round-").tempdir_in(parent)?;
        Ok(Store { program, limits: Limits::default(), folder, elsewhere: None })
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn path(&self) -> PathBuf {
        match &self.elsewhere {
            Some((address, _)) => address.clone(),
            None => self.folder().join("store"),
        }
    }

    /// Lies at this address from now on.
    pub fn lie_at(&mut self, address: String, environment: Vec<(&'static str, String)>) {
        self.elsewhere = Some((address.into(), environment));
    }

    /// Returns whether it does not lie in the folder.
    pub fn is_elsewhere(&self) -> bool {
        self.elsewhere.is_some()
    }

    fn environment(&self) -> &[(&'static str, String)] {
        self.elsewhere.as_ref().map_or(&[], |(_, environment)| environment)
    }

    /// Runs a command that only looks, or is not disturbed.
    pub fn run(&self, args: &[String]) -> Result<Ran, Trouble> {
        self.run_on(&self.path(), args)
    }

    /// Runs a command on another store.
    pub fn run_on(&self, store: &Path, args: &[String]) -> Result<Ran, Trouble> {
        self.program.run((self.folder(), self.environment()), store, args, self.limits, |_| false)
    }

    /// Runs a command under limits, and kills it when `kill` says so.
    pub fn disturbed(
        &self,
        args: &[String],
        limits: Limits,
        kill: impl FnMut(Duration) -> bool,
    ) -> Result<Ran, Trouble> {
        self.program.run((self.folder(), self.environment()), &self.path(), args, limits, kill)
    }

    /// What a command that has to succeed prints.
    pub fn json(&self, args: &[String]) -> Result<Value, Trouble> {
        self.json_on(&self.path(), args)
    }

    pub fn json_on(&self, store: &Path, args: &[String]) -> Result<Value, Trouble> {
        let ran = self.run_on(store, args)?;
        match ran.is_done() {
            true => Ok(serde_json::from_str(&ran.out)?),
            false => Err(Trouble::lost(ran.told())),
        }
    }

    /// The versions that are there.
    pub fn log(&self) -> Result<BTreeSet<u64>, Trouble> {
        let log = self.json(&args!["log"])?;
        log.as_array().into_iter().flatten().map(|entry| number(entry, "version")).collect()
    }

    /// The snapshots, and their versions.
    pub fn snapshots(&self) -> Result<BTreeMap<String, u64>, Trouble> {
        let list = self.json(&args!["snapshot", "list"])?;
        let entry =
            |entry: &Value| Ok((entry["name"].as_str().unwrap_or_default().to_owned(), number(entry, "version")?));
        list.as_array().into_iter().flatten().map(entry).collect()
    }

    /// Copies the folder to `path`, and returns the path.
    pub fn keep(&self, path: &Path) -> Result<PathBuf, Trouble> {
        std::fs::create_dir_all(path)?;
        copy(self.folder(), path)?;
        Ok(path.canonicalize()?)
    }
}

/// Copies what is in a folder to another one, with modes and times.
pub fn copy(from: &Path, to: &Path) -> Result<(), Trouble> {
    match Command::new("cp").arg("-a").arg(from.join(".")).arg(to).status()?.success() {
        true => Ok(()),
        false => Err(std::io::Error::other(format!("cp to {} failed", to.display())).into()),
    }
}

/// A number of a JSON document.
pub fn number(document: &Value, name: &str) -> Result<u64, Trouble> {
    document[name].as_u64().ok_or_else(|| Trouble::lost(format!("no number '{name}' in {document}")))
}
