//! Whatever a `.keras` file holds: a model that runs or an error, and no panic. `cargo fuzz run keras`.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

#[path = "../shared/choices.rs"]
mod choices;
#[path = "../shared/keras.rs"]
mod keras;

use choices::Choices;

static ARCHIVES: LazyLock<Vec<keras::Archive>> = LazyLock::new(|| {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/keras");
    ["functional", "images", "tokens"]
        .iter()
        .map(|name| keras::Archive::read(&fixtures.join(format!("{name}.keras"))))
        .collect()
});

static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a temporary folder"));

fuzz_target!(|bytes: &[u8]| {
    let path = FOLDER.path().join("x.keras");
    keras::run(bytes, &path);
    let mut choices = Choices::new(bytes);
    let archive = &ARCHIVES[choices.below(ARCHIVES.len())];
    keras::run(&archive.changed(&mut choices), &path);
});
