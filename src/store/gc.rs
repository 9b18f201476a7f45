//! Removing what no snapshot and no recent version reaches.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::FutureExt;

use super::listing::disk_bytes;
use super::location::Location;
use super::lock::{self, Guard};
use super::place::Place;
use super::survey::{GcReport, survey};
use super::sweep::remove;
use crate::error::Result;

/// How long gc waits for imports to finish before it gives up.
const PATIENCE: Duration = Duration::from_secs(10);

/// Removes what nothing reaches; only counts it unless `apply`. What was replaced no longer than `older_than` ago stays.
///
/// # Errors
/// [`Error::Busy`] when an import does not finish in time; and when the storage refuses.
pub async fn collect(location: &Location, older_than: Duration, apply: bool) -> Result<GcReport> {
    let age = chrono::Duration::from_std(older_than).unwrap_or(chrono::Duration::MAX);
    let cutoff = Utc::now().checked_sub_signed(age).unwrap_or(DateTime::<Utc>::MIN_UTC);
    // A lease makes a version, which a store that has nothing to be removed is spared.
    if apply && matches!(location.place(), Place::Remote) {
        let survey = survey(location, (cutoff, &BTreeSet::new()), false).boxed().await?;
        if survey.finds_nothing() {
            return Ok(GcReport { applied: true, ..survey.report });
        }
    }
    // A dry run only reads, and may be done on a store that cannot be written.
    let mut guards = match apply {
        true => Some((lock::collecting(location, "gc", PATIENCE).await?, lock::committing(location).await?)),
        false => None,
    };
    if let Some((held, _)) = &guards {
        held.fence(location).await?;
    }
    // Versions that an earlier gc has begun to remove.
    let begun = match &guards {
        Some((Guard::Alone { lease }, _)) => lease.condemned().await,
        _ => BTreeSet::new(),
    };
    let survey = survey(location, (cutoff, &begun), apply).await?;
    let Some((held, _)) = &mut guards else { return Ok(survey.report) };
    let before = disk_bytes(location).await;
    let mut report = survey.report.clone();
    remove((location, held), survey).await?;
    report.applied = true;
    report.removed_bytes = before.unwrap_or_default().saturating_sub(disk_bytes(location).await.unwrap_or_default());
    Ok(report)
}
