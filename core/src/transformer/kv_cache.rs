//! Keys and values of the tokens that a decoder has seen.

use ndarray::{ArrayView2, s};

/// The keys and values of all blocks of a decoder, for one text.
#[derive(Debug, Clone, PartialEq)]
pub struct KvCache {
    blocks: Vec<BlockCache>,
    /// Tokens that all blocks have seen.
    length: usize,
}

/// The keys and values of one block: `[tokens, head_dim]` for each head of keys.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockCache {
    width: usize,
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

impl KvCache {
    /// Returns an empty cache for so many blocks, heads of keys, and numbers of a head.
    pub fn new(blocks: usize, kv_heads: usize, head_dim: usize) -> Self {
        let block = BlockCache { width: head_dim, keys: vec![vec![]; kv_heads], values: vec![vec![]; kv_heads] };
        KvCache { blocks: vec![block; blocks], length: 0 }
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
        let floats = |block: &BlockCache| block.keys.iter().chain(&block.values).map(Vec::len).sum::<usize>();
        4 * self.blocks.iter().map(floats).sum::<usize>()
    }

    /// Forgets all tokens but the first `length`.
    pub fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        for block in &mut self.blocks {
            let most = self.length * block.width;
            block.keys.iter_mut().chain(&mut block.values).for_each(|rows| rows.truncate(most));
        }
    }

    /// Returns one block's part.
    pub(super) fn block(&mut self, block: usize) -> &mut BlockCache {
        &mut self.blocks[block]
    }

    /// Counts tokens that every block has seen.
    pub(super) fn seen(&mut self, tokens: usize) {
        self.length += tokens;
    }
}

impl BlockCache {
    /// Adds the keys and values `[tokens, kv heads · head_dim]` of tokens.
    pub(super) fn extend(&mut self, keys: ArrayView2<f32>, values: ArrayView2<f32>) {
        for (new, all) in [(keys, &mut self.keys), (values, &mut self.values)] {
            for (head, rows) in all.iter_mut().enumerate() {
                let own = new.slice(s![.., head * self.width..(head + 1) * self.width]);
                rows.extend(own.iter());
            }
        }
    }

    /// Returns the keys and the values of a head, `[tokens, head_dim]` each.
    pub(super) fn head(&self, head: usize) -> (ArrayView2<'_, f32>, ArrayView2<'_, f32>) {
        (rows(&self.keys[head], self.width), rows(&self.values[head], self.width))
    }
}

fn rows(all: &[f32], width: usize) -> ArrayView2<'_, f32> {
    ArrayView2::from_shape((all.len() / width, width), all).expect("whole rows")
}

#[cfg(test)]
mod tests {
    use ndarray::arr2;

    use super::*;

    #[test]
    fn heads_have_their_own_rows() {
        let mut cache = KvCache::new(2, 2, 1);
        for block in 0..2 {
            cache.block(block).extend(arr2(&[[1.0, 2.0], [3.0, 4.0]]).view(), arr2(&[[5.0, 6.0], [7.0, 8.0]]).view());
        }
        cache.seen(2);
        let (keys, values) = cache.block(1).head(1);
        assert_eq!((keys, values), (arr2(&[[2.0], [4.0]]).view(), arr2(&[[6.0], [8.0]]).view()));
        assert_eq!((cache.len(), cache.memory_bytes()), (2, 4 * 16));
        cache.truncate(1);
        assert_eq!(cache.block(0).head(0).0, arr2(&[[1.0]]));
        assert!(!cache.is_empty() && cache.memory_bytes() == 32);
    }
}
