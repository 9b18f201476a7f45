//! Sharing work among threads.
//!
//! One team of threads serves the whole process. Its members look out for work for a while before they sleep, so that a model
//! whose layers follow each other within microseconds does not pay for waking them each time.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, OnceLock, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

/// How long a member looks out for work before it sleeps.
const LOOK_OUT: Duration = Duration::from_micros(200);

/// Looks between two of which the processor is offered to other threads.
const LOOKS: usize = 256;

/// Calls `work` with each number below `parts` once, on this thread and on the team's others. Each has a range of numbers that follow
/// each other, so that what it reads does, too; whoever is through with its own takes half of what another has left: what begins late is
/// not waited for. Where the team is at other work, or is this thread's own, this thread does it all.
///
/// # Panics
/// When `work` does.
pub fn share(parts: usize, work: impl Fn(usize) + Sync) {
    let others = rayon::current_num_threads().min(parts).saturating_sub(1);
    // Numbers of parts are 32 bits in a range.
    if others == 0 || u32::try_from(parts).is_err() {
        return (0..parts).for_each(work);
    }
    let team = Team::get();
    if team.taken.swap(true, Ordering::Acquire) {
        return (0..parts).for_each(work);
    }
    team.run(parts, others, &work);
}

/// Returns how many threads share work, this one counted.
pub fn threads() -> usize {
    rayon::current_num_threads()
}

/// Does each part of the work once, as [`share`] does.
pub fn on_all_threads<T: Send>(parts: Vec<T>, work: impl Fn(T) + Sync) {
    let parts: Vec<Mutex<Option<T>>> = parts.into_iter().map(|part| Mutex::new(Some(part))).collect();
    let part = |number: usize| parts[number].lock().unwrap_or_else(PoisonError::into_inner).take();
    share(parts.len(), |number| part(number).into_iter().for_each(&work));
}

/// Calls `work` with each piece of `size` numbers, the last of which may be shorter, and its number: as [`share`] does where it
/// `is_much`, and else on this thread.
///
/// # Panics
/// As [`share`], and when `size` is 0.
pub fn share_chunks<T: Send>(all: &mut [T], size: usize, is_much: bool, work: impl Fn(usize, &mut [T]) + Sync) {
    if !is_much {
        return all.chunks_mut(size).enumerate().for_each(|(number, piece)| work(number, piece));
    }
    struct First<T>(*mut T);
    // SAFETY: each part uses a piece of its own.
    unsafe impl<T: Send> Sync for First<T> {}
    let (length, first) = (all.len(), First(all.as_mut_ptr()));
    share(length.div_ceil(size), |number| {
        let first = &first;
        let start = number * size;
        // SAFETY: within the slice, which is borrowed until all parts are done; pieces do not overlap.
        let piece = unsafe { std::slice::from_raw_parts_mut(first.0.add(start), size.min(length - start)) };
        work(number, piece);
    });
}

/// Numbers from which on [`share_rows`] shares.
const ROWS_SHARED_FROM: usize = 1 << 15;

/// Calls `work` with rows of `width` numbers that follow each other, and the number of the first, on all threads where there are many
/// numbers: for what is quickly done with each.
///
/// # Panics
/// As [`share_chunks`].
pub fn share_rows<T: Send>(all: &mut [T], width: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    let rows = ROWS_SHARED_FROM.div_ceil(8 * width.max(1));
    let is_much = all.len() >= ROWS_SHARED_FROM;
    share_chunks(all, rows * width, is_much, |number, some| work(number * rows, some));
}

/// What is being done: parts of one caller's work.
struct Job {
    /// Lives as long as [`Team::run`], which does not return before all members have left.
    work: *const (dyn Fn(usize) + Sync),
    /// How many may be at it, the caller counted.
    workers: usize,
}

/// Numbers of parts that a thread is to do: the first in the lower half, the one behind the last in the upper one. A line of the cache
/// of its own.
#[derive(Default)]
#[repr(align(64))]
struct PartRange(AtomicU64);

impl PartRange {
    /// Replaces the range.
    fn set(&self, first: u32, end: u32) {
        self.0.store(u64::from(end) << 32 | u64::from(first), Ordering::Relaxed);
    }

    /// Takes what `cut` takes of a range that is not empty: it returns what is left and what is taken.
    fn take(&self, cut: impl Fn(u32, u32) -> [(u32, u32); 2]) -> Option<(u32, u32)> {
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let (first, end) = (seen as u32, (seen >> 32) as u32);
            if first >= end {
                return None;
            }
            let [left, taken] = cut(first, end);
            let now = u64::from(left.1) << 32 | u64::from(left.0);
            // Whoever changed it meanwhile has taken other parts: none is ever there twice, so that a range that looks the same is.
            match self.0.compare_exchange_weak(seen, now, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(taken),
                Err(other) => seen = other,
            }
        }
    }

    /// Takes the first number.
    fn first(&self) -> Option<usize> {
        self.take(|first, end| [(first + 1, end), (first, first + 1)]).map(|(first, _)| first as usize)
    }

    /// Takes the second half, or the last number.
    fn half(&self) -> Option<(u32, u32)> {
        self.take(|first, end| {
            let middle = end - (end - first).div_ceil(2);
            [(first, middle), (middle, end)]
        })
    }
}

struct Team {
    /// Whether a caller has the team.
    taken: AtomicBool,
    /// The caller's job; written while nobody may join.
    job: UnsafeCell<Option<Job>>,
    /// The number of the job in the upper half, then [`OPEN`], then how many more may join and how many are at it, in
    /// [`COUNT`] each.
    state: AtomicU64,
    /// Of the caller, and of each member that joins.
    ranges: Vec<PartRange>,
    /// What a member's panic said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    members: OnceLock<Vec<Member>>,
}

struct Member {
    thread: Thread,
    asleep: &'static AtomicBool,
}

// SAFETY: the job is written by whoever has taken the team, while the state is not open and nobody is at it; it is read by those
// that have joined an open state.
unsafe impl Sync for Team {}
// SAFETY: the pointer in a job is used by those that have joined alone.
unsafe impl Send for Team {}

/// The job may be joined.
const OPEN: u64 = 1 << 31;
/// One more may join.
const ROOM: u64 = 1 << 15;
/// Members that are at the job.
const COUNT: u64 = ROOM - 1;

impl Team {
    fn get() -> &'static Team {
        static TEAM: LazyLock<&'static Team> = LazyLock::new(|| {
            let others = thread::available_parallelism().map_or(1, |n| n.get()).max(rayon::current_num_threads()) - 1;
            let others = others.min(COUNT as usize);
            let team: &'static Team = Box::leak(Box::new(Team {
                taken: AtomicBool::new(false),
                job: UnsafeCell::new(None),
                state: AtomicU64::new(0),
                ranges: (0..=others).map(|_| PartRange::default()).collect(),
                panic: Mutex::new(None),
                members: OnceLock::new(),
            }));
            // A thread that cannot be had is done without.
            let members = (0..others).map_while(|number| {
                let asleep: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
                let builder = thread::Builder::new().name(format!("layerstore-{number}"));
                let spawned = builder.spawn(move || team.serve(asleep)).ok()?;
                Some(Member { thread: spawned.thread().clone(), asleep })
            });
            let members: Vec<Member> = members.collect();
            team.members.get_or_init(|| members);
            team
        });
        *TEAM
    }

    /// For the caller that has taken the team.
    fn run<'a>(&self, parts: usize, others: usize, work: &'a (dyn Fn(usize) + Sync + 'a)) {
        // SAFETY: only the lifetime is another; `left` waits for all who use it, also while a panic unwinds.
        let work_forever: *const (dyn Fn(usize) + Sync) =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + 'a), _>(work) };
        let members = self.members.get().map_or(&[][..], Vec::as_slice);
        let others = others.min(members.len());
        let workers = others + 1;
        // SAFETY: this thread has taken the team, and nobody is at a job.
        unsafe { *self.job.get() = Some(Job { work: work_forever, workers }) };
        for (worker, range) in self.ranges[..workers].iter().enumerate() {
            range.set((worker * parts / workers) as u32, ((worker + 1) * parts / workers) as u32);
        }
        let number = (self.state.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        let room = others as u64 * ROOM;
        self.state.store(number << 32 | OPEN | room, Ordering::SeqCst);
        let left = Left(self);
        for member in members.iter().take(others) {
            if member.asleep.swap(false, Ordering::SeqCst) {
                member.thread.unpark();
            }
        }
        self.take_parts(0, workers, work);
        drop(left);
        self.taken.store(false, Ordering::Release);
    }

    /// Does the parts of a range, and then those that others have left.
    fn take_parts(&self, own: usize, workers: usize, work: &(dyn Fn(usize) + Sync)) {
        let _sharing = Sharing::begin();
        loop {
            while let Some(part) = self.ranges[own].first() {
                work(part);
            }
            let Some((first, end)) = (1..workers).find_map(|step| self.ranges[(own + step) % workers].half()) else {
                return;
            };
            self.ranges[own].set(first, end);
        }
    }

    /// Leaves no part to be begun.
    fn clear(&self) {
        self.ranges.iter().for_each(|range| range.set(0, 0));
    }

    /// What a member does all its life.
    fn serve(&self, asleep: &AtomicBool) {
        let (mut last, mut since, mut looks) = (0, Instant::now(), 0usize);
        loop {
            let state = self.state.load(Ordering::SeqCst);
            let number = state >> 32;
            if number != last && state & OPEN != 0 && state & (OPEN - 1) >= ROOM {
                let joined = state - ROOM + 1;
                if self.state.compare_exchange(state, joined, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                    continue;
                }
                last = number;
                // SAFETY: the job was written before the state was opened, and stays until this one has left.
                if let Some(Job { work, workers }) = unsafe { &*self.job.get() } {
                    // SAFETY: as above.
                    let work = unsafe { &**work };
                    // As many as have joined so far, this one counted.
                    let own = workers - ((state & (OPEN - 1)) / ROOM) as usize;
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.take_parts(own, *workers, work))) {
                        // The others need not go on.
                        self.clear();
                        *self.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
                    }
                }
                self.state.fetch_sub(1, Ordering::AcqRel);
                (since, looks) = (Instant::now(), 0);
                continue;
            }
            looks += 1;
            spin_loop();
            if looks.is_multiple_of(LOOKS) {
                thread::yield_now();
                if since.elapsed() >= LOOK_OUT {
                    asleep.store(true, Ordering::SeqCst);
                    // A job that has come since then is not slept through: whoever opened it has not seen this one asleep.
                    if self.state.load(Ordering::SeqCst) >> 32 == number {
                        thread::park();
                    }
                    asleep.store(false, Ordering::SeqCst);
                    (since, looks) = (Instant::now(), 0);
                }
            }
        }
    }
}

thread_local! {
    /// Whether this thread is at a part of shared work.
    static SHARING: Cell<bool> = const { Cell::new(false) };
}

/// Returns whether this thread is at a part of shared work: the other threads have theirs.
pub(super) fn is_sharing() -> bool {
    SHARING.get()
}

/// Marks this thread until it is dropped.
struct Sharing;

impl Sharing {
    fn begin() -> Self {
        SHARING.set(true);
        Sharing
    }
}

impl Drop for Sharing {
    fn drop(&mut self) {
        SHARING.set(false);
    }
}

/// Closes a job when it is dropped, and waits for those that are at it.
struct Left<'a>(&'a Team);

impl Drop for Left<'_> {
    fn drop(&mut self) {
        let team = self.0;
        if thread::panicking() {
            team.clear();
        }
        team.state.fetch_and(!(OPEN | (OPEN - 1) & !COUNT), Ordering::AcqRel);
        let mut looks = 0usize;
        while team.state.load(Ordering::Acquire) & COUNT != 0 {
            looks += 1;
            spin_loop();
            if looks.is_multiple_of(LOOKS) {
                thread::yield_now();
            }
        }
        // SAFETY: nobody is at the job any more.
        unsafe { *team.job.get() = None };
        let panic = team.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread::panicking() {
            team.taken.store(false, Ordering::Release);
        } else if let Some(panic) = panic {
            team.taken.store(false, Ordering::Release);
            resume_unwind(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

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

    /// Callers at once, work within work, and pauses in which members fall asleep.
    #[test]
    fn callers_may_come_at_any_time() {
        thread::scope(|scope| {
            for caller in 0..4 {
                scope.spawn(move || {
                    for round in 0..300usize {
                        let (sum, parts) = (AtomicUsize::new(0), 1 + (round * 7 + caller) % 23);
                        share(parts, |part| {
                            share(3, |inner| {
                                sum.fetch_add(part * 3 + inner, Ordering::Relaxed);
                            });
                        });
                        let all = 3 * parts;
                        assert_eq!(sum.into_inner(), all * (all - 1) / 2);
                        if round % 60 == 0 {
                            thread::sleep(Duration::from_millis(1));
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_goes_on() {
        for wrong in [0, 3, 7] {
            let caught = catch_unwind(|| {
                share(8, |part| assert_ne!(part, wrong, "part {wrong}"));
            });
            assert!(caught.is_err());
            let done = AtomicUsize::new(0);
            share(8, |_| {
                done.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(done.into_inner(), 8);
        }
    }
}
