//! Whatever a file of another program holds: a model or an error, and no panic. `cargo fuzz run formats`.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

#[path = "../shared/choices.rs"]
mod choices;
#[path = "../shared/formats.rs"]
mod formats;

use choices::Choices;

static MODELS: LazyLock<Vec<formats::Model>> = LazyLock::new(|| {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/formats");
    let folders = ["gguf", "pytorch", "quantized"].map(|folder| fixtures.join(folder));
    let entries = folders.iter().flat_map(|folder| std::fs::read_dir(folder).expect("fixtures").flatten());
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_none_or(|extension| extension != "py" && extension != "json"));
    paths.sort();
    paths.iter().map(|path| formats::Model::read(path)).collect()
});

static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a temporary folder"));

fuzz_target!(|bytes: &[u8]| {
    for ending in ["gguf", "pt", "bin"] {
        let path = FOLDER.path().join(format!("x.{ending}"));
        std::fs::write(&path, bytes).expect("a file");
        formats::run(&path);
    }
    let mut choices = Choices::new(bytes);
    let model = &MODELS[choices.below(MODELS.len())];
    formats::run(&model.write(FOLDER.path(), Some(&mut choices)));
});
