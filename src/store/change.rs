//! Changes of the catalogue, committed: each is one version.

use std::collections::HashMap;
use std::sync::Arc;

use futures::FutureExt;
use lance::Dataset;

use super::catalogue::writable;
use super::format::{with_foreign, without_missing};
use super::indexing;
use super::location::Location;
use super::lock::Guard;
use super::lookup::indices_of;
use super::properties::{TableVersions, properties};
use super::record::{LayerRecord, layers_batches};
use super::rows::{AddressedRow, all_rows, rows_of};
use super::schema::LAYERS;
use super::strict::{Attempts, is_conflict};
use super::update;
use super::waiting::{Waiting, storage_error};
use crate::error::{Error, Result};

/// What a change of the catalogue puts its records in the place of. It is looked up when the change is committed, in the version
/// that the commit builds on, so that changes of other layers, made meanwhile, stay.
#[derive(Debug, Clone, Copy)]
pub enum Scope<'a> {
    /// All layers of the model.
    Model,
    /// The layer of this name, and those behind it.
    Part(&'a str),
    /// Layers that have the records' names.
    Layers,
    /// Layers that have the records' names, in a store that holds no others.
    Alone,
}

/// Whether a layer is `name`, or behind it, as `block.ffn` is behind `block`.
pub fn is_part(layer: &str, name: &str) -> bool {
    layer.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Returns the error of a store at `uri` that holds another layer than those that it is for.
pub fn not_alone(uri: &str, other: &LayerRecord, (model, layers): (&str, &[&str])) -> Error {
    Error::expected(
        format!("layers in {uri}"),
        format!("layer '{}' of model '{}'", other.layer, other.model),
        format!("none, or layer '{}' of model '{model}' alone", layers.join("', '")),
    )
}

/// What the log says of a version, and what it stands on.
#[derive(Debug, Clone, Copy)]
pub struct Made<'a> {
    /// What made it.
    pub operation: &'a str,
    /// The message that it is committed with.
    pub message: Option<&'a str>,
    /// The versions of the other tables that whoever made it has seen or written.
    pub tables: &'a Seen,
}

/// Versions of the tables beside the catalogue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// Of all tables.
    All(TableVersions),
    /// Of some: the latest version of the catalogue says the others.
    Some(TableVersions),
}

impl Seen {
    /// Nothing was seen.
    pub fn nothing() -> Self {
        Seen::Some(TableVersions::default())
    }

    /// Notes that a table has a version.
    pub fn note(&mut self, table: &str, version: u64) {
        let (Seen::All(tables) | Seen::Some(tables)) = self;
        tables.note(table, version);
    }

    /// Returns what a version that follows the latest is to say; `None` where not all is known.
    pub async fn behind(&self, latest: &Dataset) -> Option<TableVersions> {
        match self {
            Seen::All(tables) => Some(tables.clone()),
            Seen::Some(tables) => Some(TableVersions::said_by(latest).await?.with(tables)),
        }
    }
}

/// Puts `records` in the place of what the catalogue holds of `model` in a scope, in one commit, and returns the version. Nothing is
/// committed where that is so already. The caller holds the lock of commits; `held` is what may be lost, on an object store.
pub async fn replace(
    (location, held): (&Location, &Guard),
    (model, scope): (&str, Scope<'_>),
    records: &[LayerRecord],
    made: Made<'_>,
) -> Result<u64> {
    let new: HashMap<&str, &LayerRecord> = records.iter().map(|r| (r.layer.as_str(), r)).collect();
    let mut attempts = Attempts::begin();
    loop {
        let dataset = Arc::new(writable(location).await?);
        let mut present = match scope {
            Scope::Alone => all_rows(location, &dataset).await?,
            _ => rows_of(location, &dataset, &[model]).await?,
        };
        if let Scope::Alone = scope
            && let Some((_, other)) =
                present.iter().find(|(_, r)| r.model != model || !new.contains_key(r.layer.as_str()))
        {
            let names: Vec<&str> = new.keys().copied().collect();
            return Err(not_alone(location.uri(), other, (model, &names)));
        }
        present.retain(|(_, r)| match scope {
            Scope::Model => true,
            Scope::Part(name) => is_part(&r.layer, name) || new.contains_key(r.layer.as_str()),
            Scope::Layers | Scope::Alone => new.contains_key(r.layer.as_str()),
        });
        let unchanged = present.len() == records.len()
            && present.iter().all(|(_, p)| new.get(p.layer.as_str()).is_some_and(|r| r.same_as(p)));
        if unchanged {
            return Ok(dataset.version_id());
        }
        let operation = format!("{} {model}", made.operation);
        let change = Change { model, records, present: &present, made: Made { operation: &operation, ..made } };
        if let Some(version) = change.commit((location, held), Arc::unwrap_or_clone(dataset), &mut attempts).await? {
            return Ok(version);
        }
    }
}

/// A change of the catalogue's rows.
pub struct Change<'a> {
    /// The model that errors name.
    pub model: &'a str,
    /// Rows that come.
    pub records: &'a [LayerRecord],
    /// Rows that go, of the version that the change is committed on.
    pub present: &'a [AddressedRow],
    /// What is said of the version.
    pub made: Made<'a>,
}

impl Change<'_> {
    /// Commits the change on the version that is open, the latest one, and returns the new version; `None` where another commit came
    /// between, and the change is to be made of the latest version again. `attempts` bounds these. `held` is what was taken before the
    /// version was opened.
    ///
    /// # Errors
    /// When the storage refuses, what is held is held no more, or others commit again and again.
    pub async fn commit(
        self,
        (location, held): (&Location, &Guard),
        latest: Dataset,
        attempts: &mut Attempts,
    ) -> Result<Option<u64>> {
        held.confirm().await?;
        let format = location.format_of(&latest)?;
        let fitted = |batch| {
            let batch = without_missing(batch, (LAYERS, &latest), (location.uri(), format))?;
            with_foreign(batch, (LAYERS, &latest))
        };
        let batches = match self.records {
            [] => vec![],
            records => layers_batches(records)?.into_iter().map(fitted).collect::<Result<Vec<_>>>()?,
        };
        let tables = self.made.tables.behind(&latest).await;
        let said = |operation: &str, message| properties(operation.to_owned(), message, tables.as_ref());
        let properties = said(self.made.operation, self.made.message);
        let limits = location.limits();
        // Boxed: Lance's futures are large.
        let committed = async {
            // Ahead of the change, so that its version is the last one.
            let latest = indexing::keep_up(latest, LAYERS, (limits, said("index", None))).await?;
            let gone: Vec<u64> = self.present.iter().map(|(address, _)| *address).collect();
            update::commit(latest, &gone, batches, (indices_of(LAYERS), limits, properties)).await
        }
        .boxed();
        match committed.caught().await {
            Ok(version) => Ok(Some(version)),
            Err(e) if is_conflict(&e) && attempts.again().await => Ok(None),
            Err(e) => Err(storage_error(format!("committing model '{}'", self.model))(e)),
        }
    }
}
