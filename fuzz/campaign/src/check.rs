//! Whether a store holds what was acknowledged.

use std::collections::BTreeSet;
use std::path::Path;

use fastrand::Rng;
use serde_json::Value;

use crate::child::Trouble;
use crate::history::{Content, Depth, History, State};
use crate::inputs::{Inputs, Rows, args, rows};
use crate::store::Store;

/// Versions that are looked at, at most, beside the latest one.
const MANY: usize = 24;

/// Checks that the store holds what the history has, and `verify` finds nothing.
pub fn check(
    store: &Store,
    inputs: &Inputs,
    history: &mut History,
    rng: &mut Rng,
    depth: Depth,
) -> Result<(), Trouble> {
    let (log, snapshots) = (store.log()?, store.snapshots()?);
    if snapshots != history.snapshots {
        return Err(Trouble::lost(format!("snapshots {snapshots:?}, expected {:?}", history.snapshots)));
    }
    if let Some(version) = log.iter().find(|version| !history.versions.contains_key(version)) {
        return Err(Trouble::lost(format!("nothing is known to have made version {version}")));
    }
    let kept = history.kept();
    let gone: Vec<u64> = history.versions.keys().filter(|version| !log.contains(version)).copied().collect();
    for version in gone {
        if kept.contains(&version) || !history.versions[&version].may_be_gone {
            return Err(Trouble::lost(format!("version {version} is not in the log")));
        }
        history.versions.remove(&version);
    }
    let mut exported = match depth {
        Depth::Latest => history.state().into_values().collect(),
        Depth::Kept | Depth::All => BTreeSet::new(),
    };
    let mut others: Vec<u64> = match depth {
        Depth::Latest => vec![],
        Depth::Kept => kept.into_iter().collect(),
        Depth::All => log.into_iter().collect(),
    };
    rng.shuffle(&mut others);
    others.truncate(MANY);
    let latest = history.latest();
    for version in [latest].into_iter().chain(others.into_iter().filter(|version| *version != latest)) {
        let of = history.versions.get(&version);
        check_version(store, inputs, version, &of.map_or(State::new(), |of| of.state.clone()), &mut exported)?;
    }
    let verified = store.json(&args!["verify"])?;
    let damaged = verified.get("damaged").and_then(Value::as_array).map_or(0, Vec::len);
    match verified["corrupt"].as_array().map(Vec::len) {
        Some(0) if damaged == 0 => Ok(()),
        _ => Err(Trouble::lost(format!("verify: {verified}"))),
    }
}

/// Checks that a version holds these models and no others.
fn check_version(
    store: &Store,
    inputs: &Inputs,
    version: u64,
    state: &State,
    exported: &mut BTreeSet<Content>,
) -> Result<(), Trouble> {
    let at = version.to_string();
    let models = store.json(&args!["--at", at, "models"])?;
    let names: Vec<&str> =
        models.as_array().into_iter().flatten().filter_map(|model| model["model"].as_str()).collect();
    if !names.iter().copied().eq(state.keys()) {
        return Err(Trouble::lost(format!("version {version} has the models {names:?}, expected {:?}", state.keys())));
    }
    check_models(store, inputs, version, state, exported)
}

/// Checks that a version holds these models, layer by layer; contents that are not yet in `exported` are exported, too.
pub fn check_models(
    store: &Store,
    inputs: &Inputs,
    version: u64,
    state: &State,
    exported: &mut BTreeSet<Content>,
) -> Result<(), Trouble> {
    for (model, content) in state {
        check_rows(store, inputs, version, model, *content)?;
        let (true, Some(expected)) = (exported.insert(*content), inputs.export(*content)) else { continue };
        let path = store.folder().join("read.safetensors");
        store.json(&args!["--at", version, "export", model, "--output", path.display()])?;
        if std::fs::read(&path)? != expected {
            return Err(Trouble::lost(format!("version {version}, model '{model}': exports other bytes than before")));
        }
    }
    Ok(())
}

/// Checks that a version's model has these layers, with these artifacts.
pub fn check_rows(store: &Store, inputs: &Inputs, version: u64, model: &str, content: Content) -> Result<(), Trouble> {
    let found = rows(&store.json(&args!["--at", version, "layers", model])?)?;
    let expected = inputs.rows(content);
    if found == expected {
        return Ok(());
    }
    let other: Vec<_> = expected.iter().filter(|(layer, row)| found.get(*layer) != Some(row)).collect();
    Err(Trouble::lost(format!("version {version}, model '{model}': {found:?}; expected, among others, {other:?}")))
}

/// Checks that a store at `path` holds this layer of a model of these rows, and nothing else but the components of a module.
pub fn check_copy(store: &Store, path: &Path, (model, of): (&str, &Rows), layer: &str) -> Result<(), Trouble> {
    let found = rows(&store.json_on(path, &args!["layers", model])?)?;
    let components = format!("{layer}.");
    let belongs = |name: &String| name == layer || name.starts_with(&components);
    let same = found.iter().all(|(name, row)| belongs(name) && of.get(name) == Some(row));
    let is_module = of.get(layer).is_some_and(|(method, _)| method == "module");
    let expected = if is_module { of.keys().filter(|name| belongs(name)).count() } else { 1 };
    if !same || found.len() != expected {
        return Err(Trouble::lost(format!("a copy of '{layer}' holds {found:?}, expected {expected} of {of:?}")));
    }
    store.json_on(path, &args!["verify"]).map(drop)
}
