//! Stored bytes that nobody wrote: the harnesses of `fuzz/`, run over a fixed sequence of changes, so that every `cargo test` has
//! some of what a fuzzer looks at. Nothing may panic, and nothing may ask for memory that its file has no use for.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::support::{CHECKPOINT, INT4, KEYS, Place};

#[path = "../../fuzz/shared/allocations.rs"]
mod allocations;
#[path = "../../fuzz/shared/checkpoint.rs"]
mod checkpoint;
#[path = "../../fuzz/shared/choices.rs"]
mod choices;
#[path = "../../fuzz/shared/formats.rs"]
mod formats;
#[path = "../../fuzz/shared/keras.rs"]
mod keras;
#[path = "../../fuzz/shared/rules.rs"]
mod rules;
#[path = "../../fuzz/shared/seeded.rs"]
mod seeded;
#[path = "../../fuzz/shared/store_files.rs"]
mod store_files;

use choices::Choices;

/// More than any of the fixtures' readers has use for.
const LARGE: usize = 256 << 20;

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Counts panics from now on, those that tasks of a runtime turn into errors included.
fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            // Lance's own, when it opens a table, are turned into errors by the store; nobody has to read of them.
            if info.location().is_some_and(|place| place.file().contains("/lance-")) {
                return;
            }
            PANICS.fetch_add(1, Ordering::SeqCst);
            before(info);
        }));
    });
}

#[test]
fn checkpoints() {
    count_panics();
    let place = Place::new();
    let path = place.path("x.safetensors");
    let whole = std::fs::read(CHECKPOINT).unwrap();
    // Most of what is read is the header, at the beginning.
    let header = 8 + usize::try_from(u64::from_le_bytes(whole[..8].try_into().unwrap())).unwrap();
    let (mut opened, mut refused) = (0u64, 0u64);
    let seeds = seeded::seeds(1000);
    let count = seeds.end - seeds.start;
    for seed in seeds {
        let bytes = seeded::bytes(seed, 200);
        let mut choices = Choices::new(&bytes);
        let changed = match choices.below(2) {
            0 => {
                let mut changed = whole.clone();
                choices.mutate(&mut changed);
                changed
            }
            _ => {
                let mut text = whole[8..header].to_vec();
                choices.mutate(&mut text);
                [&(text.len() as u64).to_le_bytes(), &text[..], &whole[header..]].concat()
            }
        };
        let panics = PANICS.load(Ordering::SeqCst);
        match checkpoint::run(&changed, &path) {
            true => opened += 1,
            false => refused += 1,
        }
        assert_eq!(PANICS.load(Ordering::SeqCst), panics, "seed {seed}");
        allocations::assert_none_as_large_as(LARGE, &format!("seed {seed}"));
    }
    assert!(opened >= count / 40 && refused >= count / 4, "{opened} opened, {refused} refused");
}

#[test]
fn files_of_other_programs() {
    count_panics();
    let place = Place::new();
    let fixtures = ["gguf", "pytorch", "quantized"].map(|folder| format!("tests/fixtures/formats/{folder}"));
    let entries = fixtures.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_none_or(|extension| extension != "py" && extension != "json"));
    paths.sort();
    assert_eq!(paths.len(), 20 + 8 + 13);
    let seeds = seeded::seeds(30);
    let (mut opened, mut refused) = (0u64, 0u64);
    for (number, path) in paths.iter().enumerate() {
        let model = formats::Model::read(path);
        for seed in seeds.clone() {
            let panics = PANICS.load(Ordering::SeqCst);
            let bytes = seeded::bytes(seed * 64 + number as u64, 200);
            match formats::run(&model.write(&place.path("models"), Some(&mut Choices::new(&bytes)))) {
                true => opened += 1,
                false => refused += 1,
            }
            assert_eq!(PANICS.load(Ordering::SeqCst), panics, "{}, seed {seed}", path.display());
            allocations::assert_none_as_large_as(LARGE, &format!("{}, seed {seed}", path.display()));
        }
    }
    let all = opened + refused;
    assert!(opened >= all / 8 && refused >= all / 8, "{opened} opened, {refused} refused");
}

#[test]
fn rules_files() {
    count_panics();
    let texts = [INT4, KEYS, "tests/fixtures/backends.toml", "examples/rules/minilm-4bit.toml"];
    let texts = texts.map(|path| std::fs::read(path).unwrap());
    let lines: Vec<&[u8]> = texts.iter().flat_map(|text| text.split(|byte| *byte == b'\n')).collect();
    let (mut parsed, mut refused) = (0u64, 0u64);
    let seeds = seeded::seeds(2000);
    let count = seeds.end - seeds.start;
    for seed in seeds {
        let bytes = seeded::bytes(seed, 200);
        let mut choices = Choices::new(&bytes);
        let mut changed = texts[choices.below(texts.len())].clone();
        match choices.below(2) {
            0 => choices.mutate(&mut changed),
            _ => {
                // A line of any file in the place of one.
                let mut own: Vec<&[u8]> = changed.split(|byte| *byte == b'\n').collect();
                let at = choices.below(own.len());
                own[at] = lines[choices.below(lines.len())];
                changed = own.join(&b'\n');
            }
        }
        let panics = PANICS.load(Ordering::SeqCst);
        match rules::run(&String::from_utf8_lossy(&changed)) {
            true => parsed += 1,
            false => refused += 1,
        }
        assert_eq!(PANICS.load(Ordering::SeqCst), panics, "seed {seed}");
        allocations::assert_none_as_large_as(LARGE, &format!("seed {seed}"));
    }
    assert!(parsed >= count / 100 && refused >= count / 8, "{parsed} parsed, {refused} refused");
}

#[test]
fn keras_archives() {
    count_panics();
    let place = Place::new();
    let path = place.path("x.keras");
    let (mut opened, mut refused) = (0u64, 0u64);
    let seeds = seeded::seeds(400);
    let (least_opened, least_refused) = ((seeds.end - seeds.start) / 8, (seeds.end - seeds.start) / 2);
    for name in ["functional", "images", "tokens"] {
        let archive = keras::Archive::read(Path::new(&format!("tests/fixtures/keras/{name}.keras")));
        for seed in seeds.clone() {
            let changed = archive.changed(&mut Choices::new(&seeded::bytes(seed, 200)));
            let panics = PANICS.load(Ordering::SeqCst);
            match keras::run(&changed, &path) {
                true => opened += 1,
                false => refused += 1,
            }
            assert_eq!(PANICS.load(Ordering::SeqCst), panics, "{name}, seed {seed}");
            allocations::assert_none_as_large_as(LARGE, &format!("{name}, seed {seed}"));
        }
    }
    for seed in 0..200 {
        assert!(!keras::run(&seeded::bytes(seed, seed as usize), &path), "seed {seed}");
    }
    assert!(opened >= least_opened && refused >= least_refused, "{opened} opened, {refused} refused");
}

/// A copy of the store of a format that was kept as it was written.
fn kept_store(format: u32, place: &Place) -> store_files::Kept {
    store_files::Kept::copied(Path::new(&format!("tests/fixtures/store-v{format}/layers")), &place.path("layers"))
}

#[tokio::test(flavor = "multi_thread")]
async fn files_of_a_store() {
    count_panics();
    for (format, seeds) in [(1, seeded::seeds(30)), (2, seeded::seeds(50))] {
        change_files_of(format, seeds).await;
    }
}

async fn change_files_of(format: u32, seeds: Range<u64>) {
    let place = Place::new();
    let kept = kept_store(format, &place);
    let whole = kept.read().await;
    // Three models of ten layers each, by two readers.
    assert_eq!((whole.opened, whole.loaded, whole.refused, whole.corrupt), (2, 60, 0, 0));
    let mut noticed = 0;
    // Two at which Lance panics in the store of format 1 after the table is open: at a type that the manifest names, and at a page of
    // the catalogue.
    for seed in seeds.clone().chain([223, 697]) {
        let panics = PANICS.load(Ordering::SeqCst);
        let outcome = kept.changed(&mut Choices::new(&seeded::bytes(seed, 200))).await;
        assert_eq!(PANICS.load(Ordering::SeqCst), panics, "format {format}, seed {seed}");
        allocations::assert_none_as_large_as(LARGE, &format!("format {format}, seed {seed}"));
        noticed += usize::from(outcome != whole);
    }
    assert!(noticed as u64 >= (seeds.end - seeds.start) / 5, "{noticed} noticed");
    assert_eq!(kept.read().await, whole);
}

/// Every field of the ends of data files changed, at its highest bits and at its lowest: Lance asks for memory by them.
#[tokio::test(flavor = "multi_thread")]
async fn ends_of_data_files() {
    count_panics();
    for (format, weights) in [(1, "weights"), (2, "weight_blocks")] {
        change_ends_of(format, &["layers", "artifacts", weights, "values_d96"]).await;
    }
}

async fn change_ends_of(format: u32, tables: &[&str]) {
    let place = Place::new();
    let kept = kept_store(format, &place);
    let whole = kept.read().await;
    for table in tables {
        // Files of older versions are not read.
        let (mut file, mut good) = (PathBuf::new(), vec![]);
        for other in crate::support::files(&place.path(&format!("layers/{table}.lance/data"))) {
            let bytes = std::fs::read(&other).unwrap();
            std::fs::write(&other, &bytes[..bytes.len() - 1]).unwrap();
            if bytes.len() > good.len() && kept.read().await != whole {
                (file, good) = (other.clone(), bytes.clone());
            }
            std::fs::write(&other, &bytes).unwrap();
        }
        for from_end in [13, 9, 17, 25, 33, 16, 12, 24, 32, 40] {
            let mut bad = good.clone();
            let at = bad.len() - from_end;
            bad[at] ^= 0x41;
            std::fs::write(&file, &bad).unwrap();
            let panics = PANICS.load(Ordering::SeqCst);
            let outcome = kept.read().await;
            std::fs::write(&file, &good).unwrap();
            assert_eq!(PANICS.load(Ordering::SeqCst), panics, "{table}, {from_end} from the end");
            allocations::assert_none_as_large_as(LARGE, &format!("{table}, {from_end} from the end"));
            assert_ne!(outcome, whole, "{table}, {from_end} from the end");
        }
    }
    assert_eq!(kept.read().await, whole);
}
