//! Whatever bytes a checkpoint has: an answer, and no panic. `cargo fuzz run checkpoint`.
#![no_main]

use layerstore::model::Checkpoint;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = tempfile::NamedTempFile::new() else { return };
    if std::fs::write(file.path(), bytes).is_err() {
        return;
    }
    if let Ok(checkpoint) = Checkpoint::open(file.path()) {
        for layer in checkpoint.layers() {
            let _ = checkpoint.bytes(&layer.weight);
            let _ = checkpoint.matrix(&layer.weight);
            let _ = checkpoint.refuse_nan(&layer.weight);
        }
    }
});
