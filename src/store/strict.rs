//! Commits of the version that follows the one which was read, and of no other.
//!
//! Lance moves a commit behind those that came between, where its rules say that they do not touch the same rows. What a change of the
//! catalogue puts its rows in the place of was looked up in one version, and two that insert the same row touch none in common: so such a
//! change is made again of the version that came between. On local stores a lock rules that out already.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use lance::Dataset;
use lance::dataset::CommitBuilder;
use lance::dataset::transaction::Operation;
use lance_io::object_store::ObjectStore;
use lance_table::format::{Fragment, IndexMetadata, Manifest, Transaction};
use lance_table::io::commit::{
    CommitError, CommitHandler, ConditionalPutCommitHandler, ManifestLocation, ManifestNamingScheme, ManifestWriter,
};
use object_store::path::Path;

/// How long attempts at a commit are made.
const PATIENCE: Duration = Duration::from_secs(60);

/// The first pause between two attempts, and the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Commits a version of a table if it is this one. A manifest is put only where there is none of its name.
#[derive(Debug)]
pub struct Exactly(pub u64);

#[async_trait]
impl CommitHandler for Exactly {
    fn is_version_not_found_definitive(&self) -> bool {
        true
    }

    fn propagate_commit_error_after_success(&self) -> bool {
        // What is there is there, also where the answer was lost.
        false
    }

    async fn commit(
        &self,
        manifest: &mut Manifest,
        indices: Option<Vec<IndexMetadata>>,
        base_path: &Path,
        object_store: &ObjectStore,
        manifest_writer: ManifestWriter,
        naming_scheme: ManifestNamingScheme,
        transaction: Option<Transaction>,
    ) -> Result<ManifestLocation, CommitError> {
        if manifest.version != self.0 {
            let between = format!("version {} was committed meanwhile", manifest.version - 1);
            let conflict = lance::Error::retryable_commit_conflict_source(manifest.version, between.into());
            return Err(CommitError::OtherError(conflict));
        }
        ConditionalPutCommitHandler
            .commit(manifest, indices, base_path, object_store, manifest_writer, naming_scheme, transaction)
            .await
    }
}

/// Returns what commits the version that follows `dataset`, which was the latest when it was opened. The dataset that the commit gives
/// commits nothing more: open the table again.
pub fn next_version(dataset: Arc<Dataset>) -> CommitBuilder<'static> {
    let next = dataset.version_id() + 1;
    CommitBuilder::new(dataset)
        .with_skip_auto_cleanup(true)
        .with_commit_handler(Arc::new(Exactly(next)))
        .with_max_retries(1)
}

/// Returns what removes fragments of a table, puts others in the place of those of the same numbers, and adds new ones.
pub fn replacing(removed: Vec<u64>, updated: Vec<Fragment>, new: Vec<Fragment>) -> Operation {
    Operation::Update {
        removed_fragment_ids: removed,
        updated_fragments: updated,
        new_fragments: new,
        fields_modified: vec![],
        compacted_sstables: vec![],
        fields_for_preserving_frag_bitmap: vec![],
        update_mode: None,
        inserted_rows_filter: None,
        updated_fragment_offsets: None,
    }
}

/// Attempts at a commit, each after a longer pause, until it is time to say that others commit again and again.
#[derive(Debug)]
pub struct Attempts {
    begun: Instant,
    pause: Duration,
}

impl Attempts {
    /// Returns attempts of which none was made.
    pub fn begin() -> Self {
        Attempts { begun: Instant::now(), pause: PAUSES.0 }
    }

    /// Waits before the next attempt; `false` where it is time to give up.
    pub async fn again(&mut self) -> bool {
        if self.begun.elapsed() > PATIENCE {
            return false;
        }
        // Of several that wait, one comes first.
        let part = f64::from(self.begun.elapsed().subsec_nanos() % 1024) / 1024.0;
        tokio::time::sleep(self.pause.mul_f64(0.5 + part)).await;
        self.pause = (2 * self.pause).min(PAUSES.1);
        true
    }
}

/// Returns whether an error says that another commit came first.
pub fn is_conflict(e: &lance::Error) -> bool {
    use lance::Error::{CommitConflict, IncompatibleTransaction, RetryableCommitConflict, TooMuchWriteContention};
    matches!(
        e,
        CommitConflict { .. }
            | IncompatibleTransaction { .. }
            | RetryableCommitConflict { .. }
            | TooMuchWriteContention { .. }
    )
}
