//! The bytes that usearch writes an index as, checked before usearch reads them.
//!
//! usearch checks little of what it loads: a neighbour's number beyond the nodes, a list longer than its place, or a level that a node
//! does not have makes it read or write memory that is not its own. So every length, level, count and number is checked here.
//!
//! usearch 2's layout, little-endian (`index_dense.hpp`: `save_to_stream`; `index.hpp`: `index_serialized_header_t`, `node_t`):
//!
//! | part | content |
//! |---|---|
//! | matrix | u32 rows, u32 bytes of a row, then the vectors row by row |
//! | head, 64 bytes | `usearch`; u16 major, minor and patch version; a byte each: metric, scalar, key, slot kind; u64 present, deleted, dimensions; a byte: multi; zeros |
//! | graph header | u64 each: nodes, connectivity, connectivity of level 0, highest level, entry node; the rest is left out of an empty graph |
//! | levels | by node, an i16: its highest level |
//! | nodes | by node: u64 key, i16 highest level, then for each level u32 count and u32 neighbours, with room for the connectivity |

use super::options::GraphType;
use crate::error::{Error, Result};

const MAGIC: &[u8] = b"usearch";

/// Bytes of the head.
const HEAD: usize = 64;

/// `metric_kind_t::ip_k`.
const INNER_PRODUCT: u8 = b'i';

/// `scalar_kind_t::u64_k`, of keys.
const U64_KIND: u8 = 14;

/// `scalar_kind_t::u32_k`, of the nodes' numbers.
const U32_KIND: u8 = 15;

/// Versions of usearch whose scalar kinds have today's numbers begin with this minor one.
const OLDEST_MINOR: u16 = 10;

/// Returns the bytes of a component.
fn bytes_of(component: GraphType) -> usize {
    match component {
        GraphType::F32 => 4,
        GraphType::F16 | GraphType::Bf16 => 2,
    }
}

/// Returns the number of `scalar_kind_t`.
fn kind_of(component: GraphType) -> u8 {
    match component {
        GraphType::Bf16 => 4,
        GraphType::F32 => 11,
        GraphType::F16 => 12,
    }
}

/// Returns the squared length of a stored vector; infinite or NaN where a component is.
fn squared_length(component: GraphType, vector: &[u8]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let halves = vector.as_chunks::<2>().0.iter();
    match component {
        GraphType::F32 => vector.as_chunks::<4>().0.iter().map(|b| square(f32::from_le_bytes(*b))).sum(),
        GraphType::F16 => halves.map(|b| square(half::f16::from_le_bytes(*b).to_f32())).sum(),
        GraphType::Bf16 => halves.map(|b| square(half::bf16::from_le_bytes(*b).to_f32())).sum(),
    }
}

/// The longest vector whose inner products with a query of length 1 are certain to stay finite, whatever order they are summed in.
/// usearch is compiled with `-ffast-math`: it may walk in circles where a distance is NaN.
pub(super) const LONGEST: f64 = f32::MAX as f64 / 4.0;

/// What a graph has to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected {
    /// Number of vectors.
    pub rows: usize,
    /// Components of a vector.
    pub dimensions: usize,
    /// Type of a component.
    pub component: GraphType,
    /// Neighbours of a node above level 0; at level 0 there are twice as many.
    pub connectivity: usize,
}

/// Checks that `bytes` are an index in usearch's format, of the expected sizes, that usearch can load and search without leaving its
/// memory: every length is that of the bytes, node i has key i, levels are those of the header, every neighbour is a node of the level
/// that it is met on, and every number is finite.
///
/// # Errors
/// When something else is found; the message says what and where.
pub(super) fn check(bytes: &[u8], expected: &Expected) -> Result<()> {
    let mut reader = Reader { bytes, at: 0 };
    check_matrix(&mut reader, expected)?;
    check_head(&mut reader, expected)?;
    let entry = read_graph_header(&mut reader, expected)?;
    if expected.rows > 0 {
        let levels = read_levels(&mut reader, expected.rows)?;
        check_entry(&entry, &levels)?;
        check_nodes(&mut reader, expected, &levels)?;
    }
    match reader.bytes.len() - reader.at {
        0 => Ok(()),
        rest => Err(wrong("bytes behind the last node", rest, 0)),
    }
}

fn wrong(what: impl std::fmt::Display, found: impl std::fmt::Display, expected: impl std::fmt::Display) -> Error {
    Error::expected(format!("graph of keys: {what}"), found, expected)
}

/// Reads from the front of some bytes.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// Returns the next bytes.
    fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let taken = rest.get(..count).ok_or_else(|| {
            let found = format!("{} bytes from byte {} on", rest.len(), self.at);
            wrong(what, found, format!("{count} bytes"))
        })?;
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn i16(&mut self, what: &str) -> Result<i16> {
        self.array(what).map(i16::from_le_bytes)
    }

    /// Refuses a number that is not the expected one.
    fn exactly(&mut self, what: &str, expected: usize) -> Result<()> {
        let found = self.u64(what)?;
        if found == expected as u64 { Ok(()) } else { Err(wrong(what, found, expected)) }
    }
}

/// Checks the matrix of vectors.
fn check_matrix(reader: &mut Reader, expected: &Expected) -> Result<()> {
    let (rows, width) = (reader.u32("rows of the vectors")?, reader.u32("bytes of a vector")?);
    let row_bytes = expected.dimensions.saturating_mul(bytes_of(expected.component));
    if u64::from(rows) != expected.rows as u64 {
        return Err(wrong("rows of the vectors", rows, expected.rows));
    }
    if u64::from(width) != row_bytes as u64 {
        let of = format!("{row_bytes}, of {} numbers of {:?}", expected.dimensions, expected.component);
        return Err(wrong("bytes of a vector", width, of));
    }
    let vectors = reader.take(expected.rows.saturating_mul(row_bytes), "vectors")?;
    for (row, vector) in vectors.chunks_exact(row_bytes.max(1)).enumerate() {
        let length = squared_length(expected.component, vector).sqrt();
        if !(length.is_finite() && length <= LONGEST) {
            return Err(wrong(
                format!("length of vector {row}"),
                length,
                format!("a finite one of at most {LONGEST:e}"),
            ));
        }
    }
    Ok(())
}

/// Checks usearch's head: what the numbers are.
fn check_head(reader: &mut Reader, expected: &Expected) -> Result<()> {
    let mut head = Reader { bytes: reader.take(HEAD, "head")?, at: 0 };
    let magic = head.take(MAGIC.len(), "magic")?;
    if magic != MAGIC {
        return Err(wrong("magic", format!("{magic:?}"), format!("{MAGIC:?}, 'usearch'")));
    }
    let [major, minor, _patch] =
        [head.array("version")?, head.array("version")?, head.array("version")?].map(u16::from_le_bytes);
    if major != 2 || minor < OLDEST_MINOR {
        return Err(wrong("version", format!("{major}.{minor}"), format!("2.{OLDEST_MINOR} or later, below 3")));
    }
    let kinds: [u8; 4] = head.array("kinds")?;
    let wanted = [INNER_PRODUCT, kind_of(expected.component), U64_KIND, U32_KIND];
    for ((what, found), wanted) in
        ["metric kind", "scalar kind", "key kind", "slot kind"].into_iter().zip(kinds).zip(wanted)
    {
        if found != wanted {
            return Err(wrong(what, found, format!("{wanted}, of {expected:?}")));
        }
    }
    head.exactly("keys that are present", expected.rows)?;
    head.exactly("keys that were deleted", 0)?;
    head.exactly("dimensions", expected.dimensions)?;
    match head.array("multi")? {
        [0] => Ok(()),
        [multi] => Err(wrong("multi", multi, "0, one vector a key")),
    }
}

/// Where searches begin.
struct Entry {
    max_level: u64,
    node: u64,
}

fn read_graph_header(reader: &mut Reader, expected: &Expected) -> Result<Entry> {
    reader.exactly("nodes", expected.rows)?;
    reader.exactly("connectivity", expected.connectivity)?;
    reader.exactly("connectivity of level 0", base_connectivity(expected))?;
    Ok(Entry { max_level: reader.u64("highest level")?, node: reader.u64("entry node")? })
}

/// Returns the neighbours of a node at level 0, at most.
fn base_connectivity(expected: &Expected) -> usize {
    expected.connectivity.saturating_mul(2)
}

/// Reads each node's highest level.
fn read_levels(reader: &mut Reader, rows: usize) -> Result<Vec<u16>> {
    let bytes = reader.take(rows.saturating_mul(2), "levels")?;
    let levels = bytes.as_chunks::<2>().0.iter().map(|b| i16::from_le_bytes(*b)).enumerate();
    levels
        .map(|(node, level)| {
            u16::try_from(level).map_err(|_| wrong(format!("level of node {node}"), level, "at least 0"))
        })
        .collect()
}

/// Checks that searches begin at a node of the highest level.
fn check_entry(entry: &Entry, levels: &[u16]) -> Result<()> {
    let level = usize::try_from(entry.node).ok().and_then(|node| levels.get(node));
    let level = level.ok_or_else(|| wrong("entry node", entry.node, format!("below {}", levels.len())))?;
    match u64::from(*level) == entry.max_level {
        true => Ok(()),
        false => Err(wrong("highest level", entry.max_level, format!("{level}, the entry node's"))),
    }
}

/// Checks each node's key, level and neighbours.
fn check_nodes(reader: &mut Reader, expected: &Expected, levels: &[u16]) -> Result<()> {
    for (node, &level) in levels.iter().enumerate() {
        let key = reader.u64("key")?;
        if key != node as u64 {
            return Err(wrong(format!("key of node {node}"), key, node));
        }
        let own = reader.i16("level of a node")?;
        if i32::from(own) != i32::from(level) {
            return Err(wrong(format!("level of node {node}"), own, format!("{level}, as in the list of levels")));
        }
        check_neighbours(reader, node, 0, base_connectivity(expected), levels)?;
        for at in 1..=level {
            check_neighbours(reader, node, at, expected.connectivity, levels)?;
        }
    }
    Ok(())
}

/// Checks a node's neighbours at one level: no more than there is room for, and each of them a node of that level.
fn check_neighbours(reader: &mut Reader, node: usize, level: u16, room: usize, levels: &[u16]) -> Result<()> {
    let count = reader.u32("number of neighbours")? as usize;
    let places = reader.take(room.saturating_mul(4), "neighbours")?;
    if count > room {
        let what = format!("neighbours of node {node} at level {level}");
        return Err(wrong(what, count, format!("at most {room}")));
    }
    for place in &places.as_chunks::<4>().0[..count] {
        let neighbour = u32::from_le_bytes(*place);
        let what = || format!("neighbour of node {node} at level {level}");
        match levels.get(neighbour as usize) {
            None => return Err(wrong(what(), neighbour, format!("below {}", levels.len()))),
            Some(&highest) if highest < level => {
                return Err(wrong(
                    what(),
                    format!("{neighbour}, which has {highest} as its highest level"),
                    "a node of it",
                ));
            }
            Some(_) => {}
        }
    }
    Ok(())
}
