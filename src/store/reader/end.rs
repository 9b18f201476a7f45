//! The end of a Lance file, which says where everything else lies, and whether all of that is within the file.
//!
//! The layout is that of Lance's file format from 2.0 on (`file2.proto`): pages and buffers, the schema as the last of them, the
//! description of each column, a table of where these descriptions lie, a table of where the buffers lie, and a footer with the
//! tables' places, the format's version and a magic number.

use std::fs::File;
use std::io;
use std::ops::Range;

use bytes::Bytes;
use lance_file::format::{MAGIC, pbfile};
use lance_file::version::ConcreteFileVersion;
use prost::Message;

use super::page::{contradiction, range};
use super::source::ReadAt;

/// Bytes read at a file's end at first: more than the descriptions of most files.
const TAIL: u64 = 16 << 10;

/// Bytes of a file's footer: three offsets, two counts, the version and the magic number.
const FOOTER: usize = 40;

/// The most rows that a file may claim for each of its bytes. In every table a column counts rows or names them, and none lies in
/// less than a bit a row.
pub const ROWS_PER_BYTE: u64 = 8;

/// Checks that all that a Lance file's end refers to lies within the file: Lance asks for memory by what is written there. The end
/// of a file of another version of the format is not looked at, since no reader here believes it.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] when the file contradicts itself; others when it cannot be read.
pub fn check(file: &File, size: u64) -> io::Result<()> {
    let mut end = End::read(file, size, size.saturating_sub(TAIL))?;
    let footer = Footer::parse(&end.bytes)?;
    if !footer.has_tables() {
        return Ok(());
    }
    footer.require_order(size)?;
    let buffers = pairs(&end.get(file, footer.buffers.clone())?);
    let mut in_buffers = 0u64;
    for &(start, length) in &buffers {
        within((start, length), 0..footer.descriptions, "a buffer")?;
        in_buffers = in_buffers.saturating_add(length);
    }
    if buffers.is_empty() || in_buffers > footer.descriptions {
        return Err(contradiction("it does not hold the buffers that it lists"));
    }
    // All descriptions of columns come one after another: one read for those of wide tables.
    if footer.descriptions < end.start {
        end = End::read(file, size, footer.descriptions)?;
    }
    let descriptions = pairs(&end.get(file, footer.columns.clone())?);
    footer.require_first(&descriptions)?;
    for place in descriptions {
        within(place, footer.descriptions..footer.columns.start, "the description of a column")?;
        let column = pbfile::ColumnMetadata::decode(end.get(file, range(place)?)?)?;
        let mut rows = 0u64;
        let own = (&column.buffer_offsets, &column.buffer_sizes);
        for (offsets, sizes) in column.pages.iter().map(|page| (&page.buffer_offsets, &page.buffer_sizes)).chain([own])
        {
            if offsets.len() != sizes.len() {
                return Err(contradiction("a page's buffers are not as many as their sizes"));
            }
            for place in offsets.iter().copied().zip(sizes.iter().copied()) {
                within(place, 0..footer.descriptions, "a page")?;
            }
        }
        for page in &column.pages {
            rows = rows.saturating_add(page.length);
        }
        require_rows(rows, size)?;
    }
    Ok(())
}

/// Checks that a file of `size` bytes can hold so many rows.
///
/// # Errors
/// When it cannot.
pub fn require_rows(rows: u64, size: u64) -> io::Result<()> {
    match rows / ROWS_PER_BYTE > size {
        true => Err(contradiction("it claims more rows than it can hold")),
        false => Ok(()),
    }
}

/// Checks that something lies where it has to.
///
/// # Errors
/// When it does not.
pub fn within((start, length): (u64, u64), place: Range<u64>, what: &str) -> io::Result<()> {
    match start >= place.start && start.checked_add(length).is_some_and(|end| end <= place.end) {
        true => Ok(()),
        false => Err(contradiction(&format!("{what} leads out of its place"))),
    }
}

/// What the last bytes of a file say.
#[derive(Debug, PartialEq)]
pub struct Footer {
    /// The version of the format; `None` where it is none that is known.
    version: Option<ConcreteFileVersion>,
    /// Where the descriptions of columns begin.
    pub descriptions: u64,
    /// The table of where each column's description lies.
    pub columns: Range<u64>,
    /// The table of where each buffer of the file lies that belongs to no column.
    pub buffers: Range<u64>,
}

impl Footer {
    /// Parses the footer that these bytes end with. Nothing in it is to be believed before its version was looked at.
    ///
    /// # Errors
    /// When there is none.
    pub fn parse(end: &[u8]) -> io::Result<Self> {
        let start = end.len().checked_sub(FOOTER).ok_or_else(|| contradiction("it is too short"))?;
        let footer = &end[start..];
        if &footer[36..] != MAGIC {
            return Err(contradiction("it does not end as a Lance file does"));
        }
        let half = |at: usize| u16::from_le_bytes([footer[at], footer[at + 1]]);
        Ok(Footer {
            version: ConcreteFileVersion::from_footer_numbers(half(32), half(34)).ok(),
            descriptions: footer[..8].try_into().map_or(u64::MAX, u64::from_le_bytes),
            columns: table(footer, 8, 28),
            buffers: table(footer, 16, 24),
        })
    }

    /// Checks that the tables lie one after another, behind the descriptions, and before the footer of a file of `size` bytes.
    ///
    /// # Errors
    /// When they do not.
    pub fn require_order(&self, size: u64) -> io::Result<()> {
        let ordered = self.descriptions <= self.columns.start
            && self.columns.end <= self.buffers.start
            && self.buffers.end <= size.saturating_sub(FOOTER as u64);
        match ordered {
            true => Ok(()),
            false => Err(contradiction("its footer leads out of it")),
        }
    }

    /// Checks that the first description of a column lies where the footer says that they begin.
    ///
    /// # Errors
    /// When it lies elsewhere.
    pub fn require_first(&self, descriptions: &[(u64, u64)]) -> io::Result<()> {
        match descriptions.first() {
            Some(first) if first.0 != self.descriptions => {
                Err(contradiction("the descriptions of its columns begin elsewhere than its footer says"))
            }
            _ => Ok(()),
        }
    }

    /// Returns whether files of the version have these tables.
    fn has_tables(&self) -> bool {
        self.version.is_some_and(|version| version != ConcreteFileVersion::V1)
    }

    /// Returns whether files of the version are read without Lance.
    pub fn is_plain(&self) -> bool {
        matches!(self.version, Some(ConcreteFileVersion::V2_1 | ConcreteFileVersion::V2_2))
    }
}

/// Where a table of offsets and sizes lies: the footer has its start and its count in these places.
fn table(footer: &[u8], start: usize, count: usize) -> Range<u64> {
    let start = footer[start..start + 8].try_into().map_or(u64::MAX, u64::from_le_bytes);
    let count = footer[count..count + 4].try_into().map_or(u32::MAX, u32::from_le_bytes);
    start..start.saturating_add(16 * u64::from(count))
}

/// Returns the offsets and sizes of a table.
pub fn pairs(table: &[u8]) -> Vec<(u64, u64)> {
    let number = |bytes: &[u8]| bytes.try_into().map_or(u64::MAX, u64::from_le_bytes);
    table.chunks_exact(16).map(|pair| (number(&pair[..8]), number(&pair[8..]))).collect()
}

/// The end of a file, as it was read.
pub struct End {
    /// Where it begins in the file.
    pub start: u64,
    /// The bytes from there on.
    pub bytes: Bytes,
}

impl End {
    /// Reads as much of a file's end as most descriptions take.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read_tail(file: &impl ReadAt, size: u64) -> io::Result<Self> {
        Self::read(file, size, size.saturating_sub(TAIL))
    }

    /// Reads a file of `size` bytes from `start` on.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn read(file: &impl ReadAt, size: u64, start: u64) -> io::Result<Self> {
        Ok(End { start, bytes: bytes_at(file, start..size.max(start))? })
    }

    /// Returns bytes of the file: of what has been read of it, or read now.
    ///
    /// # Errors
    /// When the range leads out of the file, or the file cannot be read.
    pub fn get(&self, file: &impl ReadAt, range: Range<u64>) -> io::Result<Bytes> {
        let end = self.start + self.bytes.len() as u64;
        if range.start > range.end || range.end > end {
            return Err(contradiction("a description ends behind the file"));
        }
        match range.start.checked_sub(self.start) {
            Some(from) => Ok(self.bytes.slice(from as usize..(range.end - self.start) as usize)),
            None => bytes_at(file, range),
        }
    }
}

/// These bytes of a file, which must be within it: memory is asked for first.
fn bytes_at(file: &impl ReadAt, range: Range<u64>) -> io::Result<Bytes> {
    let mut bytes = vec![0; usize::try_from(range.end - range.start).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, range.start)?;
    Ok(bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn footer(offsets: [u64; 3], counts: [u32; 2], (major, minor): (u16, u16)) -> Vec<u8> {
        let mut bytes = vec![];
        offsets.iter().for_each(|offset| bytes.extend(offset.to_le_bytes()));
        counts.iter().for_each(|count| bytes.extend(count.to_le_bytes()));
        [major, minor].iter().for_each(|number| bytes.extend(number.to_le_bytes()));
        bytes.extend(MAGIC);
        bytes
    }

    /// Other versions are left to Lance, whatever the rest of the footer is.
    #[test]
    fn versions_come_first() {
        for minor in [1, 2] {
            let found = Footer::parse(&footer([11, 22, 33], [1, 1], (2, minor))).unwrap();
            assert_eq!((found.columns.clone(), found.buffers.clone()), (22..38, 33..49));
            assert!(found.is_plain() && found.has_tables());
        }
        for (version, tables) in [((0, 2), false), ((1, 0), false), ((2, 0), true), ((2, 3), true), ((2, 9), false)] {
            let found = Footer::parse(&footer([11, 22, 33], [u32::MAX; 2], version)).unwrap();
            assert_eq!((found.is_plain(), found.has_tables()), (false, tables), "{version:?}");
        }
        let mut other = footer([11, 22, 33], [1, 1], (2, 1));
        other[39] ^= 1;
        assert_eq!(Footer::parse(&other).unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(Footer::parse(&other[1..]).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    /// A file of a schema of 4 bytes, and one column with a page of 8 bytes.
    struct Small {
        page: (u64, u64),
        rows: u64,
        schema: (u64, u64),
        column: Option<(u64, u64)>,
        offsets: Option<[u64; 3]>,
        counts: [u32; 2],
        /// Whether the footer says that the descriptions begin a byte after they do.
        misplaced: bool,
    }

    impl Default for Small {
        fn default() -> Self {
            Small {
                page: (0, 8),
                rows: 2,
                schema: (8, 4),
                column: None,
                offsets: None,
                counts: [1, 1],
                misplaced: false,
            }
        }
    }

    impl Small {
        fn check(&self) -> io::Result<()> {
            let page = pbfile::column_metadata::Page {
                buffer_offsets: vec![self.page.0],
                buffer_sizes: vec![self.page.1],
                length: self.rows,
                ..Default::default()
            };
            let column = pbfile::ColumnMetadata { pages: vec![page], ..Default::default() }.encode_to_vec();
            let at = 12 + column.len() as u64;
            let mut bytes = vec![7; 12];
            bytes.extend(&column);
            for (start, length) in [self.column.unwrap_or((12, column.len() as u64)), self.schema] {
                bytes.extend(start.to_le_bytes());
                bytes.extend(length.to_le_bytes());
            }
            bytes.extend(footer(
                self.offsets.unwrap_or([12 + u64::from(self.misplaced), at, at + 16]),
                self.counts,
                (2, 1),
            ));
            let mut file = tempfile::tempfile()?;
            file.write_all(&bytes)?;
            check(&file, bytes.len() as u64)
        }
    }

    #[test]
    fn what_leads_out_of_a_file_is_found() {
        Small::default().check().unwrap();
        let far = 1 << 40;
        for bad in [
            Small { page: (0, 13), ..Small::default() },
            Small { page: (far, 8), ..Small::default() },
            Small { page: (u64::MAX, 8), ..Small::default() },
            Small { rows: far, ..Small::default() },
            Small { schema: (8, far), ..Small::default() },
            Small { schema: (13, 0), ..Small::default() },
            Small { column: Some((12, far)), ..Small::default() },
            Small { column: Some((0, 8)), ..Small::default() },
            Small { counts: [1, u32::MAX], ..Small::default() },
            Small { counts: [1 << 31, 1], ..Small::default() },
            Small { counts: [0, 1], ..Small::default() },
            Small { offsets: Some([far, 12, 12]), ..Small::default() },
            Small { misplaced: true, ..Small::default() },
            Small { offsets: Some([12, far, 12]), ..Small::default() },
            Small { offsets: Some([12, 14, u64::MAX]), ..Small::default() },
        ] {
            assert_eq!(bad.check().unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        assert_eq!(check(&tempfile::tempfile().unwrap(), 0).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
