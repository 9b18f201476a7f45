//! Disks that are full: a small one, where the campaign may mount it, and limits of the sizes of files.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::statvfs;
use tempfile::TempDir;

use crate::child::{Limits, Ran, Trouble};
use crate::place::Place;
use crate::step::Step;

/// Steps of a round.
const STEPS: usize = 24;

/// Far more than a round writes.
const DISK_MIB: u64 = 512;

/// A file system in memory that this process alone sees, and that goes with it.
pub struct SmallDisk(TempDir);

impl SmallDisk {
    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Else the folder beneath stays busy until the process ends.
        let _ = nix::mount::umount(self.0.path());
    }
}

/// Mounts a small disk, if this process may; else says why not.
pub fn small_disk() -> Result<Result<SmallDisk, nix::Error>, Trouble> {
    let folder = tempfile::Builder::new().prefix("layerstore-campaign-disk-").tempdir()?;
    let size = format!("size={DISK_MIB}m");
    let mounted = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>))
        .and_then(|()| mount(Some("tmpfs"), folder.path(), Some("tmpfs"), MsFlags::empty(), Some(size.as_str())));
    Ok(mounted.map(|()| SmallDisk(folder)))
}

/// Whether a round is on the small disk, if there is one.
pub fn on_small_disk(seed: u64) -> bool {
    seed.is_multiple_of(2)
}

/// Runs commands that have room for some of what they write.
pub fn round(place: &mut Place) -> Result<(), Trouble> {
    place.begin()?;
    let is_small = statvfs(place.store.folder()).map_err(std::io::Error::from)?.blocks() <= DISK_MIB << 8;
    for _ in 0..STEPS {
        let step = Step::random(&mut place.rng, &place.history, place.inputs);
        // From nothing to a MiB, as often of any order of magnitude.
        let most = 1 << place.rng.u32(..20);
        let room = place.rng.u64(..most);
        place.counts.faults += 1;
        place.attempt(&step, |place, args| match is_small {
            true => with_room(place, room, args),
            false => place.store.disturbed(args, Limits { file_size: Some(room), ..Limits::default() }, |_| false),
        })?;
        place.check(step.depth())?;
    }
    place.finish()
}

/// Runs a command while a file leaves so much room on the disk.
fn with_room(place: &mut Place, room: u64, args: &[String]) -> Result<Ran, Trouble> {
    let filler = Filler(place.store.folder().with_file_name("filler"));
    let disk = statvfs(place.store.folder()).map_err(std::io::Error::from)?;
    let length = (disk.blocks_available() * disk.fragment_size()).saturating_sub(room);
    let length = length.next_multiple_of(disk.fragment_size()).min(disk.blocks_available() * disk.fragment_size());
    if length > 0 {
        let end = i64::try_from(length).map_err(std::io::Error::other)?;
        fallocate(File::create(&filler.0)?, FallocateFlags::empty(), 0, end).map_err(std::io::Error::from)?;
    }
    place.store.disturbed(args, Limits::default(), |_| false)
}

/// A file that takes room until it is dropped.
struct Filler(PathBuf);

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
