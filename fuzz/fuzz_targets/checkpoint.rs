//! Whatever bytes a checkpoint has: an answer, and no panic. `cargo fuzz run checkpoint`.
#![no_main]

use layerstore::formats;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = tempfile::NamedTempFile::new() else { return };
    if std::fs::write(file.path(), bytes).is_err() {
        return;
    }
    if let Ok(checkpoint) = formats::open(file.path()) {
        let _ = checkpoint.layers();
        for tensor in checkpoint.tensors().values() {
            let _ = checkpoint.bytes(tensor);
            let _ = checkpoint.matrix(tensor);
            let _ = checkpoint.refuse_nan(tensor);
        }
    }
});
