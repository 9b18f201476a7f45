//! Bytes in a fuzzer's place, for tests that have to be the same each time.

/// Returns the seeds of a test: 0 to `count`, or, where `LAYERSTORE_SEEDS` is set to `FIRST..END`, those.
///
/// # Panics
/// When the variable holds anything else.
pub fn seeds(count: u64) -> std::ops::Range<u64> {
    let Ok(range) = std::env::var("LAYERSTORE_SEEDS") else { return 0..count };
    let parsed = range.split_once("..").and_then(|(first, end)| Some(first.parse().ok()?..end.parse().ok()?));
    parsed.unwrap_or_else(|| panic!("LAYERSTORE_SEEDS: found '{range}', expected FIRST..END"))
}

/// Returns `length` bytes, or up to seven more, that a seed stands for (SplitMix64).
pub fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31).to_le_bytes()
    };
    (0..length.div_ceil(8)).flat_map(|_| next()).collect()
}
