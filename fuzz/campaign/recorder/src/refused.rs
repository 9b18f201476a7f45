//! Calls that change files in ways that are not recorded: they end the program where the file is one that is recorded.

use std::ffi::{c_char, c_int, c_uint, c_void};

use libc::{AT_FDCWD, iovec, off64_t, size_t, ssize_t};

use crate::{absolute, give_up, path_of, recorder, recorder_of, shown};

/// Ends the program if a file is recorded.
fn refuse(call: &str, fd: c_int) {
    if recorder_of(fd).is_some() {
        let path = path_of(fd).unwrap_or_default();
        give_up(&format!("{call} on {} is not recorded", shown(&path)));
    }
}

/// Ends the program if a path is recorded.
///
/// # Safety
/// The path has to end with a zero byte.
unsafe fn refuse_path(call: &str, directory: c_int, path: *const c_char) {
    let Some(recorder) = recorder() else { return };
    // SAFETY: the caller's.
    if let Some(path) = unsafe { absolute(directory, path) }.filter(|path| recorder.has(path)) {
        give_up(&format!("{call} on {} is not recorded", shown(&path)));
    }
}

/// Functions of a file that pass their arguments on to a system call.
macro_rules! refused {
    ($($name:ident, $call:ident: $fd:ident of ($($arg:ident: $type:ty),*), $($pass:expr),* => $result:ty;)*) => {$(
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> $result {
            refuse(stringify!($name), $fd);
            // SAFETY: the caller's.
            unsafe { libc::syscall(libc::$call, $($pass),*) as $result }
        }
    )*};
}

refused! {
    writev, SYS_writev: fd of (fd: c_int, parts: *const iovec, count: c_int), fd, parts, count => ssize_t;
    pwrite, SYS_pwrite64: fd of (fd: c_int, bytes: *const c_void, length: size_t, at: off64_t),
        fd, bytes, length, at => ssize_t;
    pwrite64, SYS_pwrite64: fd of (fd: c_int, bytes: *const c_void, length: size_t, at: off64_t),
        fd, bytes, length, at => ssize_t;
    pwritev, SYS_pwritev: fd of (fd: c_int, parts: *const iovec, count: c_int, at: off64_t),
        fd, parts, count, at, 0 => ssize_t;
    pwritev64, SYS_pwritev: fd of (fd: c_int, parts: *const iovec, count: c_int, at: off64_t),
        fd, parts, count, at, 0 => ssize_t;
    pwritev2, SYS_pwritev2: fd of (fd: c_int, parts: *const iovec, count: c_int, at: off64_t, flags: c_int),
        fd, parts, count, at, 0, flags => ssize_t;
    pwritev64v2, SYS_pwritev2: fd of (fd: c_int, parts: *const iovec, count: c_int, at: off64_t, flags: c_int),
        fd, parts, count, at, 0, flags => ssize_t;
    copy_file_range, SYS_copy_file_range: to of (
        from: c_int, from_at: *mut off64_t, to: c_int, to_at: *mut off64_t, length: size_t, flags: c_uint
    ), from, from_at, to, to_at, length, flags => ssize_t;
    sendfile, SYS_sendfile: to of (to: c_int, from: c_int, at: *mut off64_t, length: size_t),
        to, from, at, length => ssize_t;
    sendfile64, SYS_sendfile: to of (to: c_int, from: c_int, at: *mut off64_t, length: size_t),
        to, from, at, length => ssize_t;
    splice, SYS_splice: to of (
        from: c_int, from_at: *mut off64_t, to: c_int, to_at: *mut off64_t, length: size_t, flags: c_uint
    ), from, from_at, to, to_at, length, flags => ssize_t;
    fallocate, SYS_fallocate: fd of (fd: c_int, mode: c_int, at: off64_t, length: off64_t),
        fd, mode, at, length => c_int;
    fallocate64, SYS_fallocate: fd of (fd: c_int, mode: c_int, at: off64_t, length: off64_t),
        fd, mode, at, length => c_int;
}

/// Maps memory.
///
/// # Safety
/// As that of `mmap`.
unsafe fn mapped(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    at: off64_t,
) -> *mut c_void {
    let is_shared = matches!(flags & libc::MAP_TYPE, libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE);
    if is_shared && protection & libc::PROT_WRITE != 0 && flags & libc::MAP_ANONYMOUS == 0 {
        refuse("mmap", fd);
    }
    // SAFETY: the caller's.
    unsafe { libc::syscall(libc::SYS_mmap, address, length, protection, flags, fd, at) as *mut c_void }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    at: off64_t,
) -> *mut c_void {
    // SAFETY: the caller's.
    unsafe { mapped(address, length, protection, flags, fd, at) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    at: off64_t,
) -> *mut c_void {
    // SAFETY: the caller's.
    unsafe { mapped(address, length, protection, flags, fd, at) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn truncate(path: *const c_char, length: off64_t) -> c_int {
    // SAFETY: the caller's.
    unsafe {
        refuse_path("truncate", AT_FDCWD, path);
        libc::syscall(libc::SYS_truncate, path, length) as c_int
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn truncate64(path: *const c_char, length: off64_t) -> c_int {
    // SAFETY: the caller's.
    unsafe { truncate(path, length) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn symlinkat(target: *const c_char, directory: c_int, path: *const c_char) -> c_int {
    // SAFETY: the caller's.
    unsafe {
        refuse_path("symlink", directory, path);
        libc::syscall(libc::SYS_symlinkat, target, directory, path) as c_int
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn symlink(target: *const c_char, path: *const c_char) -> c_int {
    // SAFETY: the caller's.
    unsafe { symlinkat(target, AT_FDCWD, path) }
}
