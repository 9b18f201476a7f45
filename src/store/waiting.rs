//! Waiting for Lance: what it gives as a result of this crate, and its errors in one line.
//!
//! Lance believes the lengths, types and offsets that stand in a file, and panics where they lead out of it, here or on a task of
//! its own. A store's files can be damaged like any others, so nothing waits for Lance but by way of [`Waiting`], which makes such
//! a panic an error.

use std::any::Any;
use std::panic::AssertUnwindSafe;

use futures::FutureExt;

use crate::error::{Error, Result};

/// Waits for an operation of Lance.
pub trait Waiting<T>: Future<Output = lance::Result<T>> + Sized {
    /// Waits for it, as part of an action that its error names.
    ///
    /// # Errors
    /// [`Error::Damaged`] when the table is not what was written, [`Error::Storage`] else.
    fn during(self, action: impl Into<String> + Send) -> impl Future<Output = Result<T>> + Send
    where
        Self: Send,
    {
        let waited = self.caught();
        async move { waited.await.map_err(storage_error(action)) }
    }

    /// Waits for it. A panic in it is [`lance::Error::CorruptFile`].
    fn caught(self) -> impl Future<Output = lance::Result<T>> + Send
    where
        Self: Send,
    {
        AssertUnwindSafe(self).catch_unwind().map(|done| done.unwrap_or_else(|panic| Err(damaged(&*panic))))
    }
}

impl<T, F: Future<Output = lance::Result<T>>> Waiting<T> for F {}

/// Returns what `look` gives, which looks into what Lance has read of a file. A panic in it is [`lance::Error::CorruptFile`].
///
/// # Errors
/// As `look` does.
pub fn caught<T>(look: impl FnOnce() -> lance::Result<T>) -> lance::Result<T> {
    std::panic::catch_unwind(AssertUnwindSafe(look)).unwrap_or_else(|panic| Err(damaged(&*panic)))
}

/// The error in place of a panic.
fn damaged(panic: &(dyn Any + Send)) -> lance::Error {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    let text = text.and_then(|text| text.lines().next()).unwrap_or("no reason was given");
    lance::Error::corrupt_file_named("of the table", format!("it is not what was written ({text})"))
}

/// Returns the error of a task of Lance's that did not finish.
pub fn unfinished(e: tokio::task::JoinError) -> lance::Error {
    match e.try_into_panic() {
        Ok(panic) => damaged(&*panic),
        Err(e) => lance::Error::wrapped(Box::new(e)),
    }
}

/// Returns what turns an error of Lance into one of this action: [`Error::Damaged`] when a table is not what was written,
/// [`Error::Storage`] else.
pub fn storage_error(action: impl Into<String>) -> impl FnOnce(lance::Error) -> Error {
    let action = action.into();
    move |e| {
        let message = reason(&e);
        match is_corrupt(&e) {
            true => Error::Damaged { action, message, source: Some(Box::new(e)) },
            false => Error::Storage { action, message, source: Some(Box::new(e)) },
        }
    }
}

/// Whether an error says that a file is not what was written.
fn is_corrupt(e: &lance::Error) -> bool {
    // Lance read the file whole, and looked for bytes that it does not have.
    let is_short =
        |cause: &Cause| matches!(cause.downcast_ref(), Some(object_store::Error::Generic { store: "memory", .. }));
    any_cause(e, &|cause| matches!(cause.downcast_ref(), Some(lance::Error::CorruptFile { .. })) || is_short(cause))
}

/// Returns whether the system, or an object store, refused to read a file that is there, as without permission, or did not answer: then
/// nothing is known of its content.
pub fn is_refused(e: &lance::Error) -> bool {
    let system = |e: &std::io::Error| e.raw_os_error().is_some() && e.kind() != std::io::ErrorKind::NotFound;
    let store = |e: &object_store::Error| match e {
        object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => true,
        // Those of others are the system's, or say what is wrong with a file.
        object_store::Error::Generic { store, .. } => matches!(*store, "S3" | "GCS" | "MicrosoftAzure"),
        _ => false,
    };
    let refused = |cause: &Cause| cause.downcast_ref().is_some_and(system) || cause.downcast_ref().is_some_and(store);
    any_cause(e, &refused) && !is_corrupt(e)
}

/// Returns whether an error says that a file is not there.
pub fn is_gone(e: &lance::Error) -> bool {
    let gone = |cause: &Cause| {
        matches!(cause.downcast_ref(), Some(lance::Error::NotFound { .. }))
            || matches!(cause.downcast_ref(), Some(object_store::Error::NotFound { .. }))
    };
    any_cause(e, &gone)
}

/// An error that another one passes on.
type Cause = dyn std::error::Error + 'static;

/// Whether something holds of an error, or of one that it passes on.
fn any_cause(e: &lance::Error, holds: &dyn Fn(&(dyn std::error::Error + 'static)) -> bool) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(e);
    while let Some(error) = next {
        match error.downcast_ref::<lance::Error>() {
            _ if holds(error) => return true,
            Some(lance::Error::Shared { source }) if any_cause(source, holds) => return true,
            _ => next = error.source(),
        }
    }
    false
}

/// Returns why Lance failed: the error that it passes on, or its own message, without the lines of its source that its
/// own text ends with.
pub fn reason(e: &lance::Error) -> String {
    use lance::Error as E;
    match e {
        E::Shared { source } => reason(source),
        E::External { source } => foreign_reason(&**source),
        E::Internal { message, .. }
        | E::TooMuchWriteContention { message, .. }
        | E::Timeout { message, .. }
        | E::PrerequisiteFailed { message, .. }
        | E::Unprocessable { message, .. }
        | E::Arrow { message, .. }
        | E::Schema { message, .. }
        | E::Index { message, .. }
        | E::Cloned { message, .. }
        | E::Execution { message, .. }
        | E::VersionConflict { message, .. }
        | E::Fenced { message, .. }
        | E::Backpressure { message, .. } => message.clone(),
        E::SchemaMismatch { difference, .. } => format!("the table has other columns: {difference}"),
        E::DatasetAlreadyExists { uri, .. } => format!("there is a table at {uri}"),
        E::NotFound { uri, .. } => format!("{uri} is not there"),
        E::CorruptFile { path, source, .. } => format!("file {path} is corrupt: {source}"),
        other => std::error::Error::source(other).map_or_else(|| other.to_string(), foreign_reason),
    }
}

/// Returns what is wrong with a file, without its name; [`reason`] of other errors.
pub fn detail(e: &lance::Error) -> String {
    match e {
        lance::Error::CorruptFile { source, .. } => source.to_string(),
        lance::Error::Shared { source } => detail(source),
        other => reason(other),
    }
}

/// The reason that an error of another library gives: that of an error of Lance within it, if there is one.
fn foreign_reason(e: &(dyn std::error::Error + 'static)) -> String {
    let mut next = Some(e);
    while let Some(error) = next {
        if let Some(lance) = error.downcast_ref::<lance::Error>() {
            return reason(lance);
        }
        next = error.source();
    }
    e.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn reasons_are_the_innermost() {
        let full = || std::io::Error::from_raw_os_error(28);
        assert_eq!(reason(&lance::Error::from(full())), full().to_string());
        let inner = lance::Error::internal("the page is short");
        assert_eq!(reason(&inner), "the page is short");
        let outer = lance::Error::wrapped(Box::new(inner));
        assert_eq!(reason(&outer), "the page is short");
        let error = storage_error("reading")(outer);
        assert_eq!(error.to_string(), "reading: the page is short");
        assert!(std::error::Error::source(&error).unwrap().is::<lance::Error>());
    }

    #[test]
    fn what_is_refused_is_not_damaged() {
        use object_store::Error as E;
        let passed_on = |e: E| lance::Error::wrapped(Box::new(e));
        let generic = |store, source| passed_on(E::Generic { store, source });
        let text = || -> Box<dyn std::error::Error + Send + Sync> { "503 Slow Down".into() };
        let named =
            |make: fn(String, Box<dyn std::error::Error + Send + Sync>) -> E| passed_on(make("a".into(), text()));
        assert!(is_refused(&generic("S3", text())));
        assert!(is_refused(&named(|path, source| E::PermissionDenied { path, source })));
        assert!(is_refused(&named(|path, source| E::Unauthenticated { path, source })));
        assert!(!is_refused(&named(|path, source| E::NotFound { path, source })));
        assert!(is_gone(&named(|path, source| E::NotFound { path, source })) && !is_gone(&generic("S3", text())));
        assert!(!is_refused(&generic("LocalFileSystem", text())));
        assert!(!is_refused(&generic("N/A", text())));
        assert!(is_corrupt(&generic("memory", text())) && !is_corrupt(&generic("S3", text())));
        let denied = std::io::Error::from_raw_os_error(13);
        assert!(is_refused(&generic("LocalFileSystem", Box::new(denied))));
        let corrupt = lance::Error::corrupt_file_named("of the table", "cut");
        assert!(!is_refused(&generic("S3", Box::new(corrupt))));
        assert!(!is_refused(&lance::Error::from(std::io::Error::other("short"))));
    }

    #[tokio::test]
    async fn panics_are_errors() {
        async fn late(fails: bool) -> lance::Result<u32> {
            tokio::task::yield_now().await;
            assert!(!fails, "a length of {} bytes\nand more", 7);
            Ok(3)
        }
        assert_eq!(late(false).during("reading").await.unwrap(), 3);
        let error = late(true).during("reading").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(
            error.to_string(),
            "reading: file of the table is corrupt: it is not what was written (a length of 7 bytes)"
        );
        let task = tokio::spawn(late(true)).await;
        assert_eq!(storage_error("reading")(unfinished(task.unwrap_err())).kind(), ErrorKind::Corrupt);
        assert!(matches!(caught(|| -> lance::Result<()> { panic!("no") }), Err(lance::Error::CorruptFile { .. })));
        let shared = lance::Error::Shared { source: std::sync::Arc::new(lance::Error::corrupt_file_named("x", "y")) };
        assert_eq!(storage_error("reading")(lance::Error::wrapped(Box::new(shared))).kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn refusals_of_the_system() {
        let of = |code: i32| lance::Error::io_source(Box::new(std::io::Error::from_raw_os_error(code)));
        // EACCES, EMFILE and EIO; ENOENT says that there is no file.
        assert!([13, 24, 5].into_iter().all(|code| is_refused(&of(code))));
        assert!(is_refused(&lance::Error::Shared { source: std::sync::Arc::new(of(5)) }));
        assert!(!is_refused(&of(2)) && !is_refused(&lance::Error::corrupt_file_named("x", "y")));
    }
}
