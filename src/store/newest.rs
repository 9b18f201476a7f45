//! A table's newest version, found without a listing of its manifests, of which there may be thousands.
//!
//! Behind each commit, Lance writes the number of the version into a file beside the manifests. The file may be missing, or older than the
//! newest version, so the versions behind it are tried. It may also be damaged, come from a copy that was put over the store, or have been
//! left behind by a writer that does not keep it up while another removed versions: then the times do not fit that the system has written
//! down, one of which no program can set, and the folder is to be listed. Only readers go by it.

use std::fs::{File, Metadata};
use std::path::Path;
use std::time::Duration;
#[cfg(unix)]
use std::time::SystemTime;

use super::layout::{VERSION_HINT, manifest_names, version_of};

/// How far apart the times of a commit's manifest, of the file with its number, and of the last change of the folder may be.
const APART: Duration = Duration::from_secs(5);

/// So many versions behind the last one found are tried.
const TRIED: u64 = 8;

/// What the file says.
#[derive(serde::Deserialize)]
struct Hint {
    version: u64,
}

/// Returns the version that a folder's hint names, which may be older than the newest.
pub fn hinted(folder: &Path) -> Option<u64> {
    let text = std::fs::read(folder.join(VERSION_HINT)).ok()?;
    serde_json::from_slice::<Hint>(&text).ok().map(|hint| hint.version)
}

/// Returns the newest version of a folder of manifests, where its hint can be believed.
pub fn newest(folder: &Path) -> Option<u64> {
    // Opened, since a network file system asks its server then, and may else tell what it remembers.
    let changed = File::open(folder).ok()?.metadata().ok()?;
    let hint = std::fs::metadata(folder.join(VERSION_HINT)).ok()?;
    let first = hinted(folder)?;
    let manifest = manifest(folder, first)?;
    if !is_soon_after(&manifest, &hint)? || !is_soon_after(&hint, &changed)? || was_set(&changed)? {
        return None;
    }
    let (mut newest, mut next) = (first, first.checked_add(1)?);
    while next - newest <= TRIED {
        if self::manifest(folder, next).is_some() {
            newest = next;
        }
        next = next.checked_add(1)?;
    }
    Some(newest)
}

/// The file of a version's manifest, by the first of the names that it may have: the other is that of older tables, and mixed with it.
fn manifest(folder: &Path, version: u64) -> Option<Metadata> {
    let [name, _] = manifest_names(version);
    std::fs::metadata(folder.join(name)).ok().filter(Metadata::is_file)
}

/// Returns the newest version of a folder of manifests by listing it.
pub fn listed(folder: &Path) -> Option<u64> {
    let names = std::fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    // Lance's detached versions, which follow no other, have the highest bit.
    names.filter_map(|name| version_of(&name)).filter(|version| version >> 63 == 0).max()
}

/// Whether the time of a folder's last change is another than that of the change itself, as where a copy was given the times of what it
/// is a copy of.
#[cfg(unix)]
fn was_set(changed: &Metadata) -> Option<bool> {
    use std::os::unix::fs::MetadataExt;
    let set = Duration::new(u64::try_from(changed.ctime()).ok()?, u32::try_from(changed.ctime_nsec()).ok()?);
    let said = changed.modified().ok()?.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(set.abs_diff(said) > Duration::from_millis(100))
}

#[cfg(not(unix))]
fn was_set(_: &Metadata) -> Option<bool> {
    None
}

/// Whether something was last written at the same time as something else, or up to [`APART`] later.
fn is_soon_after(earlier: &Metadata, later: &Metadata) -> Option<bool> {
    let between = later.modified().ok()?.duration_since(earlier.modified().ok()?);
    Some(between.is_ok_and(|between| between <= APART))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, name: &str, text: &str) {
        std::fs::write(folder.join(name), text).unwrap();
    }

    fn commit(folder: &Path, version: u64) {
        write(folder, &manifest_names(version)[0], "");
    }

    fn hint(folder: &Path, version: u64) {
        write(folder, "hint", &format!("{{\"version\":{version}}}"));
        std::fs::rename(folder.join("hint"), folder.join(VERSION_HINT)).unwrap();
    }

    fn age(path: &Path, seconds: u64) {
        let then = SystemTime::now() - Duration::from_secs(seconds);
        File::open(path).unwrap().set_modified(then).unwrap();
    }

    #[test]
    fn the_hint_and_what_came_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert_eq!(newest(folder), None, "there is no hint");
        commit(folder, 1);
        hint(folder, 1);
        assert_eq!(newest(folder), Some(1));
        for version in 2..40 {
            commit(folder, version);
        }
        assert_eq!((hinted(folder), newest(folder)), (Some(1), Some(39)), "the hint was not written again");
        hint(folder, 39);
        assert_eq!(newest(folder), Some(39));
        std::fs::remove_file(folder.join(&manifest_names(39)[0])).unwrap();
        assert_eq!(newest(folder), None, "its manifest is lost");
        for text in ["", "{", "{\"version\":-1}", "{\"version\":18446744073709551615}"] {
            write(folder, VERSION_HINT, text);
            assert_eq!(newest(folder), None, "{text}");
        }
        assert_eq!(newest(&folder.join("none")), None);
    }

    #[test]
    fn a_hint_whose_times_do_not_fit_is_not_believed() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        let manifest = |version| folder.join(&manifest_names(version)[0]);
        // An old version that is kept, and the newest one.
        commit(folder, 3);
        commit(folder, 90);
        hint(folder, 90);
        age(&manifest(3), 5000);
        assert_eq!(newest(folder), Some(90));
        // It was damaged where it lies.
        let then = std::fs::metadata(folder.join(VERSION_HINT)).unwrap().modified().unwrap();
        write(folder, VERSION_HINT, "{\"version\":3}");
        File::open(folder.join(VERSION_HINT)).unwrap().set_modified(then).unwrap();
        assert_eq!(newest(folder), None);
        // It was left behind.
        hint(folder, 3);
        age(&folder.join(VERSION_HINT), 4990);
        assert_eq!(newest(folder), None);
        // It came with a copy of an older store, whose times were put over those that are there.
        age(folder, 4988);
        assert_eq!((newest(folder), listed(folder)), (None, Some(90)));
        assert_eq!(listed(&folder.join("none")), None);
    }
}
