//! Where the bytes of a data file are read from: the file itself, or pieces of it that were fetched.

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Bytes of a file, at any place.
///
/// # Safety
/// Where [`ReadAt::fill`] returns no error, it has written every byte.
pub unsafe trait ReadAt: Sync {
    /// Reads all of `into` from `at` on.
    ///
    /// # Errors
    /// When the file ends before, or cannot be read.
    fn read_exact_at(&self, into: &mut [u8], at: u64) -> io::Result<()>;

    /// Reads all of `into`, which may be uninitialised, from `at` on.
    ///
    /// # Errors
    /// As [`ReadAt::read_exact_at`].
    fn fill(&self, into: &mut [MaybeUninit<u8>], at: u64) -> io::Result<()>;

    /// Says which bytes are going to be read, in pieces.
    ///
    /// # Errors
    /// When not all of them are there.
    fn announce(&self, _range: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    /// Reads rows into place, and what is in front of each, as many bytes each time, into `between`. Returns false where that cannot be
    /// done at once; the content of both is undefined then.
    ///
    /// # Errors
    /// When the file cannot be read.
    fn scatter(
        &self,
        _at: u64,
        _starts: &[usize],
        _between: &mut [u8],
        _into: &mut [MaybeUninit<u8>],
    ) -> io::Result<bool> {
        Ok(false)
    }
}

// SAFETY: `fill_from` counts what was read.
unsafe impl ReadAt for File {
    fn read_exact_at(&self, into: &mut [u8], at: u64) -> io::Result<()> {
        read_exact_at(self, into, at)
    }

    fn fill(&self, into: &mut [MaybeUninit<u8>], at: u64) -> io::Result<()> {
        fill_from(self, into, at)
    }

    fn scatter(&self, at: u64, starts: &[usize], between: &mut [u8], into: &mut [MaybeUninit<u8>]) -> io::Result<bool> {
        scatter(self, at, starts, between, into)
    }
}

/// The lengths of rows that begin, and end, at these places.
pub fn lengths(starts: &[usize]) -> impl Iterator<Item = usize> {
    starts.windows(2).map(|ends| ends[1] - ends[0])
}

/// Reads rows into place, and what is in front of each, as many bytes each time, into `between`. Returns false where the system does
/// not give all of it at once; the content of both is undefined then.
#[cfg(unix)]
fn scatter(
    file: &File,
    at: u64,
    starts: &[usize],
    between: &mut [u8],
    into: &mut [MaybeUninit<u8>],
) -> io::Result<bool> {
    use std::os::fd::AsRawFd;
    let place = |base: *mut u8, length: usize| libc::iovec { iov_base: base.cast(), iov_len: length };
    let prefix = between.len() / (starts.len() - 1).max(1);
    let (mut places, mut left) = (Vec::with_capacity(2 * starts.len()), &mut *into);
    for (length, before) in lengths(starts).zip(between.chunks_exact_mut(prefix.max(1))) {
        let (row, rest) = left.split_at_mut(length);
        places.extend([place(before.as_mut_ptr(), prefix), place(row.as_mut_ptr().cast(), length)]);
        left = rest;
    }
    let (Ok(count), Ok(offset)) = (libc::c_int::try_from(places.len()), libc::off_t::try_from(at)) else {
        return Ok(false);
    };
    // SAFETY: every place is memory that is borrowed here for writing, and bytes need no value before.
    let read = unsafe { libc::preadv(file.as_raw_fd(), places.as_ptr(), count, offset) };
    match usize::try_from(read) {
        Ok(read) => Ok(read == between.len() + into.len()),
        Err(_) => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(false),
            e => Err(e),
        },
    }
}

#[cfg(not(unix))]
fn scatter(_: &File, _: u64, _: &[usize], _: &mut [u8], _: &mut [MaybeUninit<u8>]) -> io::Result<bool> {
    Ok(false)
}

/// Reads all of `into`.
#[cfg(unix)]
fn fill_from(file: &File, into: &mut [MaybeUninit<u8>], at: u64) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match rustix::io::pread(file, &mut into[done..], at.saturating_add(done as u64)) {
            Ok(([], _)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((read, _)) => done += read.len(),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(windows)]
fn fill_from(file: &File, into: &mut [MaybeUninit<u8>], at: u64) -> io::Result<()> {
    into.iter_mut().for_each(|byte| {
        byte.write(0);
    });
    // SAFETY: every byte has just been written.
    read_exact_at(file, unsafe { &mut *(std::ptr::from_mut(into) as *mut [u8]) }, at)
}

/// Reads all of `into` from `at` on.
///
/// # Errors
/// As [`append`].
pub fn read_exact_at(file: &File, into: &mut [u8], at: u64) -> io::Result<()> {
    At { file, range: at..at.saturating_add(into.len() as u64) }.read_exact(into)
}

/// A range of a file, as a stream of its own.
pub struct At<'a> {
    /// The file.
    pub file: &'a File,
    /// The bytes that are left to read.
    pub range: Range<u64>,
}

impl Read for At<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.range.end - self.range.start).unwrap_or(usize::MAX);
        let some = into.len().min(left);
        let read = read_at(self.file, &mut into[..some], self.range.start)?;
        self.range.start += read as u64;
        Ok(read)
    }
}

fn read_at(file: &File, into: &mut [u8], at: u64) -> io::Result<usize> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_at(file, into, at);
    #[cfg(windows)]
    return std::os::windows::fs::FileExt::seek_read(file, into, at);
}
