//! The real binary, the small checkpoint, and a folder for each test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use layerstore::{Error, ErrorKind};
use serde_json::Value;

use crate::s3::Server;

pub const CHECKPOINT: &str = "tests/fixtures/small.safetensors";
pub const INPUTS: &str = "tests/fixtures/small-calibration.safetensors";
pub const INT4: &str = "tests/fixtures/int4.toml";
pub const KEYS: &str = "tests/fixtures/keys.toml";

/// The server that all stores of the tests lie on, where `LAYERSTORE_TESTS_ON_S3` says which port it is to listen on: `make test-s3`. The
/// environment says to this process, too, how it is reached.
static SERVER: LazyLock<Option<Server>> =
    LazyLock::new(|| Some(Server::start_at(std::env::var("LAYERSTORE_TESTS_ON_S3").ok()?.parse().unwrap())));

/// A temporary folder with a store address in it.
pub struct Place {
    pub folder: tempfile::TempDir,
    /// A store on S3, and what the environment of commands says of it.
    s3: Option<(String, Vec<(&'static str, String)>)>,
}

/// What a command printed and how it ended.
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Place {
    /// A place whose store lies in its folder, or on a server where the environment names a port for one.
    pub fn new() -> Self {
        match &*SERVER {
            Some(server) => Place::on_s3(server),
            None => Place { folder: tempfile::tempdir().unwrap(), s3: None },
        }
    }

    /// A place whose store lies in its folder: for tests that are about its files.
    pub fn on_disk() -> Self {
        Place { folder: tempfile::tempdir().unwrap(), s3: None }
    }

    /// A place whose store lies on a server.
    pub fn on_s3(server: &Server) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().file_name().unwrap().to_string_lossy().into_owned();
        Place { folder, s3: Some((format!("s3://test/stores/{own}"), server.environment().into())) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn store(&self) -> String {
        match &self.s3 {
            Some((uri, _)) => uri.clone(),
            None => self.path("layers").display().to_string(),
        }
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_layerstore"));
        command.current_dir(env!("CARGO_MANIFEST_DIR")).arg("--store").arg(self.store()).args(args);
        command.env_remove("LAYERSTORE_URI").env_remove("RUST_BACKTRACE");
        command.envs(self.s3.iter().flat_map(|(_, environment)| environment.iter().cloned()));
        command
    }

    pub fn spawn(&self, args: &[&str]) -> Child {
        self.command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    pub fn run(&self, args: &[&str]) -> Ran {
        let done = self.command(args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let ran = Ran { code: done.status.code().unwrap_or(-1), out: text(done.stdout), err: text(done.stderr) };
        assert!(!ran.err.contains("panicked"), "{args:?}: {}", ran.err);
        ran
    }

    /// A command that has to succeed, and its JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        let ran = self.run(&[&["--format", "json", "--quiet"], args].concat());
        assert_eq!(ran.code, 0, "{args:?}: {}", ran.err);
        serde_json::from_str(&ran.out).unwrap_or_else(|e| panic!("{args:?} printed no JSON ({e}): {}", ran.out))
    }

    /// A command that has to fail with this code and say this.
    pub fn fails(&self, code: i32, says: &[&str], args: &[&str]) {
        let ran = self.run(args);
        assert_eq!(ran.code, code, "{args:?}: {} {}", ran.out, ran.err);
        for part in says {
            assert!(ran.err.contains(part), "{args:?} does not say '{part}': {}", ran.err);
        }
        assert_eq!(ran.out, "", "{args:?} failed and printed a result");
    }

    pub fn import(&self, model: &str, rules: Option<&str>) -> Value {
        let mut args = vec!["import", CHECKPOINT, "--model", model];
        if let Some(rules) = rules {
            args.extend(["--rules", rules, "--calibration", INPUTS]);
        }
        self.json(&args)
    }
}

/// Asserts that an error is of a kind, and that its message says all of this.
#[track_caller]
pub fn assert_error(error: &Error, kind: ErrorKind, says: &[&str]) {
    let message = error.to_string();
    assert_eq!(error.kind(), kind, "{message}");
    for part in says {
        assert!(message.contains(part), "'{message}' does not say '{part}'");
    }
}

/// Asserts that something is refused with an error of a kind, whose message says all of this.
#[track_caller]
pub fn refused<T>(result: layerstore::Result<T>, kind: ErrorKind, says: &[&str]) {
    match result {
        Ok(_) => panic!("nothing was refused; expected {kind:?}: {says:?}"),
        Err(error) => assert_error(&error, kind, says),
    }
}

/// The entry of that name in a JSON object; fails where there is none, or it is `null`.
#[track_caller]
pub fn field<'a>(object: &'a Value, name: &str) -> &'a Value {
    match object.get(name) {
        None | Some(Value::Null) => panic!("no {name} in {object}"),
        Some(value) => value,
    }
}

/// Waits until something holds, and fails where it does not within two minutes.
#[track_caller]
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !holds() {
        assert!(Instant::now() < deadline, "waited two minutes for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Every file under a folder.
pub fn files(folder: &Path) -> Vec<PathBuf> {
    let mut all = vec![];
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { all.extend(files(&path)) } else { all.push(path) }
    }
    all.sort();
    all
}
