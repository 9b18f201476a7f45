//! Directories and files that cannot be written to.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::child::{Limits, Trouble};
use crate::history::Depth;
use crate::place::Place;
use crate::step::Step;

/// Steps of a round.
const STEPS: usize = 24;

/// Runs commands on a store of which all, a table, or some folder cannot be written to. A store that can only be read is read
/// as ever.
pub fn round(place: &mut Place) -> Result<(), Trouble> {
    place.begin()?;
    for _ in 0..STEPS {
        let step = Step::random(&mut place.rng, &place.history, place.inputs);
        let (mut folders, mut files) = (vec![], vec![]);
        gather(&place.store.path(), &mut folders, &mut files)?;
        folders.sort();
        let at = place.rng.usize(..folders.len());
        let is_whole = place.rng.u8(..3) == 0;
        let root = if is_whole { place.store.path() } else { folders[at].clone() };
        let mut closed: Vec<PathBuf> = match place.rng.u8(..3) {
            0 if !is_whole => vec![root.clone()],
            _ => folders.iter().filter(|folder| folder.starts_with(&root)).cloned().collect(),
        };
        if place.rng.bool() {
            closed.extend(files.into_iter().filter(|file| file.starts_with(&root)));
        }
        place.counts.faults += 1;
        place.attempt(&step, |place, args| {
            let _closed = ReadOnly::new(closed)?;
            let limits = Limits { modes_hold: true, ..Limits::default() };
            let ran = place.store.disturbed(args, limits, |_| false)?;
            if is_whole {
                place.store.limits.modes_hold = true;
                place.check(Depth::Kept)?;
                place.store.limits.modes_hold = false;
            }
            Ok(ran)
        })?;
        place.check(step.depth())?;
    }
    place.finish()
}

/// All folders and files under a folder.
fn gather(folder: &Path, folders: &mut Vec<PathBuf>, files: &mut Vec<PathBuf>) -> Result<(), Trouble> {
    folders.push(folder.to_owned());
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        match path.is_dir() {
            true => gather(&path, folders, files)?,
            false => files.push(path),
        }
    }
    Ok(())
}

/// Paths whose modes allow no writing until this is dropped.
struct ReadOnly(Vec<(PathBuf, u32)>);

impl ReadOnly {
    fn new(paths: Vec<PathBuf>) -> Result<Self, Trouble> {
        let mut closed = ReadOnly(vec![]);
        for path in paths {
            let mode = std::fs::metadata(&path)?.permissions().mode();
            std::fs::set_permissions(&path, Permissions::from_mode(mode & !0o222))?;
            closed.0.push((path, mode));
        }
        Ok(closed)
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        for (path, mode) in self.0.drain(..).rev() {
            // The command may have removed it.
            let _ = std::fs::set_permissions(path, Permissions::from_mode(mode));
        }
    }
}
