//! Records what a program does to the files below one directory, for simulated losses of power. It is loaded with
//! `LD_PRELOAD`, and stands before the functions of the C library that change files.
//!
//! | variable | |
//! |---|---|
//! | `LAYERSTORE_RECORD_LOG` | the file that operations are appended to |
//! | `LAYERSTORE_RECORD_ROOT` | the directory, an absolute path without symbolic links |
//! | `LAYERSTORE_RECORD_STOP` | the program kills itself after this operation, counted from 1; optional |
//!
//! Without the first two, nothing is recorded. An operation that succeeded is written as six numbers of 64 bits, little
//! endian: its letter, an inode, another number, and the lengths of two paths and of bytes, which follow.
//!
//! | letter | operation | inode | number | paths | bytes |
//! |---|---|---|---|---|---|
//! | `C` | a new file | its own | | its own | |
//! | `W` | a write | of the file | offset | | what was written |
//! | `T` | a new length | of the file | length | | |
//! | `F` | a sync of a file | of the file | | | |
//! | `S` | a sync of a directory | | | its own | |
//! | `R`, `L` | a rename, a hard link | | | from, to | |
//! | `M`, `D` | a directory made, removed | | | its own | |
//! | `U` | a name removed | | | its own | |
//!
//! A sync is recorded and not done: what reads the log decides what was on the disk. The program is ended where it changes
//! files in a way that is not recorded, so that a log has all or there is none.

// What each function may be called with is said by the C library.
#![allow(clippy::missing_safety_doc)]

mod calls;
mod refused;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Where operations are written, and what was written so far.
struct Recorder {
    root: Vec<u8>,
    log: c_int,
    /// The operation after which the program kills itself.
    stop: Option<u64>,
    /// Operations so far. Held during each of them, so that the log has them in the order in which they were done.
    count: Mutex<u64>,
}

/// One operation, as it is written.
#[derive(Default)]
struct Operation<'a> {
    letter: u8,
    inode: u64,
    number: u64,
    paths: [&'a [u8]; 2],
    bytes: &'a [u8],
}

static RECORDER: OnceLock<Option<Recorder>> = OnceLock::new();

/// The recorder, where the environment asks for one.
fn recorder() -> Option<&'static Recorder> {
    RECORDER.get_or_init(Recorder::from_environment).as_ref()
}

/// The recorder, where a file is one that is recorded.
fn recorder_of(fd: c_int) -> Option<&'static Recorder> {
    // The standard streams are no files of the directory, and messages go there.
    let recorder = recorder().filter(|_| fd > 2)?;
    path_of(fd).is_some_and(|path| recorder.has(&path)).then_some(recorder)
}

impl Recorder {
    fn from_environment() -> Option<Recorder> {
        let mut path = std::env::var_os("LAYERSTORE_RECORD_LOG")?.into_vec();
        let root = std::env::var_os("LAYERSTORE_RECORD_ROOT")?.into_vec();
        let stop = std::env::var("LAYERSTORE_RECORD_STOP").ok().and_then(|stop| stop.parse().ok());
        path.push(0);
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND | libc::O_CLOEXEC;
        // SAFETY: the path ends with a zero byte.
        let log = unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0o644) };
        match c_int::try_from(log) {
            Ok(log) if log >= 0 => Some(Recorder { root, log, stop, count: Mutex::new(0) }),
            _ => give_up("the log cannot be opened"),
        }
    }

    /// Whether a path is the directory or below it.
    fn has(&self, path: &[u8]) -> bool {
        path.strip_prefix(&self.root[..]).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes an operation, with one call; kills the program if that was the last one.
    fn write(&self, count: &mut u64, operation: &Operation) {
        let Operation { letter, inode, number, paths, bytes } = operation;
        let lengths = [paths[0].len(), paths[1].len(), bytes.len()].map(|length| length as u64);
        let mut record: Vec<u8> = [u64::from(*letter), *inode, *number, lengths[0], lengths[1], lengths[2]]
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .collect();
        [paths[0], paths[1], bytes].into_iter().for_each(|part| record.extend_from_slice(part));
        // SAFETY: so many bytes are there.
        let written = unsafe { libc::syscall(libc::SYS_write, self.log, record.as_ptr(), record.len()) };
        if usize::try_from(written) != Ok(record.len()) {
            give_up("the log cannot be written");
        }
        *count += 1;
        if self.stop == Some(*count) {
            // SAFETY: takes numbers alone.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
    }
}

/// Ends the program with a message.
fn give_up(what: &str) -> ! {
    let message = format!("layerstore-recorder: {what}\n");
    // SAFETY: so many bytes are there.
    unsafe { libc::syscall(libc::SYS_write, 2, message.as_ptr(), message.len()) };
    // SAFETY: takes nothing.
    unsafe { libc::abort() }
}

/// The path that a symbolic link holds.
fn linked(link: &CStr) -> Option<Vec<u8>> {
    let mut path = vec![0; libc::PATH_MAX as usize];
    // SAFETY: the link's path ends with a zero byte, and there is room for so many bytes.
    let length = unsafe {
        libc::syscall(
            libc::SYS_readlinkat,
            libc::AT_FDCWD,
            link.as_ptr(),
            path.as_mut_ptr().cast::<c_void>(),
            path.len(),
        )
    };
    path.truncate(usize::try_from(length).ok()?);
    Some(path)
}

/// The path of an open file, or directory.
fn path_of(fd: c_int) -> Option<Vec<u8>> {
    linked(&std::ffi::CString::new(format!("/proc/self/fd/{fd}")).ok()?)
}

/// A path as an absolute one, without `.` and `..`; `None` where it cannot be told.
///
/// # Safety
/// The path has to end with a zero byte, or be null.
unsafe fn absolute(directory: c_int, path: *const c_char) -> Option<Vec<u8>> {
    if path.is_null() {
        return None;
    }
    // SAFETY: the caller's.
    let path = unsafe { CStr::from_ptr(path) }.to_bytes();
    let base = match (path.first(), directory) {
        (Some(b'/'), _) => vec![],
        (_, libc::AT_FDCWD) => linked(c"/proc/self/cwd")?,
        (_, fd) => path_of(fd)?,
    };
    let mut parts: Vec<&[u8]> = vec![];
    for part in base.split(|byte| *byte == b'/').chain(path.split(|byte| *byte == b'/')) {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    Some(parts.into_iter().flat_map(|part| [b"/", part]).flatten().copied().collect())
}

/// What the system says of an open file.
fn status(fd: c_int) -> Option<libc::stat> {
    let mut status = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: there is room for the answer, which is there where the call succeeded.
    unsafe { (libc::fstat(fd, status.as_mut_ptr()) == 0).then(|| status.assume_init()) }
}

/// The inode of an open file.
fn inode_of(fd: c_int) -> u64 {
    match status(fd) {
        Some(status) => status.st_ino,
        None => give_up("a file's inode cannot be told"),
    }
}

/// Whether there is something at an absolute path.
fn exists(path: &[u8]) -> bool {
    let Ok(path) = std::ffi::CString::new(path) else { return false };
    // SAFETY: the path ends with a zero byte.
    unsafe { libc::access(path.as_ptr(), libc::F_OK) == 0 }
}

/// A path as text for a message.
fn shown(path: &[u8]) -> String {
    std::ffi::OsStr::from_bytes(path).to_string_lossy().into_owned()
}
