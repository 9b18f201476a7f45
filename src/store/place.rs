//! Where a store's files lie, as its address says.

use std::path::PathBuf;
use std::sync::Arc;

use super::address;
use super::memory::Memory;
use super::s3::{Bucket, StorageOptions};
use crate::error::{Error, Result};

/// Where a store's files lie.
#[derive(Debug, Clone)]
pub enum Place {
    /// In this directory of the local file system.
    Local(PathBuf),
    /// In the memory of this process.
    Memory(Arc<Memory>),
    /// On an object store, which has no locks.
    Remote,
}

/// The schemes of addresses that are no path.
pub const SCHEMES: [&str; 5] = ["s3", "gs", "az", "abfss", "memory"];

/// Schemes of object stores, the feature that builds each in, and whether this build has it.
pub const OBJECT_STORES: [(&str, &str, bool); 3] = [
    ("gs", "gcs", cfg!(feature = "gcs")),
    ("az", "azure", cfg!(feature = "azure")),
    ("abfss", "azure", cfg!(feature = "azure")),
];

/// How addresses on S3 begin.
pub const S3: &str = "s3://";

/// The bucket of an address on S3.
pub fn bucket(uri: &str, options: &StorageOptions) -> Result<Bucket> {
    let name = uri[S3.len()..].split('/').next().unwrap_or_default();
    Bucket::new(name, options).map_err(|reason| Error::NotAStore { path: uri.to_owned(), reason })
}

/// The place behind an address with a scheme.
pub fn elsewhere(scheme: &str, rest: &str) -> Result<Place> {
    let not_a_store = |reason: String| Err(Error::NotAStore { path: format!("{scheme}://{rest}"), reason });
    // Lance drops them.
    if rest.chars().any(char::is_control) || rest.ends_with(char::is_whitespace) {
        return not_a_store("expected an address without control characters, and no space at its end".into());
    }
    match (scheme, OBJECT_STORES.iter().find(|(known, ..)| *known == scheme)) {
        // What stands before an @ may be a secret: the address is not repeated.
        ("s3", _) if rest.contains(['@', '?', '#', '\\']) => Err(Error::NotAStore {
            path: "s3://…".into(),
            reason: "found '@', '?', '#' or '\\', expected s3://BUCKET/PREFIX alone: credentials are given as storage options or in the \
                     environment"
                .into(),
        }),
        // Lance would decode it: two addresses would be of one store, and a key with a '%' of none.
        ("s3" | "gs" | "az" | "abfss", _) if rest.contains('%') => {
            not_a_store("found '%', expected the prefix as it is, without escapes".into())
        }
        ("s3" | "gs" | "az" | "abfss", _) if rest.trim_end_matches('/').contains("//") => {
            not_a_store("found '//', expected one '/' between the parts of the prefix".into())
        }
        // Lance takes an address that is no URL for a path.
        ("s3" | "gs" | "az" | "memory", _) if !is_name(rest) => {
            not_a_store(format!("expected {scheme}://NAME, where NAME has letters, digits, '.', '-' and '_' alone"))
        }
        ("s3", _) => Ok(Place::Remote),
        (_, Some((_, feature, false))) => not_a_store(format!(
            "this layerstore was built without support for {scheme}://, expected one built with `--features {feature}`"
        )),
        (_, Some(_)) if !rest.is_empty() => Ok(Place::Remote),
        ("memory", _) => Ok(Place::Memory(Memory::named(rest.trim_end_matches('/')))),
        _ => not_a_store(format!(
            "'{scheme}://' is no storage that a store can lie on: use a path, s3://BUCKET, gs://BUCKET, az://CONTAINER or \
             memory://NAME"
        )),
    }
}

/// Whether an address goes on with the name of a bucket, or of a store in memory.
fn is_name(rest: &str) -> bool {
    let name = rest.split('/').next().unwrap_or_default();
    !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
}

/// The directory at a path, resolved, and its address: every table, lock and count of files is of this one path. Also the path as it
/// is, where it is a symbolic link.
pub fn local(uri: &str, path: PathBuf) -> Result<(String, Place, Option<PathBuf>)> {
    let not_a_store = |reason: String| Error::NotAStore { path: uri.into(), reason };
    if path.as_os_str().is_empty() {
        return Err(Error::NotAStore { path: "''".into(), reason: "the path is empty".into() });
    }
    // Lance takes a relative name that starts with 'db' for a cloud address.
    let resolved = address::resolved(&path)?;
    if resolved.exists() && !resolved.is_dir() {
        return Err(not_a_store("it is a file; a store is a directory".into()));
    }
    let text = resolved.to_str().ok_or_else(|| not_a_store("the path is not UTF-8".into()))?;
    if let Some(control) = text.chars().find(char::is_ascii_control) {
        return Err(not_a_store(format!(
            "the path holds the control character {control:?}, which Lance's storage cannot name: expected a path without"
        )));
    }
    let is_link = std::fs::symlink_metadata(&path).is_ok_and(|there| there.is_symlink());
    Ok((text.to_owned(), Place::Local(resolved), is_link.then_some(path)))
}
