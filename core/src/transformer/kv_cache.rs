//! Keys and values of the tokens that a decoder has seen.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use half::f16;
use serde::{Deserialize, Serialize};

use crate::attention::CompressedCache;
use crate::error::Error;
use crate::kernels::{SparseRow, accumulate, dots, widen};
use crate::linalg::share_chunks;

/// Numbers of keys from which on all threads add to caches.
const EXTENDED_BY_ALL_FROM: usize = 1 << 14;

/// What keys and values are kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheType {
    /// As they are.
    #[default]
    F32,
    /// Half the memory, to a relative 5e-4.
    F16,
    /// A quarter of the memory: each token's key and value of a head with a scale, to 1/254 of its largest number.
    Int8,
}

impl fmt::Display for CacheType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CacheType::F32 => "f32",
            CacheType::F16 => "f16",
            CacheType::Int8 => "int8",
        })
    }
}

impl FromStr for CacheType {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        [CacheType::F32, CacheType::F16, CacheType::Int8]
            .into_iter()
            .find(|kind| kind.to_string() == name)
            .ok_or_else(|| Error::expected("type of a cache", format!("'{name}'"), "f32, f16 or int8"))
    }
}

/// The keys and values of all blocks of a decoder, for one text.
#[derive(Clone, PartialEq)]
pub struct KvCache {
    kind: CacheType,
    pub(super) blocks: Vec<BlockCache>,
    /// Tokens that all blocks have seen.
    length: usize,
    /// Tokens that the text will have at least.
    expected: usize,
}

impl fmt::Debug for KvCache {
    /// Not the numbers, which are many.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut all = f.debug_struct("KvCache");
        all.field("kind", &self.kind).field("blocks", &self.blocks.len()).field("length", &self.length);
        all.finish_non_exhaustive()
    }
}

/// The keys and values of one block.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum BlockCache {
    /// Of each head of keys, all of them.
    Exact(Vec<HeadCache>),
    /// What attention by codes keeps of them, however many they are.
    Codes(Box<CompressedCache>),
}

/// The keys and values of a head, `[tokens, head_dim]` each.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HeadCache {
    pub(super) keys: Rows,
    pub(super) values: Rows,
}

impl KvCache {
    /// Returns an empty cache for so many blocks, heads of keys, and numbers of a head.
    pub fn new(kind: CacheType, blocks: usize, kv_heads: usize, head_dim: usize) -> Self {
        let rows = Rows { width: head_dim, numbers: Numbers::new(kind) };
        let block = BlockCache::Exact(vec![HeadCache { keys: rows.clone(), values: rows }; kv_heads]);
        KvCache { kind, blocks: vec![block; blocks], length: 0, expected: 0 }
    }

    /// Returns what keys and values are kept as.
    pub fn kind(&self) -> CacheType {
        self.kind
    }

    /// Returns the number of tokens that it holds.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Returns whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Returns the bytes that keys and values take.
    pub fn memory_bytes(&self) -> usize {
        let of_codes = |block: &BlockCache| match block {
            BlockCache::Exact(_) => 0,
            BlockCache::Codes(cache) => {
                4 * (cache.counts.len() + cache.means.len() + cache.recent_codes.len() + cache.recent_values.len())
            }
        };
        self.rows().map(Rows::bytes).sum::<usize>() + self.blocks.iter().map(of_codes).sum::<usize>()
    }

    /// Says that the text will have so many tokens at least: positions that depend on a text's length are those of this one while it is
    /// read in pieces.
    pub fn expect(&mut self, length: usize) {
        self.expected = length;
    }

    /// Returns the length that a text of so many tokens is read as.
    pub(super) fn length_of(&self, tokens: usize) -> usize {
        self.expected.max(tokens)
    }

    /// Makes room for so many more tokens, so that reading them takes no further memory.
    pub fn reserve(&mut self, tokens: usize) {
        self.rows_mut().for_each(|rows| rows.reserve(tokens));
    }

    /// Forgets all tokens but the first `length`; all of them where blocks attend by codes, which cannot be taken back one by one.
    pub fn truncate(&mut self, length: usize) {
        if length < self.length {
            self.undo(length);
        }
    }

    /// Goes back to a length that it had before a read that was not finished.
    pub(super) fn undo(&mut self, length: usize) {
        let is_exact = self.blocks.iter().all(|block| matches!(block, BlockCache::Exact(_)));
        self.length = if is_exact { self.length.min(length) } else { 0 };
        let length = self.length;
        for block in &mut self.blocks {
            match block {
                BlockCache::Exact(heads) => {
                    heads.iter_mut().flat_map(HeadCache::both_mut).for_each(|rows| rows.truncate(length));
                }
                BlockCache::Codes(cache) => {
                    let (batch, heads, codes, dim) = cache.means.dim();
                    **cache = CompressedCache::new(batch, heads, codes, dim);
                }
            }
        }
    }

    /// Counts tokens that every block has seen.
    pub(super) fn seen(&mut self, tokens: usize) {
        self.length += tokens;
    }

    fn rows(&self) -> impl Iterator<Item = &Rows> {
        self.blocks.iter().flat_map(BlockCache::heads).flat_map(|head| [&head.keys, &head.values])
    }

    fn rows_mut(&mut self) -> impl Iterator<Item = &mut Rows> {
        self.blocks.iter_mut().flat_map(BlockCache::heads_mut).flat_map(HeadCache::both_mut)
    }
}

impl HeadCache {
    pub(super) fn both_mut(&mut self) -> [&mut Rows; 2] {
        [&mut self.keys, &mut self.values]
    }

    /// Adds the keys and values `[tokens, kv heads · head_dim]` of tokens to those of all heads.
    pub(super) fn extend(heads: &mut [HeadCache], keys: &[f32], values: &[f32]) {
        let count = heads.len();
        share_chunks(heads, 1, keys.len() >= EXTENDED_BY_ALL_FROM, |number, head| {
            for (new, rows) in [keys, values].into_iter().zip(head[0].both_mut()) {
                new.chunks_exact(rows.width).skip(number).step_by(count).for_each(|row| rows.push(row));
            }
        });
    }
}

impl BlockCache {
    /// Returns the heads of keys; none where it holds codes.
    pub(super) fn heads(&self) -> &[HeadCache] {
        match self {
            BlockCache::Exact(heads) => heads,
            BlockCache::Codes(_) => &[],
        }
    }

    pub(super) fn heads_mut(&mut self) -> &mut [HeadCache] {
        match self {
            BlockCache::Exact(heads) => heads,
            BlockCache::Codes(_) => &mut [],
        }
    }

    /// Returns whether it is of the same sizes as an empty one, tokens aside.
    pub(super) fn is_like(&self, empty: &BlockCache) -> bool {
        match (self, empty) {
            (BlockCache::Exact(own), BlockCache::Exact(other)) => {
                own.len() == other.len() && own.iter().zip(other).all(|(a, b)| a.keys.width == b.keys.width)
            }
            (BlockCache::Codes(own), BlockCache::Codes(other)) => own.means.dim() == other.means.dim(),
            _ => false,
        }
    }
}

/// Rows of equally many numbers.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Rows {
    pub(super) width: usize,
    pub(super) numbers: Numbers,
}

/// The numbers of rows.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Numbers {
    F32(Vec<f32>),
    F16(Vec<f16>),
    /// With each row's scale.
    Int8(Vec<i8>, Vec<f32>),
}

impl Numbers {
    fn new(kind: CacheType) -> Self {
        match kind {
            CacheType::F32 => Numbers::F32(vec![]),
            CacheType::F16 => Numbers::F16(vec![]),
            CacheType::Int8 => Numbers::Int8(vec![], vec![]),
        }
    }
}

impl Rows {
    pub(super) fn len(&self) -> usize {
        let numbers = match &self.numbers {
            Numbers::F32(all) => all.len(),
            Numbers::F16(all) => all.len(),
            Numbers::Int8(all, _) => all.len(),
        };
        numbers / self.width
    }

    fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::F32(all) => 4 * all.len(),
            Numbers::F16(all) => 2 * all.len(),
            Numbers::Int8(all, scales) => all.len() + 4 * scales.len(),
        }
    }

    fn reserve(&mut self, rows: usize) {
        match &mut self.numbers {
            Numbers::F32(all) => all.reserve(rows * self.width),
            Numbers::F16(all) => all.reserve(rows * self.width),
            Numbers::Int8(all, scales) => {
                all.reserve(rows * self.width);
                scales.reserve(rows);
            }
        }
    }

    fn truncate(&mut self, rows: usize) {
        match &mut self.numbers {
            Numbers::F32(all) => all.truncate(rows * self.width),
            Numbers::F16(all) => all.truncate(rows * self.width),
            Numbers::Int8(all, scales) => {
                all.truncate(rows * self.width);
                scales.truncate(rows);
            }
        }
    }

    fn push(&mut self, row: &[f32]) {
        match &mut self.numbers {
            Numbers::F32(all) => all.extend_from_slice(row),
            Numbers::F16(all) => all.extend(row.iter().map(|v| f16::from_f32(*v))),
            Numbers::Int8(all, scales) => {
                let most = row.iter().fold(0f32, |most, v| most.max(v.abs()));
                // A row that is not finite stays so by its scale.
                let sum = row.iter().sum::<f32>() * 0.0;
                let scale = most / 127.0 + sum;
                let steps = if scale > 0.0 { 1.0 / scale } else { 0.0 };
                all.extend(row.iter().map(|v| (v * steps).round() as i8));
                scales.push(scale);
            }
        }
    }

    /// Writes each row's inner product with `x`.
    pub(super) fn dots(&self, rows: Range<usize>, x: &[f32], out: &mut [f32]) {
        let range = rows.start * self.width..rows.end * self.width;
        match &self.numbers {
            Numbers::F32(all) => dots(&all[range], x, out),
            Numbers::F16(all) => dots(&all[range], x, out),
            Numbers::Int8(all, scales) => {
                dots(&all[range], x, out);
                out.iter_mut().zip(&scales[rows]).for_each(|(out, scale)| *out *= scale);
            }
        }
    }

    /// Adds rows, numbered from `first` on, times their weights to `y`.
    pub(super) fn add_weighted(&self, first: usize, weights: &mut SparseRow, y: &mut [f32]) {
        let start = first * self.width;
        match &self.numbers {
            Numbers::F32(all) => accumulate(&all[start..], self.width, 0, weights, y),
            Numbers::F16(all) => accumulate(&all[start..], self.width, 0, weights, y),
            Numbers::Int8(all, scales) => {
                weights.iter_mut().for_each(|(row, weight)| *weight *= scales[first + *row as usize]);
                accumulate(&all[start..], self.width, 0, weights, y);
            }
        }
    }

    /// Returns rows as floats, by way of `scratch` where they are none.
    pub(super) fn floats<'a>(&'a self, rows: Range<usize>, scratch: &'a mut Vec<f32>) -> &'a [f32] {
        let range = rows.start * self.width..rows.end * self.width;
        if let Numbers::F32(all) = &self.numbers {
            return &all[range];
        }
        scratch.resize(range.len(), 0.0);
        match &self.numbers {
            Numbers::F32(_) => {}
            Numbers::F16(all) => widen(&all[range], scratch),
            Numbers::Int8(all, scales) => {
                widen(&all[range], scratch);
                for (row, scale) in scratch.chunks_exact_mut(self.width).zip(&scales[rows]) {
                    row.iter_mut().for_each(|v| *v *= scale);
                }
            }
        }
        scratch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_have_their_own_rows() {
        for (kind, bytes) in [(CacheType::F32, 4 * 16), (CacheType::F16, 2 * 16), (CacheType::Int8, 16 + 4 * 16)] {
            let mut cache = KvCache::new(kind, 2, 2, 1);
            for block in &mut cache.blocks {
                HeadCache::extend(block.heads_mut(), &[1.0, 2.0, 3.0, 4.0], &[5.0, 6.0, 7.0, 8.0]);
            }
            cache.seen(2);
            let head = &cache.blocks[1].heads()[1];
            let floats = |rows: &Rows| rows.floats(0..2, &mut vec![]).to_vec();
            assert_eq!((floats(&head.keys), floats(&head.values)), (vec![2.0, 4.0], vec![6.0, 8.0]));
            assert_eq!((cache.len(), cache.memory_bytes(), head.keys.len()), (2, bytes, 2));
            assert_eq!(kind.to_string().parse::<CacheType>().unwrap(), kind);
            cache.truncate(1);
            assert_eq!(cache.blocks[0].heads()[0].keys.floats(0..1, &mut vec![]), [1.0]);
            assert!(!cache.is_empty() && cache.memory_bytes() == bytes / 2);
        }
        assert!("q4".parse::<CacheType>().is_err());
    }

    #[test]
    fn rows_that_are_not_finite_stay_so() {
        for wrong in [f32::NAN, f32::INFINITY] {
            for kind in [CacheType::F32, CacheType::F16, CacheType::Int8] {
                let mut rows = Rows { width: 2, numbers: Numbers::new(kind) };
                rows.push(&[1.0, wrong]);
                let mut out = [0.0];
                rows.dots(0..1, &[1.0, 1.0], &mut out);
                assert!(!out[0].is_finite(), "{kind}: {out:?}");
            }
        }
    }
}
