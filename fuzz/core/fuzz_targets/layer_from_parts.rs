//! Whatever parts a layer is read from: a layer that runs or an error, and no panic.
//! `cargo fuzz run --fuzz-dir fuzz/core layer_from_parts`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../shared/choices.rs"]
mod choices;
#[path = "../../shared/parts.rs"]
mod parts;

fuzz_target!(|bytes: &[u8]| {
    parts::run(bytes);
});
