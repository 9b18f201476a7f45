//! Sharing work among threads.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a thread looks out for the others before it sleeps.
const LOOK_OUT: Duration = Duration::from_micros(30);

/// Runs `work` on one of rayon's threads: what it shares with the others from there on needs no waking of this one.
pub fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    if rayon::current_thread_index().is_some() { work() } else { rayon::scope(|_| work()) }
}

/// Does each part of the work once, on this thread and all others of rayon's pool.
///
/// This one begins at once, and whichever is free takes the next part: what begins late is not waited for. For about as
/// long as a part takes, it looks out for the end of the others' last ones: being woken takes longer.
pub fn on_all_threads<T: Send>(parts: Vec<T>, work: impl Fn(T) + Sync) {
    let others = rayon::current_num_threads().min(parts.len()).saturating_sub(1);
    let parts = Mutex::new(parts.into_iter());
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || {
        while let Some(part) = next() {
            work(part);
        }
    };
    let busy = AtomicUsize::new(others);
    rayon::in_place_scope(|scope| {
        for _ in 0..others {
            scope.spawn(|_| {
                run();
                busy.fetch_sub(1, Ordering::Release);
            });
        }
        run();
        let since = Instant::now();
        while busy.load(Ordering::Acquire) > 0 && since.elapsed() < LOOK_OUT {
            spin_loop();
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_part_is_done_once() {
        for count in [0, 1, 5, 1000] {
            let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            on_all_threads(done.iter().collect(), |part| {
                part.fetch_add(1, Ordering::Relaxed);
            });
            assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1));
        }
    }
}
