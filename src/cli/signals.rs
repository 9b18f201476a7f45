//! Signals that ask a command to end: Ctrl-C stops long work in order, and nothing that ends the process leaves temporary files.

#[cfg(unix)]
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, PoisonError};
#[cfg(unix)]
use std::time::Duration;

use crate::staged;
use crate::work::Cancel;

/// What Ctrl-C asks to stop; nothing before there is such work, or once it was asked.
static WORK: Mutex<Option<Cancel>> = Mutex::new(None);

/// The signal that ends this process once its work has stopped; 0 where none was sent.
#[cfg(unix)]
static ASKED: AtomicI32 = AtomicI32::new(0);

/// How long work may take to stop.
#[cfg(unix)]
const MOMENT: Duration = Duration::from_secs(3);

/// Returns a request to stop that the first Ctrl-C makes, or another signal that ends a process; the second ends it at once.
pub fn cancel_on_interrupt() -> Cancel {
    let cancel = Cancel::new();
    *WORK.lock().unwrap_or_else(PoisonError::into_inner) = Some(cancel.clone());
    cancel
}

/// Asks the work to stop; `false` where there is none, or it was asked before.
fn cancelled() -> bool {
    let work = WORK.lock().unwrap_or_else(PoisonError::into_inner).take();
    work.map(|work| work.cancel()).is_some()
}

/// Listens on a task of its own, for as long as the runtime runs.
#[cfg(unix)]
pub fn listen() {
    use tokio::signal::unix::{SignalKind, signal};

    // A file that may grow no further is an error of the write, which says where; not the end of the process.
    // SAFETY: no handler is set.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    // Asked before anybody listens. Who is told to ignore a hangup (nohup) or Ctrl-C goes on.
    let ignored = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP].map(is_ignored);
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let [interrupt, terminate, hangup] = kinds.map(signal);
    let (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) = (interrupt, terminate, hangup) else { return };
    tokio::spawn(async move {
        loop {
            let (number, ignored) = tokio::select! {
                _ = interrupt.recv() => (libc::SIGINT, ignored[0]),
                _ = terminate.recv() => (libc::SIGTERM, ignored[1]),
                _ = hangup.recv() => (libc::SIGHUP, ignored[2]),
            };
            if number == libc::SIGINT && cancelled() || ignored {
                continue;
            }
            // Work that can stop in order, and remove what it has half written, is given a moment.
            if cancelled() {
                ASKED.store(number, Ordering::SeqCst);
                tokio::spawn(async move {
                    tokio::time::sleep(MOMENT).await;
                    end(number);
                });
                continue;
            }
            end(number);
        }
    });
}

/// Ends the process by the signal that its work was stopped for, where that was one which ends a process; else returns.
#[cfg(unix)]
pub fn end_as_asked() {
    match ASKED.load(Ordering::SeqCst) {
        0 => {}
        number => end(number),
    }
}

#[cfg(unix)]
fn is_ignored(number: libc::c_int) -> bool {
    // SAFETY: sigaction only writes to the struct, of which any bytes are a value.
    let action = unsafe {
        let mut action = std::mem::zeroed::<libc::sigaction>();
        (libc::sigaction(number, std::ptr::null(), &mut action) == 0).then_some(action)
    };
    action.is_some_and(|action| action.sa_sigaction == libc::SIG_IGN)
}

/// Ends the process by a signal, as it would have without a listener: whoever started it sees by what.
#[cfg(unix)]
fn end(number: libc::c_int) -> ! {
    staged::abandon();
    // SAFETY: the default action runs no code of this process.
    unsafe {
        libc::signal(number, libc::SIG_DFL);
        libc::raise(number);
    }
    std::process::exit(128 + number)
}

/// Does nothing: there are no such signals.
#[cfg(not(unix))]
pub fn end_as_asked() {}

/// Listens on a task of its own, for as long as the runtime runs.
#[cfg(not(unix))]
pub fn listen() {
    tokio::spawn(async {
        while tokio::signal::ctrl_c().await.is_ok() {
            if !cancelled() {
                staged::abandon();
                std::process::exit(130);
            }
        }
    });
}
