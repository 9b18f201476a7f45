//! From which sizes on a table's rows are indexed and its small fragments are joined.

use super::schema::ARTIFACTS;

/// Numbers of rows at which the tables of a store are kept up; tests make them small.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A catalogue of fewer rows has no index: reading the names of all is faster than any.
    pub indexed_from: u64,
    /// Rows that the index does not cover yet are read by every lookup: with as many, it is made to.
    pub uncovered: u64,
    /// The same two of the list of artifacts, of which a writer reads rows whole.
    pub list: (u64, u64),
    /// Parts of an index are merged with what is added behind them unless they have so many times its rows: they are few, and a row of
    /// theirs is written anew a few times.
    pub growth: u64,
    /// A fragment of as many rows is not joined with others by a commit.
    pub large_fragment: u64,
    /// Fragments of about one size that a commit joins.
    pub joined: usize,
    /// gc joins fragments of fewer rows than the first to ones of as many, where there are more of them than the second. To find a row,
    /// Lance goes through those before it in its fragment, in columns that have one value there.
    pub gc_joins: (u64, usize),
}

impl Limits {
    /// Those of a store.
    pub const DEFAULT: Limits = Limits {
        indexed_from: 32_768,
        uncovered: 16_384,
        list: (4_096, 2_048),
        growth: 4,
        large_fragment: 8_192,
        joined: 8,
        gc_joins: (131_072, 64),
    };

    /// Returns those of a table: from how many rows on it has an index, and how many rows may be uncovered.
    pub fn of(&self, table: &str) -> (u64, u64) {
        match table {
            ARTIFACTS => self.list,
            _ => (self.indexed_from, self.uncovered),
        }
    }
}
