//! Reads at an offset of a file, straight into place: by several threads where there is much, and without clearing the
//! memory first, which takes as long as reading it does.

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

use bytemuck::Pod;

/// Bytes read at a time where something between the values has to be taken out. They lie on the stack, since new memory takes
/// longer to get than to fill.
const WINDOW: usize = 16 << 10;

/// Rows of at least so many bytes are read straight into place by `preadv`; for shorter ones a copy is cheaper.
const SCATTERED_FROM: usize = 512;

/// Rows read by one `preadv`: the system takes at most 1024 buffers, two a row.
const SCATTERED_ROWS: usize = 512;

/// Bytes that make a further thread worth starting.
const SHARE: usize = 2 << 20;

static CORES: OnceLock<usize> = OnceLock::new();

/// Reads `count` numbers that lie at `at`, and adds them to `values`.
///
/// # Errors
/// When the file ends before them, or cannot be read.
pub fn append<T: Pod>(file: &File, at: u64, count: usize, values: &mut Vec<T>) -> io::Result<()> {
    values.reserve_exact(count);
    let spare = bytes(&mut values.spare_capacity_mut()[..count]);
    write_with(spare, size_of::<T>(), |first, into| {
        fill(file, into, at.saturating_add(first as u64))?;
        Ok(true)
    })?;
    // SAFETY: all `count` numbers behind the last one have been read, and any bytes are a `T`.
    unsafe { values.set_len(values.len() + count) };
    Ok(())
}

/// Reads rows of `length` bytes that begin at `at`, each behind its length in `prefix` bytes, into `into`, which they
/// fill. Returns false if one of them is of another length; the content of `into` is undefined then.
///
/// # Errors
/// As [`append`].
pub fn read_rows(file: &File, at: u64, prefix: usize, length: usize, into: &mut [MaybeUninit<u8>]) -> io::Result<bool> {
    let stride = prefix + length;
    let expected = (length as u64).to_le_bytes();
    let scattered = length >= SCATTERED_FROM && prefix > 0;
    let step = if scattered { SCATTERED_ROWS } else { (WINDOW / stride).max(1) };
    write_with(into, length, |first, into| {
        let rows = into.len() / length;
        let (mut near, mut window) = ([0; WINDOW], Vec::new());
        for start in (0..rows).step_by(step) {
            let end = (start + step).min(rows);
            let at = at + ((first / length + start) * stride) as u64;
            let into = &mut into[start * length..end * length];
            if scattered {
                window.resize((end - start) * prefix, 0);
                if scatter(file, at, length, &mut window, into)? {
                    if window.chunks_exact(prefix).any(|found| found != &expected[..prefix]) {
                        return Ok(false);
                    }
                    continue;
                }
            }
            let near = match near.get_mut(..(end - start) * stride) {
                Some(near) => near,
                None => {
                    window.resize((end - start) * stride, 0);
                    &mut window
                }
            };
            read_exact_at(file, near, at)?;
            for (place, row) in near.chunks_exact(stride).enumerate() {
                if row[..prefix] != expected[..prefix] {
                    return Ok(false);
                }
                into[place * length..(place + 1) * length].write_copy_of_slice(&row[prefix..]);
            }
        }
        Ok(true)
    })
}

/// Calls `write` for all of `into`, on several threads where there is much: each call gets the number of its first byte
/// and its memory, a whole number of rows of `row` bytes. Returns false where one of them does.
fn write_with(
    into: &mut [MaybeUninit<u8>],
    row: usize,
    write: impl Fn(usize, &mut [MaybeUninit<u8>]) -> io::Result<bool> + Sync,
) -> io::Result<bool> {
    let threads = match into.len() / SHARE {
        0 | 1 => return write(0, into),
        // Asking the system takes a while.
        several => *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, |n| n.get())).min(&several),
    };
    let share = into.len().div_ceil(threads).next_multiple_of(row.max(1));
    std::thread::scope(|scope| {
        let write = &write;
        let mut parts = into.chunks_mut(share).enumerate();
        let own = parts.next();
        let others: Vec<_> = parts.map(|(i, part)| scope.spawn(move || write(i * share, part))).collect();
        let own = own.map_or(Ok(true), |(_, part)| write(0, part));
        let panicked = |_| Err(io::Error::other("a thread that reads panicked"));
        others.into_iter().fold(own, |so_far, other| Ok(other.join().unwrap_or_else(panicked)? & so_far?))
    })
}

fn bytes<T: Pod>(numbers: &mut [MaybeUninit<T>]) -> &mut [MaybeUninit<u8>] {
    // SAFETY: the same memory; bytes that may be uninitialised are all that is said of it.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}

/// Reads rows of `length` bytes into place, and what is in front of each, of one length, into `between`. Returns false
/// where the system does not give all of it at once; the content of both is undefined then.
#[cfg(unix)]
fn scatter(file: &File, at: u64, length: usize, between: &mut [u8], into: &mut [MaybeUninit<u8>]) -> io::Result<bool> {
    use std::os::fd::AsRawFd;
    let prefix = between.len() / (into.len() / length).max(1);
    let place = |base: *mut u8, length: usize| libc::iovec { iov_base: base.cast(), iov_len: length };
    let rows = into.chunks_exact_mut(length).zip(between.chunks_exact_mut(prefix.max(1)));
    let places: Vec<libc::iovec> = rows
        .flat_map(|(row, before)| [place(before.as_mut_ptr(), prefix), place(row.as_mut_ptr().cast(), length)])
        .collect();
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
fn scatter(_: &File, _: u64, _: usize, _: &mut [u8], _: &mut [MaybeUninit<u8>]) -> io::Result<bool> {
    Ok(false)
}

/// Reads all of `into`.
#[cfg(unix)]
fn fill(file: &File, into: &mut [MaybeUninit<u8>], at: u64) -> io::Result<()> {
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
fn fill(file: &File, into: &mut [MaybeUninit<u8>], at: u64) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Rows of one length come out as they are, and others are told from them, however many threads read.
        #[test]
        fn rows_come_without_their_lengths(length in 0usize..3000, rows in 0usize..1500, odd in 0usize..20_000) {
            let mut file = tempfile::tempfile().unwrap();
            let (mut written, mut expected): (Vec<u8>, Vec<u8>) = (vec![], vec![]);
            for row in 0..rows {
                let values: Vec<u8> = (0..length).map(|i| (i * 7 + row * 13) as u8).collect();
                let length = if row == odd { length + 1 } else { length };
                written.extend((length as u32).to_le_bytes());
                written.extend(&values);
                expected.extend(&values);
            }
            io::Write::write_all(&mut file, &written).unwrap();
            let mut found = vec![0; length * rows];
            // SAFETY: bytes that may be uninitialised are all that is said of the same memory.
            let into = unsafe { &mut *(std::ptr::from_mut(&mut found[..]) as *mut [MaybeUninit<u8>]) };
            let even = length == 0 || read_rows(&file, 0, 4, length, into).unwrap();
            prop_assert_eq!(even, odd >= rows || length == 0);
            if even {
                prop_assert_eq!(&found, &expected);
            }
            let mut words: Vec<u32> = vec![7];
            append(&file, 0, written.len() / 4, &mut words).unwrap();
            prop_assert_eq!(&bytemuck::cast_slice::<u32, u8>(&words[1..]), &&written[..written.len() / 4 * 4]);
            prop_assert!(append(&file, 1, written.len(), &mut Vec::<u8>::new()).is_err() || written.is_empty());
        }
    }
}
