//! Stored parts that nobody wrote: the harness of `fuzz/core`, run over a fixed sequence of changes, so that every `cargo test`
//! has some of what a fuzzer looks at. Nothing may panic, and nothing may ask for memory that the parts have no use for.

#[path = "../../fuzz/shared/allocations.rs"]
mod allocations;
#[path = "../../fuzz/shared/choices.rs"]
mod choices;
#[path = "../../fuzz/shared/parts.rs"]
mod parts;
#[path = "../../fuzz/shared/seeded.rs"]
mod seeded;

use parts::Outcome;

/// Far more than the small layers of the harness have use for, and above the 64 MiB of scratch that faer's products reserve on each
/// thread, whatever the sizes (address space: only what is used is touched).
const LARGE: usize = (64 << 20) + 1;

#[test]
fn a_layer_or_an_error() {
    let (mut refused, mut ran) = (0, 0);
    let seeds = seeded::seeds(20_000);
    let least = (seeds.end - seeds.start) / 10;
    for seed in seeds {
        match parts::run(&seeded::bytes(seed, 120)) {
            Outcome::Refused => refused += 1,
            Outcome::Ran => ran += 1,
            Outcome::Wide => {}
        }
        allocations::assert_none_as_large_as(LARGE, &format!("seed {seed}"));
    }
    assert!(refused >= least && ran >= least, "{refused} refused, {ran} ran");
}
