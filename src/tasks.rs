//! Tasks on other threads.

use tokio::task::JoinError;

use crate::error::{Error, Result};

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
