//! Calls that are recorded. Each does what the C library's function of its name does, by the system call itself, since a
//! call of the C library's would come back here.

use std::ffi::{c_char, c_int, c_void};

use libc::{AT_FDCWD, mode_t, off64_t, size_t, ssize_t};

use crate::{Operation, absolute, exists, give_up, inode_of, path_of, recorder, recorder_of, shown, status};

/// Opens a file, and records it where that made it or cut it to nothing.
///
/// # Safety
/// As that of `openat`.
unsafe fn opened(directory: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's.
    let open = || unsafe { libc::syscall(libc::SYS_openat, directory, path, flags, mode) as c_int };
    let changes = flags & (libc::O_CREAT | libc::O_TRUNC) != 0 || flags & libc::O_TMPFILE == libc::O_TMPFILE;
    // SAFETY: the caller's.
    let named = || unsafe { absolute(directory, path) };
    let Some((recorder, path)) = recorder().filter(|_| changes).zip(changes.then(named).flatten()) else {
        return open();
    };
    if !recorder.has(&path) {
        return open();
    }
    if flags & libc::O_TMPFILE == libc::O_TMPFILE {
        give_up(&format!("a file without a name, in {}, is not recorded", shown(&path)));
    }
    let mut count = recorder.lock();
    let was_there = exists(&path);
    let fd = open();
    if fd >= 0 && !was_there {
        let operation = Operation { letter: b'C', inode: inode_of(fd), paths: [&path, &[]], ..Operation::default() };
        recorder.write(&mut count, &operation);
    } else if fd >= 0 && flags & libc::O_TRUNC != 0 {
        recorder.write(&mut count, &Operation { letter: b'T', inode: inode_of(fd), ..Operation::default() });
    }
    fd
}

// The mode is an argument of a list of any length in C. On Linux, with the calling conventions of x86-64 and AArch64, it
// lies where a third argument lies, and is nothing where it was not given.

#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's.
    unsafe { opened(AT_FDCWD, path, flags, mode) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's.
    unsafe { opened(AT_FDCWD, path, flags, mode) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(directory: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's.
    unsafe { opened(directory, path, flags, mode) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat64(directory: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: the caller's.
    unsafe { opened(directory, path, flags, mode) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn creat(path: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: the caller's.
    unsafe { opened(AT_FDCWD, path, libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC, mode) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn creat64(path: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: the caller's.
    unsafe { opened(AT_FDCWD, path, libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC, mode) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, bytes: *const c_void, length: size_t) -> ssize_t {
    // SAFETY: the caller's.
    let write = || unsafe { libc::syscall(libc::SYS_write, fd, bytes, length) as ssize_t };
    let Some(recorder) = recorder_of(fd) else { return write() };
    let mut count = recorder.lock();
    let written = write();
    let Ok(size @ 1..) = usize::try_from(written) else { return written };
    // SAFETY: takes numbers alone.
    let end = unsafe { libc::lseek64(fd, 0, libc::SEEK_CUR) };
    let Ok(number) = u64::try_from(end - written as off64_t) else { give_up("an offset cannot be told") };
    // SAFETY: so many bytes were written, so they are there.
    let bytes = unsafe { std::slice::from_raw_parts(bytes.cast::<u8>(), size) };
    let inode = inode_of(fd);
    recorder.write(&mut count, &Operation { letter: b'W', inode, number, bytes, ..Operation::default() });
    written
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate64(fd: c_int, length: off64_t) -> c_int {
    // SAFETY: takes numbers alone.
    let truncate = || unsafe { libc::syscall(libc::SYS_ftruncate, fd, length) as c_int };
    let Some(recorder) = recorder_of(fd) else { return truncate() };
    let mut count = recorder.lock();
    let done = truncate();
    if let (0, Ok(number)) = (done, u64::try_from(length)) {
        recorder.write(&mut count, &Operation { letter: b'T', inode: inode_of(fd), number, ..Operation::default() });
    }
    done
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate(fd: c_int, length: off64_t) -> c_int {
    // SAFETY: the caller's.
    unsafe { ftruncate64(fd, length) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn fsync(fd: c_int) -> c_int {
    let Some(recorder) = recorder_of(fd) else {
        // SAFETY: takes a number alone.
        return unsafe { libc::syscall(libc::SYS_fsync, fd) as c_int };
    };
    let mut count = recorder.lock();
    match (status(fd), path_of(fd)) {
        (Some(status), Some(path)) if status.st_mode & libc::S_IFMT == libc::S_IFDIR => {
            // One that was removed has no entries.
            if status.st_nlink > 0 {
                let operation = Operation { letter: b'S', paths: [&path, &[]], ..Operation::default() };
                recorder.write(&mut count, &operation);
            }
        }
        (Some(status), _) => {
            recorder.write(&mut count, &Operation { letter: b'F', inode: status.st_ino, ..Operation::default() });
        }
        _ => give_up("what is synced cannot be told"),
    }
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
    if recorder_of(fd).is_none() {
        // SAFETY: takes a number alone.
        return unsafe { libc::syscall(libc::SYS_fdatasync, fd) as c_int };
    }
    // SAFETY: the caller's.
    unsafe { fsync(fd) }
}

/// Does what changes the entry of one path, and records it.
///
/// # Safety
/// The path has to end with a zero byte.
unsafe fn entry(letter: u8, directory: c_int, path: *const c_char, change: impl Fn() -> c_int) -> c_int {
    let Some(recorder) = recorder() else { return change() };
    // SAFETY: the caller's.
    let path = unsafe { absolute(directory, path) }.filter(|path| recorder.has(path));
    let Some(path) = path else { return change() };
    let mut count = recorder.lock();
    let done = change();
    if done == 0 {
        recorder.write(&mut count, &Operation { letter, paths: [&path, &[]], ..Operation::default() });
    }
    done
}

/// Does what leads from one path to another, and records it.
///
/// # Safety
/// The paths have to end with a zero byte.
unsafe fn entries(
    letter: u8,
    [from, to]: [(c_int, *const c_char); 2],
    is_known: bool,
    change: impl Fn() -> c_int,
) -> c_int {
    let Some(recorder) = recorder() else { return change() };
    // SAFETY: the caller's.
    let paths = unsafe { [absolute(from.0, from.1), absolute(to.0, to.1)] };
    let (from, to) = match paths {
        [Some(from), Some(to)] if recorder.has(&from) && recorder.has(&to) => (from, to),
        [from, to] if [&from, &to].into_iter().flatten().any(|path| recorder.has(path)) => {
            give_up("a rename or a link into the directory, or out of it, is not recorded")
        }
        _ => return change(),
    };
    if !is_known {
        give_up(&format!("this kind of rename, of {}, is not recorded", shown(&from)));
    }
    let mut count = recorder.lock();
    let done = change();
    if done == 0 {
        recorder.write(&mut count, &Operation { letter, paths: [&from, &to], ..Operation::default() });
    }
    done
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn renameat2(
    from_directory: c_int,
    from: *const c_char,
    to_directory: c_int,
    to: *const c_char,
    flags: libc::c_uint,
) -> c_int {
    let is_known = flags & !libc::RENAME_NOREPLACE == 0;
    // SAFETY: the caller's.
    unsafe {
        entries(b'R', [(from_directory, from), (to_directory, to)], is_known, || {
            libc::syscall(libc::SYS_renameat2, from_directory, from, to_directory, to, flags) as c_int
        })
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn renameat(
    from_directory: c_int,
    from: *const c_char,
    to_directory: c_int,
    to: *const c_char,
) -> c_int {
    // SAFETY: the caller's.
    unsafe { renameat2(from_directory, from, to_directory, to, 0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    // SAFETY: the caller's.
    unsafe { renameat2(AT_FDCWD, from, AT_FDCWD, to, 0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn linkat(
    from_directory: c_int,
    from: *const c_char,
    to_directory: c_int,
    to: *const c_char,
    flags: c_int,
) -> c_int {
    // A link to an open file, or to what a symbolic link leads to, is not named by its own path.
    let is_known = flags == 0;
    // SAFETY: the caller's.
    unsafe {
        entries(b'L', [(from_directory, from), (to_directory, to)], is_known, || {
            libc::syscall(libc::SYS_linkat, from_directory, from, to_directory, to, flags) as c_int
        })
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn link(from: *const c_char, to: *const c_char) -> c_int {
    // SAFETY: the caller's.
    unsafe { linkat(AT_FDCWD, from, AT_FDCWD, to, 0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mkdirat(directory: c_int, path: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: the caller's.
    unsafe { entry(b'M', directory, path, || libc::syscall(libc::SYS_mkdirat, directory, path, mode) as c_int) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mkdir(path: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: the caller's.
    unsafe { mkdirat(AT_FDCWD, path, mode) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlinkat(directory: c_int, path: *const c_char, flags: c_int) -> c_int {
    let letter = if flags & libc::AT_REMOVEDIR == 0 { b'U' } else { b'D' };
    // SAFETY: the caller's.
    unsafe { entry(letter, directory, path, || libc::syscall(libc::SYS_unlinkat, directory, path, flags) as c_int) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    // SAFETY: the caller's.
    unsafe { unlinkat(AT_FDCWD, path, 0) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rmdir(path: *const c_char) -> c_int {
    // SAFETY: the caller's.
    unsafe { unlinkat(AT_FDCWD, path, libc::AT_REMOVEDIR) }
}
