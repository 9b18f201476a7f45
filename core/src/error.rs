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
    /// A model was asked for by a name that the snapshot does not have.
    #[error("no model named '{model}' in {at}; {}", known_list("models", .known))]
    UnknownModel {
        /// The name asked for.
        model: String,
        /// The snapshot or version that was looked into.
        at: String,
        /// The names of the models that are there, those most like it first.
        known: Vec<String>,
    },

    /// A layer was asked for by a name that its model does not have.
    #[error("model '{model}' has no layer named '{layer}' in {at}; {}", known_list("closest names", .closest))]
    UnknownLayer {
        /// The model, which is there.
        model: String,
        /// The name asked for.
        layer: String,
        /// The snapshot or version that was looked into.
        at: String,
        /// The names of the model's layers that are most like it.
        closest: Vec<String>,
    },

    /// A snapshot was asked for by a name that the store does not have.
    #[error("no snapshot named '{name}'; {}", known_list("snapshots", .known))]
    UnknownSnapshot {
        /// The name asked for.
        name: String,
        /// The names of the snapshots that are there, those most like it first.
        known: Vec<String>,
    },

    /// A version was asked for by a number that the store does not have.
    #[error("version {version} is not in the store: its versions are {oldest} to {latest}, less those that gc removed")]
    UnknownVersion {
        /// The number asked for.
        version: u64,
        /// The oldest version that is there.
        oldest: u64,
        /// The latest version.
        latest: u64,
    },

    /// A new snapshot was given a name that is taken.
    #[error("a snapshot named '{name}' exists already, at version {version}: delete it first or choose another name")]
    SnapshotExists {
        /// The name.
        name: String,
        /// The version that has it.
        version: u64,
    },

    /// A model was given a new name that is taken.
    #[error("a model named '{name}' exists already, of {layers} layers: remove it first or choose another name")]
    ModelExists {
        /// The name.
        name: String,
        /// How many layers the model of that name has.
        layers: usize,
    },

    /// A name holds what a name of its kind must not.
    #[error("'{name}' is not a valid {what} name: {reason}")]
    InvalidName {
        /// What was named: a model, a layer or a snapshot.
        what: &'static str,
        /// The name.
        name: String,
        /// The rule that it breaks.
        reason: &'static str,
    },

    /// A store is of a format version that this build cannot do this with.
    #[error(
        "{store} holds format version {found}; this build reads {known}: open it with a layerstore that knows version {found}"
    )]
    Format {
        /// The store's address.
        store: String,
        /// The version that the store names.
        found: String,
        /// The versions that this build reads.
        known: String,
    },

    /// A write needs a column that tables of the store's format version do not have.
    #[error(
        "{store} is of format version {found}, whose table '{table}' has no column '{column}': upgrade the store first"
    )]
    OlderFormat {
        /// The store's address.
        store: String,
        /// The store's format version.
        found: u32,
        /// The table that was written to.
        table: String,
        /// The column that it does not have.
        column: String,
    },

    /// There is no store at a path or address.
    #[error("{path} is not a layer store: {reason}")]
    NotAStore {
        /// The path or address.
        path: String,
        /// What is there in its place.
        reason: String,
    },

    /// A file is not what it should be, or cannot be written as it should be.
    #[error("{path}: {reason}")]
    File {
        /// The file's path.
        path: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A file of rules holds a mistake.
    #[error("{file}, line {line}: {message}")]
    Rules {
        /// The file's path, or what stands for it.
        file: String,
        /// The line of the mistake; the first is 1.
        line: usize,
        /// What is wrong, and what was expected.
        message: String,
    },

    /// A method that this program does not know.
    #[error("method: found '{name}', expected {known}")]
    UnknownMethod {
        /// The name that was found.
        name: String,
        /// The names that are known.
        known: String,
    },

    /// Settings of a method hold a mistake.
    #[error("{method}: {reason}")]
    Settings {
        /// The method's name.
        method: String,
        /// What is wrong, and what was expected.
        reason: String,
    },

    /// An option was given to a command that has no use for it.
    #[error("{option}: found {found}, expected {expected}")]
    Usage {
        /// The option, as it is written on the command line.
        option: String,
        /// What it was given with.
        found: String,
        /// What takes it.
        expected: String,
    },

    /// An error that arose while one layer was worked on.
    #[error("layer '{layer}': {source}")]
    Layer {
        /// The layer's name.
        layer: String,
        /// The error.
        #[source]
        source: Box<Error>,
    },

    /// A shape, a setting or a value is another than it has to be.
    #[error("{what}: found {found}, expected {expected}")]
    Expected {
        /// What was looked at.
        what: String,
        /// What it was.
        found: String,
        /// What it had to be.
        expected: String,
    },

    /// A number is infinite or NaN.
    #[error("{what} holds {value} at index {index}: only finite numbers can be used")]
    NotFinite {
        /// The array.
        what: String,
        /// The number.
        value: f64,
        /// Its place in the array, counted row by row.
        index: usize,
    },

    /// A computation has no result, such as the factorisation of a singular matrix.
    #[error("{0}")]
    Numeric(String),

    /// Stored rows of an artifact are not what was written.
    #[error("artifact {artifact} is corrupt: {reason}")]
    Corrupt {
        /// The artifact's name: its hash in hex.
        artifact: String,
        /// What was found.
        reason: String,
    },

    /// Another process holds what this one needs.
    #[error("{what} is busy: {holder}; run again when it has finished")]
    Busy {
        /// What is needed.
        what: String,
        /// Who holds it.
        holder: String,
    },

    /// The operating system refused an operation on a file.
    #[error("{path}: {source}")]
    Io {
        /// The file's path.
        path: String,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },

    /// The storage, or the table library on top of it, refused an operation.
    #[error("{action}: {message}")]
    Storage {
        /// What was being done.
        action: String,
        /// Why it failed, in one line.
        message: String,
        /// The library's own error, where there is one: to be looked into by `downcast_ref`, not by its text.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },

    /// A table's file, or what says which files a table has, is not what was written.
    #[error("{action}: {message}")]
    Damaged {
        /// What was being done.
        action: String,
        /// What was found, in one line.
        message: String,
        /// The library's own error, where there is one.
        #[source]
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },

    /// The caller asked for the work to stop.
    #[error("cancelled: nothing was committed")]
    Cancelled,

    /// An error that several callers wait for.
    #[error(transparent)]
    Shared(std::sync::Arc<Error>),
}

impl Error {
    /// Returns what a caller can do about this error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::UnknownModel { .. }
            | Error::UnknownLayer { .. }
            | Error::UnknownSnapshot { .. }
            | Error::UnknownVersion { .. } => ErrorKind::NotFound,
            Error::SnapshotExists { .. } | Error::ModelExists { .. } | Error::Busy { .. } => ErrorKind::Conflict,
            Error::Format { .. } | Error::OlderFormat { .. } | Error::UnknownMethod { .. } => ErrorKind::Incompatible,
            Error::Corrupt { .. } | Error::Damaged { .. } => ErrorKind::Corrupt,
            Error::Io { .. } | Error::Storage { .. } => ErrorKind::Storage,
            Error::Cancelled => ErrorKind::Cancelled,
            Error::Layer { source, .. } => source.kind(),
            Error::Shared(source) => source.kind(),
            Error::InvalidName { .. }
            | Error::NotAStore { .. }
            | Error::File { .. }
            | Error::Rules { .. }
            | Error::Settings { .. }
            | Error::Usage { .. }
            | Error::Expected { .. }
            | Error::NotFinite { .. }
            | Error::Numeric(_) => ErrorKind::InvalidInput,
        }
    }

    /// Returns an [`Error::Expected`].
    pub fn expected(what: impl Into<String>, found: impl ToString, expected: impl ToString) -> Self {
        Error::Expected { what: what.into(), found: found.to_string(), expected: expected.to_string() }
    }

    /// Returns an [`Error::Io`].
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { path: path.into().display().to_string(), source }
    }

    /// Returns an [`Error::Storage`] whose message is that of its source.
    pub fn storage(action: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        let source = source.into();
        Error::Storage { action: action.into(), message: source.to_string(), source: Some(source) }
    }

    /// Returns an [`Error::File`].
    pub fn file(path: impl Into<PathBuf>, reason: impl Into<String>) -> Self {
        Error::File { path: path.into().display().to_string(), reason: reason.into() }
    }

    /// Returns this error as one of a layer, unless it names a layer already or is a cancellation.
    pub fn in_layer(self, layer: &str) -> Self {
        match self {
            named @ (Error::Layer { .. } | Error::Cancelled) => named,
            other => Error::Layer { layer: layer.to_owned(), source: Box::new(other) },
        }
    }
}

/// Returns names as text behind what they are, the first few of them: for messages about a name that does not exist.
pub fn known_list(what: &str, names: &[String]) -> String {
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

/// Returns the `count` names nearest to `wanted`, nearest first, for messages about a name that does not exist. Upper and lower
/// case are alike.
pub fn closest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>, count: usize) -> Vec<String> {
    let wanted = wanted.to_lowercase();
    let mut scored: Vec<(f64, &str)> = names.map(|n| (strsim::jaro_winkler(&wanted, &n.to_lowercase()), n)).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.into_iter().take(count).map(|(_, n)| n.to_owned()).collect()
}

/// Returns a number with its noun, such as "1 layer" and "2 layers".
pub fn counted(n: impl std::fmt::Display, one: &str, many: &str) -> String {
    let n = n.to_string();
    let noun = if n == "1" { one } else { many };
    format!("{n} {noun}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[test]
    fn names_that_are_like_a_name_come_first() {
        let near = |wanted: &str| closest(wanted, ["other", "bert-base", "Bert", "gpt"].into_iter(), 2);
        assert_eq!(near("bert"), ["Bert", "bert-base"]);
        assert_eq!(near("GTP")[0], "gpt");
        assert_eq!([0, 1, 2].map(|n| counted(n, "query", "queries")), ["0 queries", "1 query", "2 queries"]);
        let many: Vec<String> = (0..10).map(|n| n.to_string()).collect();
        assert_eq!(known_list("names", &many), "names: 0, 1, 2, 3, 4, 5, 6, 7 and 2 more");
        assert_eq!(known_list("names", &[]), "there are no names");
    }

    /// The library's error is still there, by its type, however often it was wrapped.
    #[test]
    fn sources_are_kept() {
        let full = std::io::Error::from_raw_os_error(28);
        let error = Error::storage("writing table 'weights'", full).in_layer("encoder.dense");
        assert_eq!(error.kind(), ErrorKind::Storage);
        let storage = error.source().unwrap().downcast_ref::<Box<Error>>().map(|e| &**e);
        let storage = storage.or_else(|| error.source().unwrap().downcast_ref::<Error>()).unwrap();
        let found = storage.source().unwrap().downcast_ref::<std::io::Error>().unwrap();
        assert_eq!(found.raw_os_error(), Some(28));
        let shared =
            Error::Shared(std::sync::Arc::new(Error::storage("reading", std::io::Error::from_raw_os_error(5))));
        assert!(shared.source().unwrap().is::<std::io::Error>());
    }
}
