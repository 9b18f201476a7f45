//! The halving of a causal attention into parts that are not causal.

use std::ops::Range;

/// Queries, and the keys that all of them see, for each part of a level.
pub(super) type Level = Vec<(Range<usize>, Range<usize>)>;

/// Returns the parts of each level, the whole sequence first, and the runs of a causal attention that are left, which attend to
/// themselves. Runs whose second half is shorter than `min_seq_len` are not halved.
pub(super) fn levels(queries: usize, keys: usize, causal: bool, min_seq_len: usize) -> (Vec<Level>, Vec<Range<usize>>) {
    if !causal {
        return (vec![vec![(0..queries, 0..keys)]], vec![]);
    }
    let (mut levels, mut runs) = (vec![], std::iter::once(0..queries).collect::<Vec<_>>());
    // Where its second half would attend exactly, so does the whole run.
    let split = |run: &Range<usize>| run.len() > 1 && run.len().div_ceil(2) >= min_seq_len;
    while runs.iter().any(split) {
        let (mut level, mut halves) = (vec![], vec![]);
        for run in runs {
            // A run of one token fewer than its neighbour may be short enough: its second half is empty.
            let middle = if split(&run) { run.start + run.len() / 2 } else { run.end };
            level.push((middle..run.end, if middle < run.end { run.start..middle } else { 0..0 }));
            halves.extend([run.start..middle, middle..run.end]);
        }
        levels.push(level);
        runs = halves;
    }
    (levels, runs)
}
