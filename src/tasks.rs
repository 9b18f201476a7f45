//! Tasks on other threads.

use tokio::task::JoinError;

use crate::error::{Error, Result};
use crate::work::Cancel;

/// Returns what a task gave; a panic in it goes on here.
///
/// # Errors
/// [`Error::Cancelled`] when its runtime ended before it did.
pub(crate) fn unwrap_join<T>(done: std::result::Result<T, JoinError>) -> Result<T> {
    match done {
        Ok(value) => Ok(value),
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        Err(_) => Err(Error::Cancelled),
    }
}

/// Runs blocking work, and stops waiting for it when somebody asks.
pub(crate) async fn unless_cancelled<T: Send + 'static>(
    cancel: &Cancel,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    if cancel.is_cancelled() {
        return Err(Error::Cancelled);
    }
    tokio::select! {
        done = tokio::task::spawn_blocking(work) => unwrap_join(done)?,
        () = cancel.cancelled() => Err(Error::Cancelled),
    }
}
