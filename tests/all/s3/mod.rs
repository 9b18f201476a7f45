//! An S3 server for tests, in this process and in memory.
//!
//! One thread a connection and no runtime: it outlives the runtimes of single tests, and serves child processes. It answers what
//! object_store asks, and can be told to answer wrongly, late or not at all. Any bucket is there.

mod faults;
mod http;
mod objects;

use std::collections::BTreeMap;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub use faults::{Act, Fault, Gate, Kind, Nth, On};

use faults::{Faults, Hold};
use http::{Answer, Connection, Pace, Request};
use objects::Objects;

/// The name of the only key that the server knows.
pub const KEY_ID: &str = "layerstore-test-key";

/// The secret of that key. It never travels, and the server checks no signature.
pub const SECRET: &str = "layerstore-test-secret";

/// A request as the log has it.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The method.
    pub method: String,
    /// The bucket and the key, with a slash between; the bucket alone for requests to it.
    pub key: String,
    /// The query's pairs.
    pub query: Vec<(String, String)>,
    /// The range that was asked for.
    pub range: Option<String>,
    /// When all of it had come.
    pub arrived: Instant,
    /// When the answer began, or the connection was closed instead; none while that is to come.
    pub answered: Option<Instant>,
    /// The answer's status; 0 for none.
    pub status: u16,
    /// How many bytes its body had.
    pub body: u64,
    /// How many bytes the answer's body had.
    pub sent: u64,
    /// The number of the connection.
    pub connection: usize,
}

#[derive(Debug)]
struct State {
    objects: Mutex<Objects>,
    faults: Mutex<Faults>,
    gates: Mutex<Vec<Arc<Hold>>>,
    settings: Mutex<Settings>,
    log: Mutex<Log>,
    connections: AtomicUsize,
}

#[derive(Debug, Clone, Copy)]
struct Settings {
    latency: Duration,
    page: usize,
}

#[derive(Debug, Default)]
struct Log {
    seen: Vec<Seen>,
    heads: Vec<u8>,
    /// How many entries were cleared away: entries are known by their numbers from the start.
    cleared: usize,
}

/// The server. It runs until the process ends.
#[derive(Debug, Clone)]
pub struct Server {
    /// The address, as `http://127.0.0.1:PORT`.
    pub endpoint: String,
    state: Arc<State>,
}

impl Server {
    /// Starts a server on a free port.
    pub fn start() -> Self {
        Server::start_at(0)
    }

    /// Starts a server on this port; 0 stands for a free one.
    ///
    /// # Panics
    /// When the port is not free.
    pub fn start_at(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let settings = Settings { latency: Duration::ZERO, page: 1000 };
        let state = State {
            objects: Mutex::default(),
            faults: Mutex::default(),
            gates: Mutex::default(),
            settings: Mutex::new(settings),
            log: Mutex::default(),
            connections: AtomicUsize::new(0),
        };
        let server = Server { endpoint, state: Arc::new(state) };
        let state = server.state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = state.clone();
                std::thread::spawn(move || state.serve(stream));
            }
        });
        server
    }

    /// Returns the settings that a client needs, by the names of the environment.
    pub fn environment(&self) -> [(&'static str, String); 4] {
        [
            ("AWS_ENDPOINT_URL", self.endpoint.clone()),
            ("AWS_ACCESS_KEY_ID", KEY_ID.into()),
            ("AWS_SECRET_ACCESS_KEY", SECRET.into()),
            ("AWS_REGION", "us-east-1".into()),
        ]
    }

    /// Sets the faults, in the place of those that are set.
    pub fn faults(&self, faults: Vec<Fault>) {
        *self.state.faults.lock().unwrap() = Faults::new(faults);
    }

    /// Returns how many requests have met one of the faults that are set.
    pub fn met(&self) -> u64 {
        self.state.faults.lock().unwrap().met()
    }

    /// Sets how long each request takes at least.
    pub fn latency(&self, each: Duration) {
        self.state.settings.lock().unwrap().latency = each;
    }

    /// Sets how many keys a page of a listing has at most.
    pub fn page(&self, keys: usize) {
        self.state.settings.lock().unwrap().page = keys;
    }

    /// Holds such requests before they are carried out, until the gate is released or dropped.
    pub fn pause(&self, on: On) -> Gate {
        self.hold(on, None)
    }

    /// Holds the one of such requests that has this number, from 1, until the gate is released or dropped.
    pub fn pause_only(&self, on: On, number: usize) -> Gate {
        self.hold(on, Some(number))
    }

    fn hold(&self, on: On, only: Option<usize>) -> Gate {
        let (gate, hold) = Gate::new(on, only);
        let mut gates = self.state.gates.lock().unwrap();
        gates.retain(|hold| !hold.is_open());
        gates.push(hold);
        gate
    }

    /// Returns the requests that came since the log was cleared, in their order.
    pub fn log(&self) -> Vec<Seen> {
        self.state.log.lock().unwrap().seen.clone()
    }

    /// Clears the log; the heads stay.
    pub fn clear_log(&self) {
        let mut log = self.state.log.lock().unwrap();
        log.cleared += log.seen.len();
        log.seen.clear();
    }

    /// Returns the heads of all requests since the start, as they came.
    pub fn heads(&self) -> Vec<u8> {
        self.state.log.lock().unwrap().heads.clone()
    }

    /// Returns how many requests of the log had to wait for one another.
    pub fn round_trips(&self) -> usize {
        round_trips(&self.log())
    }

    /// Returns the contents of all objects, by `bucket/key`.
    pub fn objects(&self) -> BTreeMap<String, Arc<Vec<u8>>> {
        let objects = self.state.objects.lock().unwrap();
        objects.all.iter().map(|(key, object)| (key.clone(), object.bytes.clone())).collect()
    }

    /// Puts an object at `bucket/key`, or removes the one that is there.
    pub fn set(&self, key: &str, bytes: Option<Vec<u8>>) {
        let object = bytes.map(|bytes| objects::object(Arc::new(bytes)));
        let mut objects = self.state.objects.lock().unwrap();
        match object {
            Some(object) => objects.all.insert(key.to_owned(), object),
            None => objects.all.remove(key),
        };
    }

    /// Makes the objects whose `bucket/key` begins so older than they are.
    pub fn age(&self, prefix: &str, by: Duration) {
        let by = chrono::TimeDelta::from_std(by).unwrap();
        let mut objects = self.state.objects.lock().unwrap();
        for (_, object) in objects.all.iter_mut().filter(|(key, _)| key.starts_with(prefix)) {
            object.modified -= by;
        }
    }

    /// Returns how many uploads in parts are neither completed nor aborted.
    pub fn unfinished_uploads(&self) -> usize {
        self.state.objects.lock().unwrap().uploads.len()
    }
}

/// Returns how many of these requests had to wait for one another: the greatest number of which no two were under way at one time.
pub fn round_trips(seen: &[Seen]) -> usize {
    let mut times: Vec<_> = seen.iter().filter_map(|seen| Some((seen.answered?, seen.arrived))).collect();
    times.sort();
    let (mut count, mut free) = (0, None);
    for (answered, arrived) in times {
        if free.is_none_or(|free| arrived >= free) {
            (count, free) = (count + 1, Some(answered));
        }
    }
    count
}

impl State {
    /// Serves a connection until it ends.
    fn serve(self: Arc<Self>, stream: TcpStream) {
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        let _ = stream.set_nodelay(true);
        let mut connection = Connection::new(stream);
        while let Ok(Some(request)) = connection.request() {
            if !self.answer(&mut connection, request, number) {
                return;
            }
        }
    }

    /// Answers a request, and returns whether the connection goes on.
    fn answer(self: &Arc<Self>, connection: &mut Connection, request: Request, number: usize) -> bool {
        let entry = self.note(&request, number);
        let head = request.method == "HEAD";
        let known = format!("AWS4-HMAC-SHA256 Credential={KEY_ID}/");
        let (answer, pace) = if !request.header("authorization").is_some_and(|value| value.starts_with(&known)) {
            (Some(Answer::error(403)), Pace::Whole)
        } else {
            let gates = self.gates.lock().unwrap().clone();
            gates.iter().for_each(|gate| gate.pass(&request));
            self.disturbed(request)
        };
        let answer = answer.map(|answer| Answer { without_body: head, ..answer });
        {
            let mut log = self.log.lock().unwrap();
            let at = entry.checked_sub(log.cleared);
            if let Some(seen) = at.and_then(|at| log.seen.get_mut(at)) {
                seen.answered = Some(Instant::now());
                seen.status = answer.as_ref().map_or(0, |answer| answer.status);
                seen.sent = answer.as_ref().filter(|_| !head).map_or(0, |answer| answer.part.len() as u64);
            }
        }
        let Some(answer) = answer else { return false };
        connection.answer(&answer, pace).is_ok() && !matches!(pace, Pace::Cut(_))
    }

    /// Carries a request out as the faults have it. Without an answer, the connection is to be closed.
    fn disturbed(self: &Arc<Self>, request: Request) -> (Option<Answer>, Pace) {
        let Settings { latency, page } = *self.settings.lock().unwrap();
        std::thread::sleep(latency);
        let act = self.faults.lock().unwrap().meet(&request);
        let apply = |request: &Request| Some(objects::apply(&self.objects, request, page));
        let answer = match act {
            None => apply(&request),
            Some(Act::Answer(status)) => Some(Answer::error(status)),
            Some(Act::AnswerAfterApplying(status)) => apply(&request).map(|_| Answer::error(status)),
            Some(Act::Late(time)) => {
                std::thread::sleep(time);
                apply(&request)
            }
            Some(Act::LateAnswer(time)) => {
                let answer = apply(&request);
                std::thread::sleep(time);
                answer
            }
            Some(Act::DieBefore) => None,
            Some(Act::DieAfter) => apply(&request).and(None),
            Some(Act::ApplyLater(time)) => {
                let state = self.clone();
                std::thread::spawn(move || {
                    std::thread::sleep(time);
                    objects::apply(&state.objects, &request, page)
                });
                return (None, Pace::Whole);
            }
            Some(Act::CutBody(bytes)) => return (apply(&request), Pace::Cut(bytes)),
            Some(Act::Trickle(rate)) => return (apply(&request), Pace::Slow(rate)),
        };
        (answer, Pace::Whole)
    }

    /// Writes a request into the log, and returns its number.
    fn note(&self, request: &Request, connection: usize) -> usize {
        let key = if request.key.is_empty() { "" } else { "/" };
        let seen = Seen {
            method: request.method.clone(),
            key: format!("{}{key}{}", request.bucket, request.key),
            query: request.query.clone(),
            range: request.header("range").map(ToOwned::to_owned),
            arrived: Instant::now(),
            answered: None,
            status: 0,
            body: request.body.len() as u64,
            sent: 0,
            connection,
        };
        let mut log = self.log.lock().unwrap();
        log.heads.extend_from_slice(&request.head);
        log.seen.push(seen);
        log.cleared + log.seen.len() - 1
    }
}
