//! Names of the files and folders that Lance and the object store make in a table's directory.

/// The folder of a table that holds its manifests, one for each version.
pub const VERSIONS: &str = "_versions";

/// The file beside a table's manifests in which Lance writes the number of the last version.
pub const VERSION_HINT: &str = "latest_version_hint.json";

/// Returns the version that a manifest's name stands for: counted down from the greatest number, so that the newest comes first, or
/// as it is in older tables. `None` for other files.
pub fn version_of(file: &str) -> Option<u64> {
    let number = file.strip_suffix(".manifest")?;
    let parsed: u64 = number.parse().ok()?;
    Some(if number.len() == 20 { u64::MAX - parsed } else { parsed })
}

/// Returns the names that the manifest of a version may have, as [`version_of`] reads them.
pub fn manifest_names(version: u64) -> [String; 2] {
    [format!("{:020}.manifest", u64::MAX - version), format!("{version}.manifest")]
}

/// Returns whether a file of this name is one that a writer has begun and not moved to its place.
pub fn is_staged(name: &str) -> bool {
    let of_object_store = name
        .rsplit_once('#')
        .is_some_and(|(file, n)| !file.is_empty() && !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
    // A snapshot's file before it has its name.
    let of_lance = name.rsplit_once(".json.tmp.").is_some_and(|(file, id)| !file.is_empty() && !id.is_empty());
    of_object_store || of_lance
}
