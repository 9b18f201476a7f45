//! Sharing work among threads.

use std::sync::{Mutex, PoisonError};

/// Runs `work` on one of rayon's threads: what it shares with the others from there on needs no waking of this one.
pub fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    if rayon::current_thread_index().is_some() { work() } else { rayon::scope(|_| work()) }
}

/// Both, side by side where this is one of rayon's threads.
pub fn both<A: Send, B: Send>(a: impl FnOnce() -> A + Send, b: impl FnOnce() -> B + Send) -> (A, B) {
    if rayon::current_thread_index().is_some() { rayon::join(a, b) } else { (a(), b()) }
}

/// Does each part of the work once, on this thread and all others of rayon's pool.
///
/// This one begins at once, and whichever is free takes the next part: what begins late is not waited for.
pub fn on_all_threads<T: Send>(parts: Vec<T>, work: impl Fn(T) + Sync) {
    let others = rayon::current_num_threads().min(parts.len()).saturating_sub(1);
    let parts = Mutex::new(parts.into_iter());
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || {
        while let Some(part) = next() {
            work(part);
        }
    };
    rayon::in_place_scope(|scope| {
        for _ in 0..others {
            scope.spawn(|_| run());
        }
        run();
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

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
