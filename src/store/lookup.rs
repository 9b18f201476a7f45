//! Rows of a table found by a value: through Lance's B-tree where the table has one, so that no column is read whole.
//!
//! An index belongs to a version of its table, with the fragments that it covers: a version finds its rows through its own. Fragments
//! that came later are read.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::future::join_all;
use lance::Dataset;
use lance::dataset::fragment::FileFragment;
use lance::deps::datafusion::scalar::ScalarValue;
use lance::index::{DatasetIndexExt, DatasetIndexInternalExt};
use lance::table::format::Fragment;
use lance_index::metrics::NoOpMetricsCollector;
use lance_index::scalar::{SargableQuery, ScalarIndex, SearchResult};

use super::schema::{ARTIFACTS, LAYERS};
use super::waiting::{Waiting, is_refused};

/// A column that rows are looked up by, and the name of its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Indexed {
    /// The column.
    pub column: &'static str,
    /// The index.
    pub index: &'static str,
}

/// Rows of the catalogue, by their model.
pub const BY_MODEL: Indexed = Indexed { column: "model", index: "layers_model" };

/// Rows of the list of artifacts, by their name.
pub const BY_ARTIFACT: Indexed = Indexed { column: "artifact", index: "artifacts_artifact" };

/// Rows of the list of artifacts, by what they were made from.
pub const BY_RECIPE: Indexed = Indexed { column: "recipe", index: "artifacts_recipe" };

/// The indices of a table.
pub fn indices_of(table: &str) -> &'static [Indexed] {
    match table {
        LAYERS => &[BY_MODEL],
        ARTIFACTS => &[BY_ARTIFACT, BY_RECIPE],
        _ => &[],
    }
}

/// An index of one version of a table.
pub struct Lookup {
    dataset: Arc<Dataset>,
    segments: Vec<Segment>,
    rest: Vec<Fragment>,
    unreadable: usize,
}

/// A part of an index, with the fragments that it covers and that the version has.
struct Segment {
    index: Arc<dyn ScalarIndex>,
    fragments: BTreeSet<u32>,
}

impl std::fmt::Debug for Lookup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lookup").field("segments", &self.segments.len()).field("rest", &self.rest.len()).finish()
    }
}

/// What an index says of a value.
#[derive(Debug, Default)]
pub struct Hits {
    /// The addresses of the rows that have it, in the order of the table.
    pub addresses: Vec<u64>,
    /// Fragments that are covered by a part of the index that cannot be read.
    pub unread: Vec<Fragment>,
}

impl Lookup {
    /// Opens the index of a version. What covers nothing, or cannot be read, leaves its fragments to be read.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn open(dataset: &Arc<Dataset>, indexed: Indexed) -> lance::Result<Self> {
        let (mut segments, mut unreadable) = (vec![], 0);
        let mut covered: BTreeSet<u32> = BTreeSet::new();
        let parts = dataset.load_indices_by_name(indexed.index).await?;
        let opened = parts.iter().filter_map(|metadata| {
            let fragments: BTreeSet<u32> =
                metadata.effective_fragment_bitmap(dataset.fragment_bitmap())?.iter().collect();
            let opened = dataset.open_scalar_index(indexed.column, &metadata.uuid, &NoOpMetricsCollector);
            Some(async { (opened.caught().await, fragments) })
        });
        for (index, fragments) in join_all(opened).await {
            match index {
                Ok(index) => {
                    covered.extend(&fragments);
                    segments.push(Segment { index, fragments });
                }
                Err(e) if is_refused(&e) => return Err(e),
                Err(_) => unreadable += 1,
            }
        }
        let rest = dataset.fragments().iter().filter(|fragment| !covered.contains(&(fragment.id as u32)));
        Ok(Lookup { rest: rest.cloned().collect(), dataset: dataset.clone(), segments, unreadable })
    }

    /// Returns how many parts of the index cannot be read.
    pub fn unreadable(&self) -> usize {
        self.unreadable
    }

    /// Returns the fragments that the index does not cover, in the order of the table.
    pub fn rest(&self) -> &[Fragment] {
        &self.rest
    }

    /// Looks a value up in all that the index covers.
    ///
    /// # Errors
    /// When the storage refuses.
    pub async fn hits(&self, value: ScalarValue) -> lance::Result<Hits> {
        let query = SargableQuery::Equals(value);
        let mut hits = Hits::default();
        let searched = self.segments.iter().map(async |segment| {
            let searched = async { segment.index.search(&query, &NoOpMetricsCollector).await.map(addresses) };
            (searched.caught().await, segment)
        });
        for (found, segment) in join_all(searched).await {
            match found {
                Ok(Some(addresses)) => {
                    let covered = |address: &u64| segment.fragments.contains(&((address >> 32) as u32));
                    hits.addresses.extend(addresses.into_iter().filter(covered));
                }
                Err(e) if is_refused(&e) => return Err(e),
                Ok(None) | Err(_) => {
                    let fragments = self.dataset.fragments().iter();
                    let unread = fragments.filter(|fragment| segment.fragments.contains(&(fragment.id as u32)));
                    hits.unread.extend(unread.cloned());
                }
            }
        }
        hits.addresses.sort_unstable();
        self.drop_deleted(&mut hits.addresses).await?;
        Ok(hits)
    }

    /// Leaves out rows that the version has deleted.
    async fn drop_deleted(&self, addresses: &mut Vec<u64>) -> lance::Result<()> {
        let fragments: BTreeSet<u64> = addresses.iter().map(|address| address >> 32).collect();
        for fragment in
            self.dataset.fragments().iter().filter(|f| fragments.contains(&f.id) && f.deletion_file.is_some())
        {
            let fragment = FileFragment::new(self.dataset.clone(), fragment.clone());
            if let Some(deleted) = fragment.get_deletion_vector().await? {
                addresses
                    .retain(|address| (address >> 32) as usize != fragment.id() || !deleted.contains(*address as u32));
            }
        }
        Ok(())
    }
}

/// The addresses of a search's rows; `None` where it names whole fragments.
fn addresses(found: SearchResult) -> Option<Vec<u64>> {
    let rows = found.row_addrs().true_rows();
    Some(rows.row_addrs()?.map(u64::from).collect())
}
