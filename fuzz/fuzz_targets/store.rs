//! Whatever a file of a store holds: layers or errors, and no panic. `cargo fuzz run store`.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tokio::runtime::Runtime;

#[path = "../shared/choices.rs"]
mod choices;
#[path = "../shared/store_files.rs"]
mod store_files;

use choices::Choices;
use store_files::Kept;

struct Place {
    kept: Kept,
    runtime: Runtime,
    _folder: tempfile::TempDir,
}

static PLACE: LazyLock<Place> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/store-v1/layers");
    let kept = Kept::copied(&fixture, &folder.path().join("layers"));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let whole = runtime.block_on(kept.read());
    assert_eq!((whole.opened, whole.refused, whole.corrupt), (2, 0, 0), "the fixture itself");
    Place { kept, runtime, _folder: folder }
});

fuzz_target!(|bytes: &[u8]| {
    PLACE.runtime.block_on(PLACE.kept.changed(&mut Choices::new(bytes)));
});
