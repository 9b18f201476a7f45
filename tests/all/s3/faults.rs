//! What the server does wrong when it is told to: faults, and gates that hold requests.

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::http::Request;

/// Objects by what their keys say that they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A table's version.
    Manifest,
    /// A file of a table's rows.
    Data,
    /// A snapshot's name.
    Tag,
    /// The lease of a store.
    Lease,
    /// What says that a writer is at work.
    Writer,
    /// A key that contains this text.
    With(String),
    /// Any key.
    Any,
}

impl Kind {
    fn is(&self, key: &str) -> bool {
        match self {
            Kind::Manifest => key.contains("/_versions/"),
            Kind::Data => key.contains("/data/"),
            Kind::Tag => key.contains("/_refs/tags/"),
            Kind::Lease => key.ends_with("layerstore.lease.json"),
            Kind::Writer => key.contains("layerstore.writers/"),
            Kind::With(text) => key.contains(text.as_str()),
            Kind::Any => true,
        }
    }
}

/// The requests that a fault or a gate is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum On {
    /// What writes objects and parts of uploads: `PUT`, copies too.
    Put(Kind),
    /// The beginning of an upload in parts.
    Begin(Kind),
    /// The end of an upload in parts, which makes the object.
    Complete(Kind),
    /// What reads objects: `GET` and `HEAD`.
    Get(Kind),
    /// What lists keys.
    List,
    /// What deletes objects, one or many, and what ends an upload without an object.
    Delete,
    /// What changes objects or uploads: any `PUT`, `POST` or `DELETE`.
    Change,
    /// Any request.
    Any,
}

impl On {
    /// Returns whether a request is one of these.
    pub(super) fn is(&self, request: &Request) -> bool {
        let (method, key) = (request.method.as_str(), request.key.as_str());
        match self {
            On::Put(kind) => method == "PUT" && kind.is(key),
            On::Begin(kind) => method == "POST" && request.parameter("uploads").is_some() && kind.is(key),
            On::Complete(kind) => method == "POST" && request.parameter("uploadId").is_some() && kind.is(key),
            On::Get(kind) => (method == "GET" || method == "HEAD") && !key.is_empty() && kind.is(key),
            On::List => method == "GET" && key.is_empty(),
            On::Delete => method == "DELETE" || (method == "POST" && request.parameter("delete").is_some()),
            On::Change => method != "GET" && method != "HEAD",
            On::Any => true,
        }
    }
}

/// Which of the matching requests a fault meets.
#[derive(Debug, Clone, Copy)]
pub enum Nth {
    /// The first so many.
    First(u64),
    /// The one with this number, from 1.
    Only(u64),
    /// Each one whose number, from 1, this divides.
    Every(u64),
    /// Those that a generator chooses from this seed, with this probability.
    Chance(u64, f64),
}

impl Nth {
    fn meets(self, number: u64) -> bool {
        match self {
            Nth::First(count) => number <= count,
            Nth::Only(one) => number == one,
            Nth::Every(step) => number.is_multiple_of(step),
            Nth::Chance(seed, probability) => {
                // SplitMix64 of the seed and the number.
                let mut x = seed.wrapping_add(number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                ((x ^ (x >> 31)) >> 11) as f64 / ((1_u64 << 53) as f64) < probability
            }
        }
    }
}

/// What happens to a request that a fault meets.
#[derive(Debug, Clone, Copy)]
pub enum Act {
    /// It is answered with this status and not carried out.
    Answer(u16),
    /// It is carried out and answered with this status.
    AnswerAfterApplying(u16),
    /// It is carried out after this time, and answered.
    Late(Duration),
    /// It is carried out, and answered after this time.
    LateAnswer(Duration),
    /// The connection is closed, and nothing is carried out.
    DieBefore,
    /// It is carried out, and the connection is closed without an answer.
    DieAfter,
    /// The connection is closed, and it is carried out after this time.
    ApplyLater(Duration),
    /// So many bytes of the body are sent, and the connection is closed.
    CutBody(u64),
    /// So many bytes of the body are sent in a second.
    Trickle(u64),
}

/// One fault.
#[derive(Debug, Clone)]
pub struct Fault {
    /// The requests.
    pub on: On,
    /// Which of them.
    pub nth: Nth,
    /// What happens to them.
    pub act: Act,
}

/// The faults that are set, with how many requests each has seen.
#[derive(Debug, Default)]
pub struct Faults {
    all: Vec<(Fault, u64)>,
    met: u64,
}

impl Faults {
    /// Returns these faults, of which none has seen a request.
    pub fn new(faults: Vec<Fault>) -> Self {
        Faults { all: faults.into_iter().map(|fault| (fault, 0)).collect(), met: 0 }
    }

    /// Returns what is to happen to a request: what the first fault says that meets it.
    pub fn meet(&mut self, request: &Request) -> Option<Act> {
        let mut act = None;
        for (fault, seen) in &mut self.all {
            if fault.on.is(request) {
                *seen += 1;
                act = act.or_else(|| fault.nth.meets(*seen).then_some(fault.act));
            }
        }
        self.met += u64::from(act.is_some());
        act
    }

    /// Returns how many requests one of them has met.
    pub fn met(&self) -> u64 {
        self.met
    }
}

/// Holds requests before they are carried out, until it is released or dropped.
#[derive(Debug)]
pub struct Gate(Arc<Hold>);

/// The server's side of a gate.
#[derive(Debug)]
pub struct Hold {
    on: On,
    /// The one request that is held, from 1; all where it is `None`.
    only: Option<usize>,
    state: Mutex<Holding>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Holding {
    /// How many requests are held.
    held: usize,
    /// How many came.
    came: usize,
    is_open: bool,
}

impl Gate {
    /// Returns a gate for such requests, and the server's side of it.
    pub(super) fn new(on: On, only: Option<usize>) -> (Self, Arc<Hold>) {
        let hold = Arc::new(Hold { on, only, state: Mutex::default(), changed: Condvar::new() });
        (Gate(hold.clone()), hold)
    }

    /// Returns how many requests are held.
    pub fn held(&self) -> usize {
        self.0.state.lock().unwrap().held
    }

    /// Waits until so many requests are held.
    ///
    /// # Panics
    /// When that takes more than 30 s.
    pub fn wait_for(&self, count: usize) {
        let state = self.0.state.lock().unwrap();
        let most = Duration::from_secs(30);
        let (state, waited) = self.0.changed.wait_timeout_while(state, most, |state| state.held < count).unwrap();
        assert!(!waited.timed_out(), "{} of {count} requests came: {:?}", state.held, self.0.on);
    }

    /// Lets the held requests go on, and all that come.
    pub fn release(self) {}
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().is_open = true;
        self.0.changed.notify_all();
    }
}

impl Hold {
    /// Holds a request until the gate is open, if it is for such requests.
    pub fn pass(&self, request: &Request) {
        if !self.on.is(request) {
            return;
        }
        let mut state = self.state.lock().unwrap();
        state.came += 1;
        if self.only.is_some_and(|only| only != state.came) {
            return;
        }
        state.held += 1;
        self.changed.notify_all();
        let mut state = self.changed.wait_while(state, |state| !state.is_open).unwrap();
        state.held -= 1;
    }

    /// Returns whether the gate is open.
    pub fn is_open(&self) -> bool {
        self.state.lock().unwrap().is_open
    }
}
