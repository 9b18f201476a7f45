//! Every version of every table opened, and every artifact held against its name.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::take;
use std::sync::Arc;

use futures::StreamExt;
use serde::Serialize;

use super::agreement::{DataTables, Names, Unreadable};
use super::catalogue;
use super::data::other_content;
use super::heal;
use super::index_check;
use super::location::Location;
use super::metadata::{self, DamagedMetadata};
use super::record::{ArtifactRecord, LayerName, LayerRecord};
use super::remedy::Remedy;
use super::row_locations::RowLocations;
use super::rows;
use super::schema::{ARTIFACTS, LAYERS};
use super::shared::Shared;
use super::trial::Trial;
use crate::error::{Error, Result};
use crate::layer::{ArtifactId, layer_from_parts};
use crate::tasks::unwrap_join;

/// Artifacts hashed at once.
const AT_ONCE: usize = 2;

/// How much a verification looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum VerifyDepth {
    /// Versions, snapshots, the list of artifacts and numbers of rows: no artifact is read.
    Quick,
    /// Also every artifact: its rows are read, hashed and held against its name, and built into a layer.
    #[default]
    Full,
    /// Also runs every layer on fixed inputs, with the settings of every row of the catalogue that uses it: its method and shape have
    /// to be the row's, and its outputs finite and of that shape. Numbers of dense layers are the checkpoint's own, and modules run by
    /// the layers that they are made of.
    Deep,
}

/// What verify found.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct VerifyReport {
    /// Artifacts that are listed, or that a version names.
    pub artifacts: u64,
    /// Those that are not what was written, or that a table lacks which should have them.
    pub corrupt: Vec<CorruptArtifact>,
    /// Files of tables, and snapshots, that cannot be read; left out of JSON where there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub damaged: Vec<DamagedMetadata>,
    /// Methods that this program does not know, with the numbers of their artifacts: these are as they were written, but no layers
    /// were built from them. Left out of JSON where there are none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub unknown_methods: BTreeMap<String, u64>,
}

impl VerifyReport {
    /// Returns whether nothing was found.
    pub fn is_sound(&self) -> bool {
        self.corrupt.is_empty() && self.damaged.is_empty()
    }
}

/// An artifact that is not what was written.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CorruptArtifact {
    /// Its name.
    pub artifact: String,
    /// What was found.
    pub reason: String,
    /// Layers that use it, in any version that is there.
    pub layers: Vec<LayerName>,
    /// What helps, the best first.
    pub help: Vec<Remedy>,
}

/// What is wrong with an artifact.
struct Finding {
    reason: String,
    /// Whether its rows were read, and are not what was written.
    content: bool,
}

/// Looks at everything that `depth` says. `seen` is told of each artifact that was read.
///
/// # Errors
/// When no version of the catalogue can be opened, or the storage refuses.
pub async fn verify(
    shared: &Arc<Shared>,
    depth: VerifyDepth,
    seen: Arc<dyn Fn(usize, usize) + Send + Sync>,
) -> Result<VerifyReport> {
    let location = &shared.location;
    // The catalogue first, then the list, then the data: an import at work writes them the other way round.
    let (mut damaged, versions) = metadata::damaged(location).await?;
    let mut named = Named::default();
    named.read(shared, depth, versions, &mut damaged).await;
    let records = match shared.data.records().await {
        Ok(records) => records,
        // Of artifacts nothing is known before there is a list again.
        Err(e @ Error::Damaged { .. }) => {
            if !damaged.iter().any(|d| d.table == ARTIFACTS) {
                damaged.push(unreadable_rows(location, ARTIFACTS, None, (&e, vec![Remedy::Repair])));
            }
            let artifacts = named.names.iter().count() as u64;
            return Ok(VerifyReport { artifacts, damaged, ..VerifyReport::default() });
        }
        Err(e) => return Err(e),
    };
    let (mut found, unknown_methods) = match depth {
        VerifyDepth::Quick => Default::default(),
        _ => read_all(shared, &records, (take(&mut named.places), take(&mut named.trials)), seen).await,
    };
    let listed: BTreeMap<ArtifactId, ArtifactRecord> = records.into_iter().map(|r| (r.artifact, r)).collect();
    let unlisted = named.names.iter().filter(|(id, _)| !listed.contains_key(id)).count();
    let unreadable = count_all(location, &named.names, &listed, &mut found).await;
    damaged.extend(unreadable.into_iter().map(|(table, fragment)| damaged_file(location, &table, fragment)));
    damaged.extend(index_check::damaged(location).await?);
    if !found.is_empty() || !damaged.is_empty() {
        still_there(shared, &mut found, &mut damaged).await?;
    }
    let mut corrupt = vec![];
    for (id, finding) in found {
        corrupt.push(CorruptArtifact {
            help: help(shared, depth, (&named.names, listed.get(&id)), (id, &finding)).await,
            artifact: id.to_string(),
            reason: finding.reason,
            layers: named.users.remove(&id).unwrap_or_default().into_iter().collect(),
        });
    }
    Ok(VerifyReport { artifacts: (listed.len() + unlisted) as u64, corrupt, damaged, unknown_methods })
}

/// A table of the store's own whose rows cannot be read at a version, and what helps.
fn unreadable_rows(
    location: &Location,
    table: &str,
    version: Option<u64>,
    (e, help): (&Error, Vec<Remedy>),
) -> DamagedMetadata {
    DamagedMetadata {
        table: table.to_owned(),
        version,
        snapshot: None,
        file: format!("{}/data", location.table_uri(table)),
        reason: e.to_string(),
        help,
    }
}

/// What the versions of the catalogue say.
#[derive(Default)]
struct Named {
    names: Names,
    users: BTreeMap<ArtifactId, BTreeSet<LayerName>>,
    /// Where versions say that an artifact's rows are, each place once: gc and repairs keep the list's places up to date, and not theirs.
    places: BTreeMap<ArtifactId, Vec<RowLocations>>,
    /// Ways in which layers run, each once.
    trials: BTreeMap<ArtifactId, Vec<Trial>>,
}

impl Named {
    async fn read(
        &mut self,
        shared: &Shared,
        depth: VerifyDepth,
        versions: BTreeSet<u64>,
        damaged: &mut Vec<DamagedMetadata>,
    ) {
        let location = &shared.location;
        let latest = versions.last().copied();
        for version in versions.into_iter().rev() {
            let read = async {
                let dataset = catalogue::open(location, Some(version)).await?;
                let users = &mut self.users;
                let used = |artifact, layer| {
                    users.entry(artifact).or_default().insert(layer);
                };
                let added = self.names.add(&dataset, used).await?;
                // Whatever else a row holds.
                match depth {
                    VerifyDepth::Quick => Ok(vec![]),
                    _ => rows::rows_in(location, &dataset, &added).await,
                }
            };
            match read.await {
                Ok(rows) => rows.iter().for_each(|row| self.add(row, depth)),
                Err(e) => {
                    let help = match Some(version) == latest {
                        true => vec![Remedy::RestoreFile, Remedy::RestoreVersion],
                        false => vec![Remedy::RestoreFile],
                    };
                    damaged.push(unreadable_rows(location, LAYERS, Some(version), (&e, help)));
                }
            }
        }
    }
}

impl Named {
    fn add(&mut self, row: &LayerRecord, depth: VerifyDepth) {
        let places = self.places.entry(row.artifact).or_default();
        if !places.contains(&row.locations) {
            places.push(row.locations.clone());
        }
        if depth == VerifyDepth::Deep {
            let (trials, trial) = (self.trials.entry(row.artifact).or_default(), Trial::from(row));
            if !trials.iter().any(|known| known.is_like(&trial)) {
                trials.push(trial);
            }
        }
    }
}

/// Reads every listed artifact. Returns what is wrong with those that are not what was written, and how many are of methods that this
/// program does not know.
async fn read_all(
    shared: &Arc<Shared>,
    records: &[ArtifactRecord],
    (mut places, mut trials): (BTreeMap<ArtifactId, Vec<RowLocations>>, BTreeMap<ArtifactId, Vec<Trial>>),
    seen: Arc<dyn Fn(usize, usize) + Send + Sync>,
) -> (BTreeMap<ArtifactId, Finding>, BTreeMap<String, u64>) {
    let total = records.len();
    let checks = records.iter().enumerate().map(|(place, record)| {
        let (shared, seen) = (shared.clone(), seen.clone());
        let trials = trials.remove(&record.artifact).unwrap_or_default();
        let places = places.remove(&record.artifact).unwrap_or_default();
        async move {
            let checked = match check(&shared, record, trials).await {
                Ok(()) => check_copies(&shared, record, places).await,
                damaged => damaged,
            };
            seen(place + 1, total);
            (record.artifact, checked)
        }
    });
    let mut checks = futures::stream::iter(checks.collect::<Vec<_>>()).buffer_unordered(AT_ONCE);
    let (mut found, mut unknown) = (BTreeMap::new(), BTreeMap::new());
    while let Some((artifact, checked)) = checks.next().await {
        let reason = match checked {
            Ok(()) => continue,
            Err(Error::UnknownMethod { name, .. }) => {
                *unknown.entry(name).or_default() += 1;
                continue;
            }
            Err(Error::Corrupt { reason, .. }) => reason,
            Err(e) => e.to_string(),
        };
        found.insert(artifact, Finding { reason, content: true });
    }
    (found, unknown)
}

/// Reads an artifact, hashes it, builds its layer, and runs that.
///
/// # Errors
/// [`Error::UnknownMethod`] where it is what was written, and no layer can be built from it here; [`Error::Corrupt`] and others where it
/// is not.
async fn check(shared: &Shared, record: &ArtifactRecord, trials: Vec<Trial>) -> Result<()> {
    let (id, parts) = (record.artifact, shared.data.parts(record).await?);
    let checked = move || {
        let found = parts.id();
        if found != id {
            return Err(other_content(id, found));
        }
        let corrupt = |reason: String| Error::Corrupt { artifact: id.to_string(), reason };
        let layer = layer_from_parts(parts).map_err(|e| match e {
            unknown @ Error::UnknownMethod { .. } => unknown,
            e => corrupt(format!("no layer can be built from it: {e}")),
        })?;
        trials.iter().try_for_each(|trial| trial.run(&layer)).map_err(|e| corrupt(e.to_string()))
    };
    unwrap_join(tokio::task::spawn_blocking(checked).await)?
}

/// Reads and hashes the copies of an artifact that versions lead to, and the list does not.
///
/// # Errors
/// [`Error::Corrupt`] where one is not what was written.
async fn check_copies(shared: &Shared, record: &ArtifactRecord, places: Vec<RowLocations>) -> Result<()> {
    let id = record.artifact;
    for locations in places.into_iter().filter(|l| *l != record.locations && !l.0.is_empty()) {
        let Some(parts) = shared.data.parts_at(record, &locations).await? else { continue };
        let found = unwrap_join(tokio::task::spawn_blocking(move || parts.id()).await)?;
        if found != id {
            let reason = format!("a copy of it, to which a version of the catalogue leads, hashes to {found}");
            return Err(Error::Corrupt { artifact: id.to_string(), reason });
        }
    }
    Ok(())
}

/// Holds what the catalogue, the list and the data tables say against each other, and returns the fragments that cannot be read.
async fn count_all(
    location: &Location,
    names: &Names,
    listed: &BTreeMap<ArtifactId, ArtifactRecord>,
    found: &mut BTreeMap<ArtifactId, Finding>,
) -> Vec<(String, Unreadable)> {
    let missing = |reason: String| Finding { reason, content: false };
    for (id, _) in names.iter().filter(|(id, _)| !listed.contains_key(id)) {
        found.insert(*id, missing("the table of artifacts does not list it".into()));
    }
    let mut tables = DataTables::of(location);
    for (id, record) in listed {
        let lack = match names.get(id) {
            Some(user) if !record.locations.as_many_rows(&user.locations.locations()) => {
                Some(format!("{user} and the table of artifacts say other numbers of rows"))
            }
            _ => tables.lack(*id, &record.locations, true).await.unwrap_or_else(|e| Some(e.to_string())),
        };
        if let Some(lack) = lack {
            found.entry(*id).or_insert(missing(lack));
        }
    }
    tables.unreadable().map(|(table, fragment)| (table.to_owned(), fragment.clone())).collect()
}

/// A data file that cannot be read. What lay in it helps itself, artifact by artifact.
fn damaged_file(location: &Location, table: &str, fragment: Unreadable) -> DamagedMetadata {
    DamagedMetadata {
        table: table.to_owned(),
        version: None,
        snapshot: None,
        file: format!("{}/data/{}", location.table_uri(table), fragment.file),
        reason: fragment.reason,
        help: vec![Remedy::RepairFrom, Remedy::Repair],
    }
}

/// Drops what was found of versions and artifacts that gc has removed meanwhile.
async fn still_there(
    shared: &Shared,
    found: &mut BTreeMap<ArtifactId, Finding>,
    damaged: &mut Vec<DamagedMetadata>,
) -> Result<()> {
    let latest = catalogue::open_newest_readable(&shared.location).await?;
    let versions: BTreeSet<u64> = catalogue::versions(&latest).await?.into_iter().collect();
    damaged.retain(|d| {
        d.table != LAYERS
            || d.snapshot.is_some()
            || d.version.is_none_or(|v| v >= latest.version_id() || versions.contains(&v))
    });
    let mut named = Names::default();
    named.add_readable(&shared.location, versions).await;
    let listed: BTreeSet<ArtifactId> = shared.data.records().await?.into_iter().map(|r| r.artifact).collect();
    found.retain(|id, _| named.has(id) || listed.contains(id));
    Ok(())
}

/// Returns what helps where something is wrong with an artifact.
async fn help(
    shared: &Arc<Shared>,
    depth: VerifyDepth,
    (names, listed): (&Names, Option<&ArtifactRecord>),
    (id, finding): (ArtifactId, &Finding),
) -> Vec<Remedy> {
    let Some(user) = names.get(&id) else { return vec![Remedy::Gc] };
    let row = heal::row(&shared.location, id, user).await.ok().flatten();
    let made = match row.is_some_and(|row| !row.source.tensors.is_empty()) {
        true => Remedy::RepairFrom,
        false => Remedy::RepairFromStore,
    };
    match finding.content {
        true => vec![made],
        // To read it would be no quick look.
        false if depth == VerifyDepth::Quick => vec![Remedy::Repair, made],
        false if heal::found(shared, listed, user, id).await.is_some() => vec![Remedy::Repair],
        false => vec![made],
    }
}
