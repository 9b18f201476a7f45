//! Versions of all tables, and names of snapshots, opened one by one: what is damaged in them, file by file.

use std::collections::BTreeSet;

use lance::index::DatasetIndexExt;
use serde::Serialize;

use super::catalogue;
use super::layout::{VERSIONS, version_of};
use super::lease;
use super::listing::{names_in, table_folders};
use super::location::Location;
use super::remedy::Remedy;
use super::schema::{ARTIFACTS, LAYERS, Table};
use super::versions::{tag, tag_file, tag_names};
use super::waiting::{Waiting, caught, detail, reason};
use crate::error::{Error, Result};

/// A file of a table, or of a snapshot's name, that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DamagedMetadata {
    /// The table; empty where the file is of the whole store.
    pub table: String,
    /// The version of the table that the file stands for, where it stands for one; a data file stands for none.
    pub version: Option<u64>,
    /// The snapshot that the file names, where it names one.
    pub snapshot: Option<String>,
    /// The file's address.
    pub file: String,
    /// What was found.
    pub reason: String,
    /// What helps, the best first.
    pub help: Vec<Remedy>,
}

/// Opens every version of every table, and every snapshot, and returns what is damaged; and the versions of the catalogue that can
/// be opened.
///
/// # Errors
/// When the storage refuses to list the files.
pub async fn damaged(location: &Location) -> Result<(Vec<DamagedMetadata>, BTreeSet<u64>)> {
    let mut all = vec![];
    let mut catalogues = BTreeSet::new();
    let known = |name: &String| matches!(name.as_str(), LAYERS | ARTIFACTS) || Table::named(name).is_some();
    for table in table_folders(location).await?.into_iter().filter(known) {
        let manifests = names_in(location, &table, &[VERSIONS]).await?;
        let manifests: Vec<_> = manifests.iter().filter_map(|file| Some((version_of(file)?, file))).collect();
        if manifests.is_empty() && !names_in(location, &table, &["data"]).await?.is_empty() {
            all.push(DamagedMetadata {
                table: table.clone(),
                version: None,
                snapshot: None,
                file: format!("{}/{VERSIONS}", location.table_uri(&table)),
                reason: "the table has data, and no version of it is there".into(),
                help: of_table(&table),
            });
        }
        let latest = manifests.iter().map(|(version, _)| *version).max();
        for (version, file) in manifests {
            match open(location, &table, version, Some(version) == latest).await {
                Ok(()) if table == LAYERS => _ = catalogues.insert(version),
                Ok(()) => {}
                // gc has removed it meanwhile.
                Err(_) if !names_in(location, &table, &[VERSIONS]).await?.contains(file) => {}
                Err(e) => all.push(DamagedMetadata {
                    table: table.clone(),
                    version: Some(version),
                    snapshot: None,
                    file: format!("{}/{VERSIONS}/{file}", location.table_uri(&table)),
                    reason: detail(&e),
                    help: of_table(&table),
                }),
            }
        }
    }
    if let (Some(last), Some(latest)) = (location.last_committed(LAYERS), catalogues.last())
        && last > *latest
        && !all.iter().any(|d| d.table == LAYERS && d.version == Some(last))
    {
        all.push(DamagedMetadata {
            table: LAYERS.into(),
            version: Some(last),
            snapshot: None,
            file: format!("{}/{VERSIONS}", location.table_uri(LAYERS)),
            reason: format!("version {last} was committed, and the latest that is there is {latest}"),
            help: of_table(LAYERS),
        });
    }
    let latest = catalogue::open_newest_readable(location).await?;
    // What is newer than it can be given up for it.
    let newer = |d: &&mut DamagedMetadata| d.table == LAYERS && d.version > Some(latest.version_id());
    for manifest in all.iter_mut().filter(newer).filter(|d| d.file.ends_with(".manifest")) {
        manifest.help.push(Remedy::RollBack);
    }
    for name in tag_names(location).await? {
        let found = match tag(location, &latest, &name).await {
            Ok(version) if catalogues.contains(&version) => continue,
            Ok(version) => (Some(version), format!("it names version {version}, which is not there or cannot be read")),
            Err(Error::Damaged { source: Some(e), .. }) => {
                (None, e.downcast_ref().map_or_else(|| e.to_string(), |e: &lance::Error| reason(e)))
            }
            Err(e) => (None, e.to_string()),
        };
        all.push(DamagedMetadata {
            table: LAYERS.into(),
            version: found.0,
            file: tag_file(location, &name),
            snapshot: Some(name),
            reason: found.1,
            help: vec![Remedy::DeleteSnapshot, Remedy::RestoreFile],
        });
    }
    if let Err(Error::Damaged { message, .. }) = lease::look(location).await {
        all.push(DamagedMetadata {
            table: String::new(),
            version: None,
            snapshot: None,
            file: format!("{}/{}", location.uri(), lease::LEASE),
            reason: message,
            help: vec![Remedy::DeleteFile],
        });
    }
    Ok((all, catalogues))
}

/// What helps where a version of a table cannot be read: all that other tables than the catalogue say can be found again.
fn of_table(table: &str) -> Vec<Remedy> {
    vec![if table == LAYERS { Remedy::RestoreFile } else { Remedy::Repair }]
}

/// Opens a version and looks at what its manifest says; of the latest one also at its indices.
///
/// # Errors
/// When it cannot be read.
pub async fn open(location: &Location, table: &str, version: u64, latest: bool) -> lance::Result<()> {
    let looked = async {
        let dataset = location.open_table(table, Some(version)).await?;
        if dataset.version_id() != version {
            let found = dataset.version_id();
            return Err(lance::Error::corrupt_file_named(
                "of the version",
                format!("it says that it is version {found}"),
            ));
        }
        // What made it: the log reads this of any version.
        dataset.read_version_transaction(version).await?;
        caught(|| {
            dataset.fragments().iter().for_each(|fragment| _ = fragment.num_rows());
            Ok(())
        })?;
        if latest {
            dataset.load_indices().await?;
        }
        Ok(())
    };
    looked.caught().await
}
