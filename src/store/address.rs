//! What an address of a local store means: its scheme, escapes, `~`, links and `..`, each understood once.

use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

use url::Url;

use crate::error::{Error, Result};

/// Links that are followed before they are taken for a ring, as Linux has it.
const MOST_LINKS: usize = 40;

fn not_a_store(path: &str, reason: impl Into<String>) -> Error {
    Error::NotAStore { path: path.into(), reason: reason.into() }
}

/// Returns the path of a `file:` URL, its escapes decoded.
///
/// # Errors
/// When the URL is of another machine, has a query or a fragment, or its path is not absolute.
pub fn of_file_url(uri: &str) -> Result<PathBuf> {
    let wrong = |reason: &str| not_a_store(uri, reason);
    let rest = uri.split_once(':').map_or("", |(_, rest)| rest);
    if !rest.starts_with('/') || rest == "//" {
        return Err(wrong("a file URL has an absolute path: expected file:///PATH"));
    }
    let url = Url::parse(uri).map_err(|e| wrong(&format!("not a file URL: {e}")))?;
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong(
            "'?' and '#' begin other parts of a URL than its path: expected %3F and %23, or a plain path",
        ));
    }
    match url.host_str() {
        None | Some("" | "localhost") => {}
        Some(host) => {
            return Err(wrong(&format!("a file URL is of this machine, not of '{host}': expected file:///PATH")));
        }
    }
    if uri.to_ascii_lowercase().contains("%00") {
        return Err(wrong("%00 is in no path"));
    }
    // The parser resolves `..` as text, before links are known.
    let path = rest.strip_prefix("//").map_or(rest, |rest| &rest[rest.find('/').unwrap_or(rest.len())..]);
    let path = decoded(path).ok_or_else(|| wrong("the path is not UTF-8"))?;
    Ok(PathBuf::from(path))
}

/// Decodes `%xx`; `None` where the bytes are not UTF-8. A `%` without two digits is itself.
fn decoded(text: &str) -> Option<String> {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        let digit = |i: usize| bytes.get(at + i).and_then(|b| char::from(*b).to_digit(16));
        match (bytes[at], digit(1), digit(2)) {
            (b'%', Some(high), Some(low)) => {
                out.push((high * 16 + low) as u8);
                at += 3;
            }
            (byte, ..) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8(out).ok()
}

/// Returns a path with `~` at its start as the home directory, as a shell would have it.
///
/// # Errors
/// When there is no home directory, or another user's is asked for.
pub fn with_home(path: &str) -> Result<PathBuf> {
    let Some(rest) = path.strip_prefix('~') else { return Ok(path.into()) };
    if !rest.is_empty() && !rest.starts_with('/') {
        let reason = format!("only ~ and ~/ stand for a home directory: expected a path in full, or ./{path}");
        return Err(not_a_store(path, reason));
    }
    match std::env::var_os("HOME").filter(|home| !home.is_empty()) {
        Some(home) => Ok(Path::new(&home).join(rest.trim_start_matches('/'))),
        None => Err(not_a_store(path, "HOME is not set, and so ~ stands for nothing")),
    }
}

/// Returns the absolute path without links and `..` that the system would come to. What is not there yet has neither.
///
/// # Errors
/// When there is no current directory, a link cannot be read, or links lead in a ring.
pub fn resolved(path: &Path) -> Result<PathBuf> {
    let refused = |e: std::io::Error| Error::io(path, e);
    // Those that are still to be walked, the next one last.
    let mut ahead: Vec<PathBuf> = vec![];
    let push = |ahead: &mut Vec<PathBuf>, path: &Path| {
        ahead.extend(path.components().rev().map(|component| PathBuf::from(component.as_os_str())));
    };
    push(&mut ahead, path);
    if !path.is_absolute() {
        push(&mut ahead, &std::env::current_dir().map_err(refused)?);
    }
    let (mut done, mut links) = (PathBuf::new(), 0);
    while let Some(next) = ahead.pop() {
        match next.components().next() {
            Some(Component::ParentDir) => _ = done.pop(),
            Some(Component::CurDir) | None => {}
            // The root, too, which begins anew.
            Some(_) => done.push(&next),
        }
        match std::fs::symlink_metadata(&done) {
            Ok(there) if there.is_symlink() => {
                links += 1;
                if links > MOST_LINKS {
                    let reason = format!("more than {MOST_LINKS} symbolic links lead from it");
                    return Err(not_a_store(&path.display().to_string(), reason));
                }
                let target = std::fs::read_link(&done).map_err(refused)?;
                done.pop();
                push(&mut ahead, &target);
            }
            // What lies behind a directory that cannot be searched is found when it is used.
            Ok(_) => {}
            Err(e)
                if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::NotADirectory) => {
            }
            Err(e) => return Err(refused(e)),
        }
    }
    Ok(done)
}

/// Refuses a directory that cannot be written to; one that is not there yet, where it cannot be made.
///
/// # Errors
/// When the directory, or the nearest one above it that is there, refuses, or is none.
pub fn check_writable(path: &Path) -> Result<()> {
    for folder in path.ancestors() {
        match std::fs::metadata(folder) {
            Ok(there) if there.is_dir() => return access(folder).map_err(|e| Error::io(folder, e)),
            Ok(_) => return Err(not_a_store(&path.display().to_string(), format!("{} is a file", folder.display()))),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
            Err(e) => return Err(Error::io(folder, e)),
        }
    }
    Ok(())
}

#[cfg(unix)]
fn access(folder: &Path) -> std::io::Result<()> {
    use rustix::fs::{Access, AtFlags, CWD};
    Ok(rustix::fs::accessat(CWD, folder, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)?)
}

#[cfg(not(unix))]
fn access(_: &Path) -> std::io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_decoded() {
        let path = |uri: &str| of_file_url(uri).map(|p| p.display().to_string()).map_err(|e| e.to_string());
        for (uri, expected) in [
            ("file:///a%20b/c", "/a b/c"),
            ("file:/a", "/a"),
            ("file://localhost/a%23b", "/a#b"),
            ("file:///a/../b%25", "/a/../b%"),
            ("FILE:///%C3%A9%2", "/é%2"),
        ] {
            assert_eq!(path(uri).as_deref(), Ok(expected));
        }
        for (uri, expected) in [
            ("file://host/a", "not of 'host'"),
            ("file://~/s", "expected file:///PATH"),
            ("file:a", "absolute"),
            ("file:///a?b", "%3F"),
            ("file:///%FF", "UTF-8"),
        ] {
            let message = path(uri).unwrap_err();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn home_is_expanded_at_the_start_alone() {
        let home = std::env::var_os("HOME").map(PathBuf::from);
        if let Some(home) = home.filter(|home| !home.as_os_str().is_empty()) {
            assert_eq!(with_home("~/a/b").unwrap(), home.join("a/b"));
            assert_eq!(with_home("~").unwrap(), home);
        }
        assert_eq!(with_home("./~/a").unwrap(), Path::new("./~/a"));
        assert!(with_home("~other/a").unwrap_err().to_string().contains("./~other/a"));
    }

    #[test]
    fn places_are_tried() {
        let folder = tempfile::tempdir().unwrap();
        check_writable(&folder.path().join("a/b")).unwrap();
        std::fs::write(folder.path().join("file"), "").unwrap();
        let message = check_writable(&folder.path().join("file/b")).unwrap_err().to_string();
        assert!(message.contains("is a file"), "{message}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn links_come_before_dots() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("real/deep")).unwrap();
        symlink("real/deep", root.join("link")).unwrap();
        symlink(root.join("link/new"), root.join("dangling")).unwrap();
        symlink("ring", root.join("ring")).unwrap();
        for (path, expected) in [
            ("link/../st", "real/st"),
            ("./link//a/./b/..", "real/deep/a"),
            ("new/../st", "st"),
            ("dangling/x", "real/deep/new/x"),
            ("real/deep", "real/deep"),
        ] {
            assert_eq!(resolved(&root.join(path)).unwrap(), root.join(expected), "{path}");
        }
        assert!(matches!(resolved(&root.join("ring/x")), Err(Error::NotAStore { .. })));
        assert!(resolved(Path::new("models")).unwrap().is_absolute());
        assert_eq!(resolved(Path::new("/../..")).unwrap(), Path::new("/"));
    }
}
