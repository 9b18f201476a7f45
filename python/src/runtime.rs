//! The process's runtime: how work is run with the interpreter let go, how Ctrl-C stops it, and what a forked process may do.

use std::future::Future;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use layerstore::{Cancel, Error, Result};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use tokio::runtime::{Builder, Runtime};

use crate::errors::{OrRaise, raised};

/// How often long work looks for Ctrl-C.
const LOOK: Duration = Duration::from_millis(50);

static RUNTIME: OnceLock<Runtime> = OnceLock::new();

/// Whether this process is a fork of one whose threads ran: it has none of them.
static ORPHANED: AtomicBool = AtomicBool::new(false);

/// Is called in the child of a fork.
#[pyfunction]
pub fn after_fork() {
    if RUNTIME.get().is_some() {
        ORPHANED.store(true, Ordering::Relaxed);
    }
}

/// Refuses to work in a fork of a process that used the store: the threads that it needs are the parent's.
///
/// # Errors
/// There.
pub fn check_process() -> PyResult<()> {
    if ORPHANED.load(Ordering::Relaxed) {
        return Err(PyRuntimeError::new_err(
            "layerstore was used before this process was forked, and its threads are not in the fork: start workers by 'spawn' or \
             'forkserver' (multiprocessing.set_start_method, or DataLoader(multiprocessing_context=...)), or open the store in the \
             workers alone",
        ));
    }
    Ok(())
}

/// Returns the runtime, started where it is not.
///
/// # Errors
/// In a fork, and where threads cannot be started.
pub fn runtime(py: Python<'_>) -> PyResult<&'static Runtime> {
    check_process()?;
    if let Some(runtime) = RUNTIME.get() {
        return Ok(runtime);
    }
    let made = Builder::new_multi_thread().enable_all().build().map_err(|e| Error::io("the store's runtime", e));
    let made = made.or_raise(py)?;
    Ok(RUNTIME.get_or_init(|| made))
}

/// Runs short work to its end, with the interpreter let go.
///
/// # Errors
/// As the work.
pub fn run<T: Send>(py: Python<'_>, work: impl Future<Output = Result<T>> + Send) -> PyResult<T> {
    let runtime = runtime(py)?;
    py.detach(|| runtime.block_on(work)).or_raise(py)
}

/// Runs short work that computes, with the interpreter let go.
///
/// # Errors
/// As the work.
pub fn compute<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    // So that a fork after this is known as one.
    runtime(py)?;
    py.detach(work).or_raise(py)
}

/// Runs long work on a thread of its own, and asks it by `cancel` to stop when Ctrl-C is pressed.
///
/// # Errors
/// As the work; the interrupt where there was one.
pub fn work<T: Send>(py: Python<'_>, cancel: &Cancel, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    runtime(py)?;
    let (done, interrupt) = py.detach(|| {
        std::thread::scope(|scope| {
            let (tell, told) = channel::<()>();
            let worker = scope.spawn(move || {
                // Dropped at the end, however the work ends.
                let _tell = tell;
                work()
            });
            let mut interrupt = None;
            while told.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                if interrupt.is_none()
                    && let Err(raised) = Python::attach(|py| py.check_signals())
                {
                    cancel.cancel();
                    interrupt = Some(raised);
                }
            }
            (worker.join(), interrupt)
        })
    });
    let done = done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    match (interrupt, done) {
        // What was done is done, but the caller asked to stop.
        (Some(interrupt), _) => Err(interrupt),
        (None, done) => done.map_err(|error| raised(py, &error)),
    }
}

/// Runs long asynchronous work as [`work`] does; where it has no way to be asked to stop, it is dropped.
///
/// # Errors
/// As [`work`].
pub fn work_async<T: Send, F: Future<Output = Result<T>>>(
    py: Python<'_>,
    cancel: &Cancel,
    future: impl FnOnce() -> F + Send,
) -> PyResult<T> {
    let runtime = runtime(py)?;
    work(py, cancel, || runtime.block_on(future()))
}

/// Runs long asynchronous work that cannot be asked to stop: on Ctrl-C it is dropped.
///
/// # Errors
/// As [`work`].
pub fn work_dropped<T: Send, F: Future<Output = Result<T>>>(
    py: Python<'_>,
    future: impl FnOnce() -> F + Send,
) -> PyResult<T> {
    let cancel = Cancel::new();
    let asked = cancel.clone();
    work_async(py, &cancel, move || async move {
        let future = future();
        tokio::select! {
            biased;
            () = asked.cancelled() => Err(Error::Cancelled),
            done = future => done,
        }
    })
}
