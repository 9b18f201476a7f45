//! What a writer knows of the artifacts that the store has: those that no index covers at once, the others when somebody asks.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use chrono::Utc;
use serde_json::Value;

use super::agreement::DataTables;
use super::listed::Listed;
use super::record::{ArtifactRecord, ErrorBasis};
use super::row_locations::RowLocations;
use super::shared::Shared;
use crate::error::{Error, Result};
use crate::layer::{ArtifactId, MethodName};
use crate::tasks::unwrap_join;

/// An artifact that the store holds already.
#[derive(Debug, Clone, PartialEq)]
pub struct ArtifactInfo {
    /// Its name.
    pub artifact: ArtifactId,
    /// How it is compressed.
    pub method: MethodName,
    /// The parts' config.
    pub config: Value,
    /// Bytes of its arrays.
    pub stored_bytes: u64,
    /// How far it is from its source, as measured when it was made.
    pub relative_error: Option<f64>,
    /// What the error was measured over.
    pub error_basis: ErrorBasis,
}

/// What a writer knows of an artifact that the store has, or will have with the next flush.
#[derive(Debug, Clone)]
struct Known {
    locations: RowLocations,
    recipe: [u8; 32],
    content: Content,
}

/// Whether what the store has of an artifact is what its name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// Nobody has looked.
    Unknown,
    /// It is, or the writer writes it.
    Sound,
    /// It is not.
    Damaged,
}

/// The artifacts of a store, as a writer sees them.
#[derive(Debug)]
pub struct Inventory {
    shared: Arc<Shared>,
    list: Listed,
    tables: DataTables,
    /// Artifacts that are complete in the store, by recipe.
    recipes: HashMap<[u8; 32], ArtifactInfo>,
    known: HashMap<ArtifactId, Known>,
    /// Artifacts that are listed, and whose rows are not there.
    lost: HashMap<ArtifactId, ArtifactRecord>,
    /// What the index was asked for, which says nothing more.
    asked: (HashSet<ArtifactId>, HashSet<[u8; 32]>),
}

impl Inventory {
    /// Opens the list of artifacts, and reads what no index covers.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn open(shared: &Arc<Shared>) -> Result<Self> {
        let list = Listed::open(&shared.location).await?;
        let rest = list.rest().await?;
        let tables = DataTables::of(&shared.location);
        let mut inventory = Inventory {
            shared: shared.clone(),
            list,
            tables,
            recipes: HashMap::new(),
            known: HashMap::new(),
            lost: HashMap::new(),
            asked: Default::default(),
        };
        inventory.learn(rest).await?;
        Ok(inventory)
    }

    /// Reads the whole list.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn look_at_all(&mut self) -> Result<()> {
        let all = self.list.all().await?;
        self.learn(all).await
    }

    /// Learns from records of the list: of an artifact the first, of a recipe the artifact of the greatest name.
    async fn learn(&mut self, records: Vec<ArtifactRecord>) -> Result<()> {
        let mut first = BTreeMap::new();
        for record in records {
            first.entry(record.artifact).or_insert(record);
        }
        for (id, record) in first {
            if self.known.contains_key(&id) || self.lost.contains_key(&id) {
                continue;
            }
            if self.tables.lack(id, &record.locations, false).await?.is_some() {
                self.lost.insert(id, record);
                continue;
            }
            let (locations, recipe) = (record.locations, record.recipe);
            self.known.insert(id, Known { locations, recipe, content: Content::Unknown });
            let info = ArtifactInfo {
                artifact: id,
                method: record.method,
                config: record.config,
                stored_bytes: record.stored_bytes,
                relative_error: record.relative_error,
                error_basis: record.error_basis,
            };
            if self.recipes.get(&recipe).is_none_or(|other| other.artifact < id) {
                self.recipes.insert(recipe, info);
            }
        }
        Ok(())
    }

    /// Looks an artifact up that nothing is known of yet.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn look_up(&mut self, id: ArtifactId) -> Result<()> {
        if self.known.contains_key(&id) || self.lost.contains_key(&id) || !self.asked.0.insert(id) {
            return Ok(());
        }
        let records = self.list.covered_of_artifact(id).await?;
        self.learn(records).await
    }

    /// Returns the artifact that was made by a recipe, if the store has it.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn made_by(&mut self, recipe: &[u8; 32]) -> Result<Option<&ArtifactInfo>> {
        if self.asked.1.insert(*recipe) {
            let records = self.list.covered_of_recipe(recipe).await?;
            self.learn(records).await?;
        }
        Ok(self.recipes.get(recipe))
    }

    /// Returns whether the store is known to have an artifact, or will have it with the next flush.
    pub fn has(&self, artifact: &ArtifactId) -> bool {
        self.known.contains_key(artifact)
    }

    /// Returns the records of artifacts that are known to be listed, and whose rows are not there.
    pub fn lost(&self) -> &HashMap<ArtifactId, ArtifactRecord> {
        &self.lost
    }

    /// Returns where the rows of an artifact are, or were: of one that the store is known to have, or to have lost.
    pub fn locations(&self, id: &ArtifactId) -> Option<&RowLocations> {
        let lost = || self.lost.get(id).map(|record| &record.locations);
        self.known.get(id).map(|known| &known.locations).or_else(lost)
    }

    /// Notes the artifact that a recipe stands for.
    pub fn note_recipe(&mut self, recipe: [u8; 32], info: ArtifactInfo) {
        self.asked.1.insert(recipe);
        self.recipes.insert(recipe, info);
    }

    /// Notes that the store has an artifact as it was written, or will have it with the next flush, and whether it was not among those
    /// that it has or has lost.
    pub fn note_written(&mut self, id: ArtifactId, recipe: [u8; 32]) -> bool {
        let new = !self.known.contains_key(&id) && self.lost.remove(&id).is_none();
        let known = self.known.entry(id).or_insert(Known {
            locations: RowLocations::default(),
            recipe,
            content: Content::Unknown,
        });
        known.content = Content::Sound;
        new
    }

    /// Notes that the rows of a lost artifact are written once more.
    pub fn note_completed(&mut self, id: ArtifactId, recipe: [u8; 32]) {
        self.known.insert(id, Known { locations: RowLocations::default(), recipe, content: Content::Sound });
    }

    /// Notes what is listed now, and as it was written.
    pub fn note_listed(&mut self, record: ArtifactRecord) {
        let recipe = self.lost.remove(&record.artifact).map_or(record.recipe, |listed| listed.recipe);
        let known = Known { locations: record.locations, recipe, content: Content::Sound };
        self.known.insert(record.artifact, known);
    }

    /// Notes where the rows of an artifact have been moved to.
    pub fn note_moved(&mut self, id: &ArtifactId, locations: RowLocations) {
        if let Some(known) = self.known.get_mut(id) {
            known.locations = locations;
        }
    }

    /// Says that what the store has of an artifact is not what was written.
    pub fn distrust(&mut self, artifact: &ArtifactId) {
        if let Some(known) = self.known.get_mut(artifact) {
            known.content = Content::Damaged;
        }
    }

    /// Returns whether what the store has of an artifact is what its name stands for: read and hashed where nobody has looked.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn is_sound(&mut self, id: ArtifactId) -> Result<bool> {
        self.look_up(id).await?;
        let Some(known) = self.known.get(&id) else { return Ok(false) };
        if known.content != Content::Unknown {
            return Ok(known.content == Content::Sound);
        }
        let record = self.record(id).await?;
        let content = match self.shared.data.parts(&record).await {
            Ok(parts) => match unwrap_join(tokio::task::spawn_blocking(move || parts.id()).await)? == id {
                true => Content::Sound,
                false => Content::Damaged,
            },
            Err(Error::Corrupt { .. }) => Content::Damaged,
            Err(e) => return Err(e),
        };
        if let Some(known) = self.known.get_mut(&id) {
            known.content = content;
        }
        Ok(content == Content::Sound)
    }

    /// Returns the row of an artifact that the store has.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn record(&self, id: ArtifactId) -> Result<ArtifactRecord> {
        let known = self.known.get(&id).map(|known| (known.recipe, known.locations.clone()));
        let stored = known.as_ref().and_then(|(recipe, _)| self.recipes.get(recipe));
        match (known.as_ref(), stored.filter(|stored| stored.artifact == id)) {
            (Some((recipe, locations)), Some(stored)) => Ok(ArtifactRecord {
                artifact: id,
                method: stored.method.clone(),
                config: stored.config.clone(),
                locations: locations.clone(),
                stored_bytes: stored.stored_bytes,
                recipe: *recipe,
                relative_error: stored.relative_error,
                error_basis: stored.error_basis,
                created_at: Utc::now(),
            }),
            // Two artifacts of one recipe.
            _ => self.shared.data.record(id).await,
        }
    }
}
