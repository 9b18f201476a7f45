//! Safetensors files of any bytes, read as a checkpoint.

use std::path::Path;

use layerstore::formats;

/// Opens `bytes` through a file at `path`, and reads all of its tensors where it is a checkpoint; returns whether it is.
///
/// # Panics
/// When opening or reading panics, or an error says nothing.
pub fn run(bytes: &[u8], path: &Path) -> bool {
    std::fs::write(path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let checkpoint = match formats::open(path) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return false;
        }
    };
    let _layers = checkpoint.layers();
    for tensor in checkpoint.tensors().values() {
        let _bytes = checkpoint.bytes(tensor).map_err(|e| e.to_string());
        let _matrix = checkpoint.matrix(tensor).map_err(|e| e.to_string());
        let _finite = checkpoint.refuse_nan(tensor).map_err(|e| e.to_string());
    }
    true
}
