//! One run of the program: its limits, how it is killed, and how it ended.

use std::collections::BTreeMap;
use std::io::{Error, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};

/// What ends a round.
#[derive(Debug)]
pub struct Trouble {
    pub kind: TroubleKind,
    pub what: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TroubleKind {
    /// Something that was acknowledged is not there, or other than it was, and nothing says so.
    Lost,
    /// A command panicked, ended by a signal of its own, wanted giant memory, or failed without a word.
    Panicked,
    /// A command did not end.
    Hung,
    /// The campaign itself could not go on.
    Campaign,
}

impl Trouble {
    pub fn lost(what: impl Into<String>) -> Self {
        Trouble { kind: TroubleKind::Lost, what: what.into() }
    }

    pub fn name(&self) -> &'static str {
        match self.kind {
            TroubleKind::Lost => "lost",
            TroubleKind::Panicked => "panicked",
            TroubleKind::Hung => "hung",
            TroubleKind::Campaign => "could not go on",
        }
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Trouble { kind: TroubleKind::Campaign, what: error.to_string() }
    }
}

impl From<serde_json::Error> for Trouble {
    fn from(error: serde_json::Error) -> Self {
        Trouble::lost(format!("not the JSON that is documented: {error}"))
    }
}

/// Limits of one run, beyond that of memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Files get no longer, as on a full disk.
    pub file_size: Option<u64>,
    /// Modes of files hold for root as well.
    pub modes_hold: bool,
}

/// How a command is recorded.
#[derive(Debug, Clone, Copy)]
pub struct Recorded<'a> {
    /// The recorder.
    pub library: &'a Path,
    /// What it writes.
    pub log: &'a Path,
    /// The directory that it looks at.
    pub root: &'a Path,
    /// The operation after which the command kills itself.
    pub stop: Option<usize>,
}

/// What the recorder's messages begin with.
const RECORDER: &str = "layerstore-recorder: ";

/// What a command that ended by itself, or was killed, printed.
#[derive(Debug)]
pub struct Ran {
    pub command: String,
    /// The exit status, 0 or 1; `None` for a command that was killed.
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
    pub took: Duration,
}

impl Ran {
    pub fn is_done(&self) -> bool {
        self.code == Some(0)
    }

    /// What an error says of it.
    pub fn told(&self) -> String {
        format!("`{}` ended with {:?}: {}{}", self.command, self.code, self.err, self.out)
    }
}

/// What the runs of a round were.
#[derive(Debug, Default)]
pub struct Tally {
    pub answered: u64,
    pub refused: u64,
    pub killed: u64,
    /// First lines of errors, numbers and names of files left out.
    pub refusals: BTreeMap<String, u64>,
}

/// The binary, and what holds for all of its runs.
pub struct Program {
    binary: PathBuf,
    memory: u64,
    patience: Duration,
    tally: Mutex<Tally>,
}

impl Program {
    pub fn new(binary: &Path, memory: u64, patience: Duration) -> Result<Self, Trouble> {
        let binary = binary.canonicalize().map_err(|e| Error::new(e.kind(), format!("{}: {e}", binary.display())))?;
        Ok(Program { binary, memory, patience, tally: Mutex::default() })
    }

    fn tally(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn take_tally(&self) -> Tally {
        std::mem::take(&mut *self.tally())
    }

    /// Runs a command on `store`, from `folder` and with more of an environment, and kills it as soon as `kill` says so, which is asked again and again with the
    /// time so far.
    ///
    /// # Errors
    /// When it panics, hangs, or ends in any other way than with 0, or 1 and a message.
    pub fn run(
        &self,
        (folder, environment): (&Path, &[(&str, String)]),
        store: &Path,
        args: &[String],
        limits: Limits,
        kill: impl FnMut(Duration) -> bool,
    ) -> Result<Ran, Trouble> {
        self.run_with((folder, environment), store, args, limits, None, kill)
    }

    /// Runs a command on `store`, from `folder`, which is recorded meanwhile.
    pub fn recorded(&self, folder: &Path, store: &Path, args: &[String], recorded: &Recorded) -> Result<Ran, Trouble> {
        self.run_with((folder, &[]), store, args, Limits::default(), Some(recorded), |_| false)
    }

    fn run_with(
        &self,
        (folder, environment): (&Path, &[(&str, String)]),
        store: &Path,
        args: &[String],
        limits: Limits,
        recorded: Option<&Recorded>,
        mut kill: impl FnMut(Duration) -> bool,
    ) -> Result<Ran, Trouble> {
        let mut command = Command::new(&self.binary);
        if let Some(Recorded { library, log, root, stop }) = recorded {
            command.env("LD_PRELOAD", library);
            command.env("LAYERSTORE_RECORD_LOG", log).env("LAYERSTORE_RECORD_ROOT", root);
            command.envs(stop.map(|stop| ("LAYERSTORE_RECORD_STOP", stop.to_string())));
        }
        command.current_dir(folder).arg("--store").arg(store).args(["--quiet", "--format", "json"]).args(args);
        command.envs(environment.iter().cloned());
        command.env_remove("LAYERSTORE_URI").env_remove("LAYERSTORE_READER");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let memory = self.memory;
        // SAFETY: between fork and exec only system calls are made.
        unsafe { command.pre_exec(move || limits.set(memory)) };
        let began = Instant::now();
        let mut child = command.spawn()?;
        let out = child.stdout.take().map(|pipe| std::thread::spawn(move || text(pipe)));
        let err = child.stderr.take().map(|pipe| std::thread::spawn(move || text(pipe)));
        let (mut killed, mut hung) = (false, false);
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            killed |= kill(began.elapsed());
            hung |= began.elapsed() > self.patience;
            if killed || hung {
                child.kill()?;
                break child.wait()?;
            }
            // The moment of a kill is met to a fiftieth.
            std::thread::sleep((began.elapsed() / 50).clamp(Duration::from_micros(500), Duration::from_millis(20)));
        };
        let took = began.elapsed();
        let joined =
            |reader: Option<std::thread::JoinHandle<String>>| reader.and_then(|r| r.join().ok()).unwrap_or_default();
        let ran = Ran { command: args.join(" "), code: status.code(), out: joined(out), err: joined(err), took };
        if hung {
            return Err(Trouble { kind: TroubleKind::Hung, what: format!("for {took:?}: {}", ran.told()) });
        }
        if ran.err.contains(RECORDER) {
            return Err(Trouble { kind: TroubleKind::Campaign, what: ran.told() });
        }
        let kills_itself = recorded.is_some_and(|recorded| recorded.stop.is_some());
        self.judged(ran, status, killed || kills_itself)
    }

    fn judged(&self, ran: Ran, status: ExitStatus, killed: bool) -> Result<Ran, Trouble> {
        // It may have ended just before it was killed.
        let by_us = killed && status.signal() == Some(libc::SIGKILL);
        let has_word = !ran.err.trim().is_empty() || !ran.out.trim().is_empty();
        let has_panicked = ran.err.contains("panicked at");
        match status.code() {
            None if by_us => self.tally().killed += 1,
            Some(0) if !has_panicked => self.tally().answered += 1,
            Some(1) if has_word && !has_panicked => {
                let mut tally = self.tally();
                tally.refused += 1;
                *tally.refusals.entry(shortened(&ran)).or_default() += 1;
            }
            _ => return Err(Trouble { kind: TroubleKind::Panicked, what: format!("{status}: {}", ran.told()) }),
        }
        Ok(ran)
    }
}

impl Limits {
    /// Sets them in the process that is about to become the program.
    fn set(self, memory: u64) -> Result<(), Error> {
        setrlimit(Resource::RLIMIT_DATA, memory, memory)?;
        setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
        if let Some(size) = self.file_size {
            // Without its signal, writing beyond the limit is an error: a short write, then EFBIG.
            // SAFETY: no handler is installed.
            unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }?;
            setrlimit(Resource::RLIMIT_FSIZE, size, size)?;
        }
        if self.modes_hold && nix::unistd::Uid::effective().is_root() {
            // CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER: what is not in the bounding set is not had after exec.
            for capability in [1, 2, 3] {
                // SAFETY: takes a number, and touches no memory.
                if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) } != 0 {
                    return Err(Error::last_os_error());
                }
            }
        }
        Ok(())
    }
}

fn text(mut pipe: impl Read) -> String {
    let mut bytes = vec![];
    // What was read before an error is what there is to tell.
    let _ = pipe.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The last line of an error with its command, where numbers, times and names of files are all alike.
fn shortened(ran: &Ran) -> String {
    const BETWEEN: [char; 8] = [' ', ',', ':', ';', '(', ')', '\'', '"'];
    let said = if ran.err.trim().is_empty() { &ran.out } else { &ran.err };
    let line = said.trim().lines().last().unwrap_or_default();
    let words = line.split_inclusive(BETWEEN).map(|word| {
        let bare = word.trim_end_matches(BETWEEN);
        match bare.starts_with(|c: char| c.is_ascii_digit()) || bare.contains('/') {
            true => format!("#{}", &word[bare.len()..]),
            false => word.to_owned(),
        }
    });
    let short: String = words.collect();
    let command = ran.command.split(' ').find(|arg| arg.starts_with(|c: char| c.is_ascii_lowercase()));
    format!("{}: {}", command.unwrap_or_default(), short.chars().take(200).collect::<String>())
}
