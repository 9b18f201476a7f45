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
    /// The stores of each format that were kept as they were written.
    kept: Vec<Kept>,
    runtime: Runtime,
    _folder: tempfile::TempDir,
}

static PLACE: LazyLock<Place> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let copied = ["store-v1", "store-v2"].map(|name| {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name).join("layers");
        let kept = Kept::copied(&fixture, &folder.path().join(name));
        let whole = runtime.block_on(kept.read());
        assert_eq!((whole.opened, whole.refused, whole.corrupt), (2, 0, 0), "{name} itself");
        kept
    });
    let kept = copied.into();
    Place { kept, runtime, _folder: folder }
});

fuzz_target!(|bytes: &[u8]| {
    let mut choices = Choices::new(bytes);
    let kept = &PLACE.kept[choices.below(PLACE.kept.len())];
    PLACE.runtime.block_on(kept.changed(&mut choices));
});
