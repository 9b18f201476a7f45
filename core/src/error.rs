//! One error type for the crate, and a small [`ErrorKind`] that tells a caller what to do about it.

use std::path::PathBuf;

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a caller can do about an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The name asked for does not exist: correct it.
    NotFound,
    /// What was given (a file, a shape, a setting) is wrong: correct it.
    InvalidInput,
    /// The name asked for is taken, or another process is in the way: choose another, or try again.
    Conflict,
    /// The store or checkpoint was written by something this version cannot read: use a matching version.
    Incompatible,
    /// Stored bytes are not what was written: restore them from a copy.
    Corrupt,
    /// The storage refused (permissions, space, network): mend it and run again, nothing committed is lost.
    Storage,
    /// The caller asked for the work to stop.
    Cancelled,
}

/// Everything that can go wrong. Each message names what was found and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("no model named '{model}' in {at}; {}", known_list("models", .known))]
    UnknownModel { model: String, at: String, known: Vec<String> },

    #[error("model '{model}' has no layer named '{layer}' in {at}; {}", known_list("closest names", .closest))]
    UnknownLayer { model: String, layer: String, at: String, closest: Vec<String> },

    #[error("no snapshot named '{name}'; {}", known_list("snapshots", .known))]
    UnknownSnapshot { name: String, known: Vec<String> },

    #[error("version {version} is not in the store: its versions are {oldest} to {latest}, less those that gc removed")]
    UnknownVersion { version: u64, oldest: u64, latest: u64 },

    #[error("a snapshot named '{name}' exists already, at version {version}: delete it first or choose another name")]
    SnapshotExists { name: String, version: u64 },

    #[error("'{name}' is not a valid {what} name: {reason}")]
    InvalidName { what: &'static str, name: String, reason: &'static str },

    #[error(
        "{store} holds format version {found}; this build reads {known}: open it with a layerstore that knows version {found}"
    )]
    Format { store: String, found: String, known: String },

    #[error("{path} is not a layer store: {reason}")]
    NotAStore { path: String, reason: String },

    #[error("{path}: {reason}")]
    File { path: String, reason: String },

    #[error("{file}, line {line}: {message}")]
    Rules { file: String, line: usize, message: String },

    #[error("method: found '{name}', expected {known}")]
    UnknownMethod { name: String, known: String },

    #[error("{method}: {reason}")]
    Settings { method: String, reason: String },

    #[error("layer '{layer}': {source}")]
    Layer {
        layer: String,
        #[source]
        source: Box<Error>,
    },

    #[error("{what}: found {found}, expected {expected}")]
    Expected { what: String, found: String, expected: String },

    #[error("{what} holds {value} at index {index}: only finite numbers can be used")]
    NotFinite { what: String, value: f64, index: usize },

    #[error("{0}")]
    Numeric(String),

    #[error("artifact {artifact} is corrupt: {reason}")]
    Corrupt { artifact: String, reason: String },

    #[error("{what} is busy: {holder}; run again when it has finished")]
    Busy { what: String, holder: String },

    #[error("{path}: {source}")]
    Io {
        path: String,
        #[source]
        source: std::io::Error,
    },

    #[error("{action}: {message}")]
    Storage { action: String, message: String },

    #[error("cancelled: nothing was committed")]
    Cancelled,

    /// An error that several callers wait for.
    #[error(transparent)]
    Shared(std::sync::Arc<Error>),
}

impl Error {
    /// What a caller can do about this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::UnknownModel { .. }
            | Error::UnknownLayer { .. }
            | Error::UnknownSnapshot { .. }
            | Error::UnknownVersion { .. } => ErrorKind::NotFound,
            Error::SnapshotExists { .. } | Error::Busy { .. } => ErrorKind::Conflict,
            Error::Format { .. } | Error::UnknownMethod { .. } => ErrorKind::Incompatible,
            Error::Corrupt { .. } => ErrorKind::Corrupt,
            Error::Io { .. } | Error::Storage { .. } => ErrorKind::Storage,
            Error::Cancelled => ErrorKind::Cancelled,
            Error::Layer { source, .. } => source.kind(),
            Error::Shared(source) => source.kind(),
            Error::InvalidName { .. }
            | Error::NotAStore { .. }
            | Error::File { .. }
            | Error::Rules { .. }
            | Error::Settings { .. }
            | Error::Expected { .. }
            | Error::NotFinite { .. }
            | Error::Numeric(_) => ErrorKind::InvalidInput,
        }
    }

    pub fn expected(what: impl Into<String>, found: impl ToString, expected: impl ToString) -> Self {
        Error::Expected { what: what.into(), found: found.to_string(), expected: expected.to_string() }
    }

    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { path: path.into().display().to_string(), source }
    }

    pub fn file(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Error::File { path: path.into().display().to_string(), reason: reason.into() }
    }

    /// Says which layer the error is about.
    pub fn in_layer(self, layer: &str) -> Self {
        match self {
            named @ (Error::Layer { .. } | Error::Cancelled) => named,
            other => Error::Layer { layer: layer.to_owned(), source: Box::new(other) },
        }
    }
}

fn known_list(what: &str, names: &[String]) -> String {
    const SHOWN: usize = 8;
    if names.is_empty() {
        return format!("there are no {what}");
    }
    let mut text = format!("{what}: {}", names[..names.len().min(SHOWN)].join(", "));
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

/// The `count` names nearest to `wanted`, for messages about a name that does not exist.
pub fn closest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>, count: usize) -> Vec<String> {
    let mut scored: Vec<(f64, &str)> = names.map(|n| (strsim::jaro_winkler(wanted, n), n)).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.into_iter().take(count).map(|(_, n)| n.to_owned()).collect()
}
