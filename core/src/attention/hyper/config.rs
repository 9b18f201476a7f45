//! The settings of HyperAttention.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Bits of a hash, at most.
const MAX_PROJECTIONS: usize = 24;

/// Keys that are sampled, at most.
const MAX_SAMPLES: usize = 1 << 16;

/// Settings of HyperAttention: how much is computed exactly, and from how large a sample the rest is estimated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table, such as { block_size = 256, sample_size = 256 }")]
pub struct HyperAttention {
    /// Keys of a bucket, at most.
    pub block_size: usize,
    /// Keys that are drawn, with replacement, for those of the other buckets, at most 65,536; 0 leaves them out.
    pub sample_size: usize,
    /// Number of random directions whose signs are the hash, at most 24.
    #[serde(rename = "lsh_num_projs")]
    pub projections: usize,
    /// Fewer queries than these attend exactly; so do causal runs whose second half is shorter.
    pub min_seq_len: usize,
    /// Seed of the random directions and of the sample.
    pub seed: u64,
}

impl Default for HyperAttention {
    /// Returns the settings of the paper's code.
    fn default() -> Self {
        HyperAttention { block_size: 256, sample_size: 256, projections: 7, min_seq_len: 4096, seed: 0 }
    }
}

impl HyperAttention {
    /// Checks the settings by themselves.
    ///
    /// # Errors
    /// When a block is of no keys, there are more projections or samples than allowed, or `min_seq_len` is 0.
    pub fn validate(&self) -> Result<()> {
        for (name, value, range) in [
            ("block_size", self.block_size, 1..=usize::MAX),
            ("sample_size", self.sample_size, 0..=MAX_SAMPLES),
            ("lsh_num_projs", self.projections, 0..=MAX_PROJECTIONS),
            ("min_seq_len", self.min_seq_len, 1..=usize::MAX),
        ] {
            if value < *range.start() {
                return Err(Error::expected(name, value, format!("at least {}", range.start())));
            }
            if value > *range.end() {
                return Err(Error::expected(name, value, format!("at most {}", range.end())));
            }
        }
        Ok(())
    }

    /// Returns the number of blocks of this many keys, which are as even as can be.
    pub(super) fn blocks(&self, keys: usize) -> usize {
        keys.div_ceil(self.block_size).max(1)
    }
}
