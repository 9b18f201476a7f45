//! Rows and numbers of a file, read straight into place: by several threads where there is much, and without clearing the
//! memory first, which takes as long as reading it does.

use std::io;
use std::mem::MaybeUninit;
use std::sync::OnceLock;

use bytemuck::Pod;

use super::source::{ReadAt, lengths};

/// Bytes read at a time where lengths between short rows have to be taken out. They lie on the stack, since new memory takes longer
/// to get than to fill.
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
pub fn append<T: Pod>(file: &impl ReadAt, at: u64, count: usize, values: &mut Vec<T>) -> io::Result<()> {
    values.reserve_exact(count);
    let spare = bytes(&mut values.spare_capacity_mut()[..count]);
    let share = spare.len().div_ceil(threads_for(spare.len())).max(1);
    let shares = spare.chunks_mut(share).enumerate().collect::<Vec<_>>();
    side_by_side(shares, |(i, into)| file.fill(into, at.saturating_add((i * share) as u64)))?;
    // SAFETY: all `count` numbers behind the last one have been read, and any bytes are a `T`.
    unsafe { values.set_len(values.len() + count) };
    Ok(())
}

/// Reads rows that lie one after another from `at` on, each behind its length in `prefix` bytes (8 at most), into `into`, which they
/// fill. `starts` says where each begins in a column, and where the last ends.
///
/// # Errors
/// As [`append`], and when a length is not that of its row.
pub fn read_rows(
    file: &impl ReadAt,
    at: u64,
    prefix: usize,
    starts: &[usize],
    into: &mut [MaybeUninit<u8>],
) -> io::Result<()> {
    let Some((&first, others)) = starts.split_first() else { return Ok(()) };
    let (rows, threads) = (others.len(), threads_for(into.len()));
    file.announce(at..at.saturating_add((into.len() + rows * prefix) as u64))?;
    // Each thread reads consecutive rows, of about as many bytes as the others'.
    let share = into.len().div_ceil(threads);
    let (mut shares, mut left, mut start) = (Vec::with_capacity(threads), into, 0);
    for thread in 1..=threads {
        let end = match thread == threads {
            true => rows,
            false => starts.partition_point(|&row| row < first + thread * share).clamp(start, rows),
        };
        let (part, rest) = left.split_at_mut(starts[end] - starts[start]);
        shares.push((start..end, part));
        (left, start) = (rest, end);
    }
    side_by_side(shares, |(rows, into)| {
        let at = at + (starts[rows.start] - first + rows.start * prefix) as u64;
        read_share(file, at, prefix, &starts[rows.start..=rows.end], into)
    })
}

/// Reads rows as [`read_rows`] does, on this thread.
fn read_share(
    file: &impl ReadAt,
    mut at: u64,
    prefix: usize,
    mut starts: &[usize],
    mut into: &mut [MaybeUninit<u8>],
) -> io::Result<()> {
    while let Some(first) = lengths(starts).next() {
        let long = first >= SCATTERED_FROM;
        let mut bytes = 0;
        let together = lengths(starts).enumerate().take_while(|&(row, length)| {
            bytes += prefix + length;
            (length >= SCATTERED_FROM) == long && if long { row < SCATTERED_ROWS } else { bytes <= WINDOW }
        });
        // The first is shorter than a window, if it is short.
        let rows = together.count().max(1);
        let (some, rest) = into.split_at_mut(starts[rows] - starts[0]);
        at = match long {
            true => read_long(file, at, prefix, &starts[..=rows], some)?,
            false => read_short(file, at, prefix, &starts[..=rows], some)?,
        };
        (into, starts) = (rest, &starts[rows..]);
    }
    Ok(())
}

/// Reads long rows straight into place, and returns where the file goes on.
fn read_long(
    file: &impl ReadAt,
    at: u64,
    prefix: usize,
    starts: &[usize],
    into: &mut [MaybeUninit<u8>],
) -> io::Result<u64> {
    let mut between = vec![0; (starts.len() - 1) * prefix];
    let end = at + (between.len() + into.len()) as u64;
    if !file.scatter(at, starts, &mut between, into)? {
        let (mut at, mut left) = (at, into);
        for (length, before) in lengths(starts).zip(between.chunks_exact_mut(prefix)) {
            let (row, rest) = left.split_at_mut(length);
            file.read_exact_at(before, at)?;
            file.fill(row, at + prefix as u64)?;
            (at, left) = (at + (prefix + length) as u64, rest);
        }
    }
    lengths(starts).zip(between.chunks_exact(prefix)).try_for_each(|(length, found)| check_length(found, length))?;
    Ok(end)
}

/// Reads short rows together and copies each to its place, and returns where the file goes on.
fn read_short(
    file: &impl ReadAt,
    at: u64,
    prefix: usize,
    starts: &[usize],
    into: &mut [MaybeUninit<u8>],
) -> io::Result<u64> {
    let mut window = [0; WINDOW];
    let bytes = into.len() + (starts.len() - 1) * prefix;
    let window = window.get_mut(..bytes).ok_or_else(|| io::Error::other("short rows that are no window"))?;
    file.read_exact_at(window, at)?;
    let (mut window, mut left) = (&*window, into);
    for length in lengths(starts) {
        let (before, others) = window.split_at(prefix);
        check_length(before, length)?;
        let (row, others) = others.split_at(length);
        let (place, rest) = left.split_at_mut(length);
        place.write_copy_of_slice(row);
        (window, left) = (others, rest);
    }
    Ok(at + bytes as u64)
}

/// Checks the length that stands before a row.
fn check_length(found: &[u8], length: usize) -> io::Result<()> {
    match (length as u64).to_le_bytes().get(..found.len()) == Some(found) {
        true => Ok(()),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "a row is of another length than its page says")),
    }
}

/// Returns on how many threads so many bytes are read.
fn threads_for(bytes: usize) -> usize {
    match bytes / SHARE {
        0 | 1 => 1,
        // Asking the system takes a while.
        several => *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, |n| n.get())).min(&several),
    }
}

/// Reads shares of something, the first on this thread and each other on one of its own.
fn side_by_side<S: Send>(shares: Vec<S>, read: impl Fn(S) -> io::Result<()> + Sync) -> io::Result<()> {
    std::thread::scope(|scope| {
        let read = &read;
        let mut shares = shares.into_iter();
        let own = shares.next();
        let others: Vec<_> = shares.map(|share| scope.spawn(move || read(share))).collect();
        let own = own.map_or(Ok(()), read);
        let panicked = |_| Err(io::Error::other("a thread that reads panicked"));
        others.into_iter().fold(own, |so_far, other| so_far.and(other.join().unwrap_or_else(panicked)))
    })
}

fn bytes<T: Pod>(numbers: &mut [MaybeUninit<T>]) -> &mut [MaybeUninit<u8>] {
    // SAFETY: the same memory; bytes that may be uninitialised are all that is said of it.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Rows come out as they are, however long each is and however many threads read; a length that is not a row's is an error.
        #[test]
        fn rows_come_without_their_lengths(
            kinds in proptest::collection::vec((0usize..3000, 1usize..400), 1..5),
            longer in any::<bool>(),
            odd in 0usize..4000,
        ) {
            let mut file = tempfile::tempfile().unwrap();
            let (mut written, mut expected, mut starts): (Vec<u8>, Vec<u8>, Vec<usize>) = (vec![], vec![], vec![5]);
            let lengths = kinds.iter().flat_map(|&(length, rows)| {
                // Now and then one of another length, as the last of a matrix's blocks is.
                (0..rows).map(move |row| if row + 1 == rows { length / 3 } else { length })
            });
            for (row, length) in lengths.enumerate() {
                let values: Vec<u8> = (0..length).map(|i| (i * 7 + row * 13) as u8).collect();
                let told = length + usize::from(row == odd);
                written.extend(&(told as u64).to_le_bytes()[..if longer { 8 } else { 4 }]);
                written.extend(&values);
                expected.extend(&values);
                starts.push(5 + expected.len());
            }
            io::Write::write_all(&mut file, &written).unwrap();
            let mut found = vec![0; expected.len()];
            // SAFETY: bytes that may be uninitialised are all that is said of the same memory.
            let into = unsafe { &mut *(std::ptr::from_mut(&mut found[..]) as *mut [MaybeUninit<u8>]) };
            let read = read_rows(&file, 0, if longer { 8 } else { 4 }, &starts, into);
            prop_assert_eq!(read.is_ok(), odd + 1 >= starts.len());
            if read.is_ok() {
                prop_assert_eq!(&found, &expected);
            }
            let mut words: Vec<u32> = vec![7];
            append(&file, 0, written.len() / 4, &mut words).unwrap();
            prop_assert_eq!(&bytemuck::cast_slice::<u32, u8>(&words[1..]), &&written[..written.len() / 4 * 4]);
            prop_assert!(append(&file, 1, written.len(), &mut Vec::<u8>::new()).is_err() || written.is_empty());
        }
    }
}
