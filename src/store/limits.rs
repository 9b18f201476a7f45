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
    /// Parts of an index that have fewer rows are merged with what is added.
    pub segment: u64,
    /// A fragment of as many rows is not joined with others by a commit.
    pub large_fragment: u64,
    /// Fragments of about one size that a commit joins.
    pub joined: usize,
    /// With more fragments of fewer rows than a part of an index, gc joins them.
    pub fragments: usize,
}

impl Limits {
    /// Those of a store.
    pub const DEFAULT: Limits = Limits {
        indexed_from: 131_072,
        uncovered: 16_384,
        list: (4_096, 2_048),
        segment: 131_072,
        large_fragment: 8_192,
        joined: 8,
        fragments: 64,
    };

    /// Returns those of a table: from how many rows on it has an index, and how many rows may be uncovered.
    pub fn of(&self, table: &str) -> (u64, u64) {
        match table {
            ARTIFACTS => self.list,
            _ => (self.indexed_from, self.uncovered),
        }
    }
}
