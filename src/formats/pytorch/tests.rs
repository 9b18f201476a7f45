use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::Value as Json;

use super::*;
use crate::formats::{fnv, open};
use crate::layer::DType;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats/pytorch").join(name)
}

fn dtype_named(name: &str) -> DType {
    match name {
        "torch.float32" => DType::F32,
        "torch.float16" => DType::F16,
        "torch.bfloat16" => DType::BF16,
        "torch.int64" => DType::I64,
        "torch.bool" => DType::BOOL,
        "torch.float8_e4m3fn" => DType::F8_E4M3,
        other => panic!("{other}"),
    }
}

/// Every way of saving gives the tensors that were saved, to the bit: views, transposed ones and parts too.
#[test]
fn tensors_are_those_that_were_saved() {
    let references: Json = serde_json::from_slice(&std::fs::read(fixture("references.json")).unwrap()).unwrap();
    let (mut read, sharded) = (0, open(fixture("sharded")).unwrap());
    for (name, tensors) in references.as_object().unwrap() {
        let alone = open(fixture(name)).unwrap();
        for source in if name.starts_with("sharded") { vec![&alone, &sharded] } else { vec![&alone] } {
            for (key, reference) in tensors.as_object().unwrap() {
                let tensor = source.tensor(key).unwrap_or_else(|| panic!("{name}: {key}"));
                assert_eq!(tensor.dtype, dtype_named(reference["dtype"].as_str().unwrap()), "{name}: {key}");
                assert_eq!(serde_json::json!(tensor.shape), reference["shape"], "{name}: {key}");
                assert_eq!(
                    fnv(source.bytes(tensor).unwrap().iter().copied()),
                    reference["hash"].as_str().unwrap(),
                    "{name}: {key}"
                );
                read += 1;
            }
        }
        let count = tensors.as_object().unwrap().len();
        assert_eq!(alone.tensors().len(), count, "{name}");
    }
    assert_eq!(read, 4 * 11 + 2 + 2 * 11);
    assert_eq!(sharded.tensors().len(), 11);
    let notes = open(fixture("training.pt")).unwrap().notes();
    assert!(notes.len() == 1 && notes[0].contains("'epoch' and 2 more"), "{notes:?}");
}

/// Nothing is run, and what would be is named.
#[test]
fn other_pickles_are_refused() {
    for (name, says) in [("hostile.pt", "'posix.system'"), ("whole_module.pt", "Linear'")] {
        let message = open(fixture(name)).unwrap_err().to_string();
        assert!(message.contains(says) && message.contains("state_dict") && message.contains(name), "{message}");
    }
    assert!(!Path::new("hostile").exists());
    let read = |bytes: &[u8]| contents(bytes).map(|contents| contents.tensors.len());
    let bad = |bytes: &[u8], says: &str| {
        let message = read(bytes).unwrap_err();
        assert!(message.contains(says), "{message}");
    };
    bad(b"", "ends at byte 0");
    bad(b"PK\x03\x04", "");
    bad(b"\x80\x02.", "a value is taken");
    bad(b"\x80\x02N.", "does not begin with the number");
    bad(b"\x80\x02c__builtin__\neval\n.", "'__builtin__.eval'");
    bad(b"\x80\x02\x8c\x08builtins\x8c\x04exec\x93.", "'builtins.exec'");
    bad(b"\x80\x02i__builtin__\neval\n.", "opcode 0x69");
    // Depth is no recursion, neither in reading nor in dropping.
    let deep = [&b"\x80\x02)"[..], &[0x85; 2_000_000], b"."].concat();
    bad(&deep, "does not begin");
}

#[test]
fn shards_have_to_be_there() {
    let place = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("sharded")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, place.path().join(path.file_name().unwrap())).unwrap();
    }
    assert_eq!(open(place.path()).unwrap().tensors().len(), 11);
    let second = place.path().join("pytorch_model-00002-of-00002.bin");
    std::fs::copy(place.path().join("pytorch_model-00001-of-00002.bin"), &second).unwrap();
    let message = open(place.path()).unwrap_err().to_string();
    assert!(message.contains("the index says that") && message.contains("00002-of-00002"), "{message}");
    std::fs::remove_file(&second).unwrap();
    assert!(open(place.path()).unwrap_err().to_string().contains("00002-of-00002"));
    let index = place.path().join(INDEX);
    std::fs::write(&index, r#"{"weight_map": {"a": "../../etc/passwd"}}"#).unwrap();
    assert!(open(place.path()).unwrap_err().to_string().contains("beside the index"));
}

proptest! {
    /// Files that are cut or changed anywhere are errors, or other tensors: nothing panics.
    #[test]
    fn damaged_files_are_refused_or_read(
        name in prop::sample::select(vec!["archive.pt", "legacy.bin", "protocol4.pth", "training.pt"]),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..5),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut file = std::fs::read(fixture(name)).unwrap();
        let length = file.len();
        changes.iter().for_each(|(at, byte)| file[at.index(length)] = *byte);
        file.truncate(cut.map_or(length, |at| at.index(length)));
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join(name);
        std::fs::write(&path, file).unwrap();
        if let Ok(source) = PytorchSource::open(&path) {
            source.tensors().values().for_each(|tensor| drop(source.bytes(tensor)));
        }
    }
}
