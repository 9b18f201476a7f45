//! Pieces of a file that were fetched from an object store.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;

use bytes::Bytes;

use super::source::ReadAt;

/// Pieces of a file, by where they begin. None overlaps another.
#[derive(Debug, Default)]
pub struct Fetched(BTreeMap<u64, Bytes>);

/// What is needed of a file, and was not fetched: the reason of an error of [`Fetched`].
#[derive(Debug)]
pub struct Missing(pub Range<u64>);

impl Missing {
    /// Returns what an error says that is missing.
    pub fn of(e: &io::Error) -> Option<Range<u64>> {
        e.get_ref()?.downcast_ref().map(|Missing(range)| range.clone())
    }
}

impl Display for Missing {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "bytes {} to {} were not fetched", self.0.start, self.0.end)
    }
}

impl std::error::Error for Missing {}

impl Fetched {
    /// Adds a piece that was [`Fetched::lacking`].
    pub fn add(&mut self, at: u64, bytes: Bytes) {
        if !bytes.is_empty() {
            self.0.insert(at, bytes);
        }
    }

    /// Returns the pieces that touch a range, by where they begin.
    fn touching(&self, range: Range<u64>) -> impl Iterator<Item = (u64, &Bytes)> {
        let before =
            self.0.range(..range.start).next_back().filter(|(at, bytes)| *at + bytes.len() as u64 > range.start);
        before.into_iter().chain(self.0.range(range)).map(|(at, bytes)| (*at, bytes))
    }

    /// Returns the parts of a range that no piece holds.
    pub fn lacking(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let (mut lacking, mut at) = (vec![], range.start);
        for (start, bytes) in self.touching(range.clone()) {
            if start > at {
                lacking.push(at..start);
            }
            at = at.max(start + bytes.len() as u64);
        }
        if at < range.end {
            lacking.push(at..range.end);
        }
        lacking
    }

    /// Gives the parts of a range, in order.
    fn read(&self, range: Range<u64>, mut give: impl FnMut(&[u8])) -> io::Result<()> {
        if let Some(missing) = self.lacking(range.clone()).into_iter().next() {
            return Err(io::Error::other(Missing(missing)));
        }
        for (start, bytes) in self.touching(range.clone()) {
            let from = range.start.saturating_sub(start) as usize;
            let to = bytes.len().min((range.end - start) as usize);
            give(&bytes[from..to]);
        }
        Ok(())
    }
}

// SAFETY: `read` gives as many bytes as the range has, or an error: no piece is lacking, and none overlaps another.
unsafe impl ReadAt for Fetched {
    fn read_exact_at(&self, into: &mut [u8], at: u64) -> io::Result<()> {
        let end = at.saturating_add(into.len() as u64);
        let mut done = 0;
        self.read(at..end, |part| {
            into[done..done + part.len()].copy_from_slice(part);
            done += part.len();
        })
    }

    fn announce(&self, range: Range<u64>) -> io::Result<()> {
        match self.lacking(range.clone()).is_empty() {
            true => Ok(()),
            false => Err(io::Error::other(Missing(range))),
        }
    }

    fn fill(&self, into: &mut [MaybeUninit<u8>], at: u64) -> io::Result<()> {
        let end = at.saturating_add(into.len() as u64);
        let mut done = 0;
        self.read(at..end, |part| {
            into[done..done + part.len()].write_copy_of_slice(part);
            done += part.len();
        })?;
        assert_eq!(done, into.len(), "a range was given in part");
        Ok(())
    }
}

/// Returns the ranges of a file, in order, those joined that lie closer together than `gap` and have up to `most` bytes together, and
/// longer ones cut into parts of so many.
pub fn joined(mut ranges: Vec<Range<u64>>, gap: u64, most: u64) -> Vec<Range<u64>> {
    ranges.retain(|range| range.start < range.end);
    ranges.sort_by_key(|range| (range.start, range.end));
    let mut all: Vec<Range<u64>> = vec![];
    for range in ranges {
        match all.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            Some(last) if range.start - last.end <= gap && range.end - last.start <= most => last.end = range.end,
            _ => all.push(range),
        }
    }
    let cut = |range: Range<u64>| {
        let starts = (range.start..range.end).step_by(usize::try_from(most.max(1)).unwrap_or(usize::MAX));
        starts.map(move |start| start..range.end.min(start.saturating_add(most)))
    };
    all.into_iter().flat_map(cut).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_are_joined_and_cut() {
        assert_eq!(joined(vec![5..9, 0..3, 9..9, 20..22], 2, 100), [0..9, 20..22]);
        assert_eq!(joined(vec![5..9, 0..3], 1, 100), [0..3, 5..9]);
        assert_eq!(joined(vec![0..3, 4..9], 10, 8), [0..3, 4..9]);
        assert_eq!(joined(vec![0..20, 3..5], 0, 8), [0..8, 8..16, 16..20]);
    }

    proptest! {
        /// What was fetched reads as the file does; of anything else it is said what is missing.
        #[test]
        fn reads_as_the_file(
            fetched in proptest::collection::vec((0u64..200, 0u64..40), 0..8),
            read in (0u64..200, 0usize..60),
        ) {
            let file: Vec<u8> = (0..300u32).map(|i| (i * 31) as u8).collect();
            let mut pieces = Fetched::default();
            let mut has = vec![false; file.len()];
            for (start, length) in fetched {
                let range = start..start + length;
                for lacking in pieces.lacking(range.clone()) {
                    pieces.add(lacking.start, file[lacking.start as usize..lacking.end as usize].to_vec().into());
                }
                has[start as usize..(start + length) as usize].fill(true);
                prop_assert!(pieces.lacking(range).is_empty());
            }
            let (at, length) = read;
            let mut into = vec![0; length];
            let wanted = at as usize..at as usize + length;
            match pieces.read_exact_at(&mut into, at) {
                Ok(()) => prop_assert_eq!(&into[..], &file[wanted.clone()]),
                Err(e) => {
                    let missing = Missing::of(&e).unwrap();
                    prop_assert!(has[missing.start as usize..missing.end as usize].iter().all(|has| !has));
                    prop_assert!(missing.start >= at && missing.end <= at + length as u64);
                }
            }
            let complete = has[wanted].iter().all(|has| *has);
            prop_assert_eq!(pieces.read_exact_at(&mut into, at).is_ok(), complete);
            let mut uninitialised = vec![MaybeUninit::uninit(); length];
            prop_assert_eq!(pieces.fill(&mut uninitialised, at).is_ok(), complete);
            prop_assert_eq!(pieces.announce(at..at + length as u64).is_ok(), complete);
        }
    }
}
