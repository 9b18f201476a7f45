//! The thread that renews leases: it goes on while the caller's runtime computes, and connections that were made on it stay open when
//! that runtime ends.

use std::io;
use std::sync::{Mutex, PoisonError};

use tokio::runtime::{Builder, Handle};
use tokio::task::JoinHandle;

use crate::error::{Error, Result};
use crate::tasks::unwrap_join;

/// The runtime, and the process that its thread is of: a child that was forked has no such thread.
static KEEPER: Mutex<Option<(u32, Handle)>> = Mutex::new(None);

/// Returns the runtime of the thread.
///
/// # Errors
/// When the system gives no thread.
pub fn keeper() -> Result<Handle> {
    let mut keeper = KEEPER.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    match &*keeper {
        Some((of, handle)) if *of == process => Ok(handle.clone()),
        _ => {
            let handle = begin().map_err(|e| Error::io("a thread that renews leases", e))?;
            *keeper = Some((process, handle.clone()));
            Ok(handle)
        }
    }
}

fn begin() -> io::Result<Handle> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    let thread = std::thread::Builder::new().name("layerstore-leases".into());
    thread.spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    Ok(handle)
}

/// Runs something on the thread, until it ends or the caller gives it up.
///
/// # Errors
/// As the future, and as [`keeper`].
pub async fn on_keeper<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    let mut task = GivenUp(keeper()?.spawn(work));
    unwrap_join((&mut task.0).await)?
}

/// A task that ends when nobody waits for it any more.
struct GivenUp<T>(JoinHandle<T>);

impl<T> Drop for GivenUp<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
