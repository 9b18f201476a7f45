//! Whatever bytes a checkpoint has: an answer, and no panic. `cargo fuzz run checkpoint`.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

#[path = "../shared/checkpoint.rs"]
mod checkpoint;

static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a temporary folder"));

fuzz_target!(|bytes: &[u8]| {
    checkpoint::run(bytes, &FOLDER.path().join("x.safetensors"));
});
