use std::path::{Path, PathBuf};

use ndarray::Array2;
use proptest::prelude::*;
use serde_json::Value as Json;

use super::*;
use crate::formats::{SourceContent, fnv};
use crate::layer::Accuracy;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/formats/gguf").join(name)
}

/// Every type gives the weights that gguf-py gives, to the bit, and quantised ones are stored in about the bytes that they take in
/// the file.
#[test]
fn weights_are_those_of_the_reference() {
    let references: Json = serde_json::from_slice(&std::fs::read(fixture("references.json")).unwrap()).unwrap();
    let (mut refused, mut read) = (vec![], 0);
    for (file, tensors) in references.as_object().unwrap() {
        let path = fixture(&format!("{file}.gguf"));
        let source = match GgufSource::open(&path, true) {
            Ok(source) => source,
            Err(e) => {
                refused.push(e.to_string());
                continue;
            }
        };
        let layers = source.layers();
        for (name, reference) in tensors.as_object().unwrap() {
            let name = name.strip_suffix(".weight").unwrap();
            let layer = layers.iter().find(|layer| layer.name == name).unwrap();
            let found = match &layer.content {
                SourceContent::Tensors { weight, .. } => fnv(source
                    .bytes(weight)
                    .map(|bytes| to_f32(weight.dtype, &bytes).unwrap())
                    .unwrap()
                    .into_iter()
                    .flat_map(f32::to_le_bytes)),
                SourceContent::Ready { layer, .. } => {
                    let loaded = layer.load().unwrap();
                    let shape = layer.shape().unwrap();
                    assert_eq!(loaded.to_parts().stored_bytes(), layer.stored_bytes());
                    let bytes = source.file.entries[&format!("{name}.weight")].listed.bytes.len() as f64;
                    assert!(layer.stored_bytes() as f64 <= 1.03 * bytes, "{file}: {}", layer.stored_bytes());
                    // It runs as its weight says.
                    let x = Array2::from_shape_fn((3, shape.in_features), |(i, j)| ((7 * i + j) % 13) as f32 - 6.0);
                    let y = loaded.forward(x.view(), Accuracy::Approximate).unwrap().y;
                    let expected = x.dot(&loaded.weight().unwrap().t());
                    assert!(y.iter().zip(&expected).all(|(y, e)| (y - e).abs() < 1e-3 * e.abs().max(10.0)), "{file}");
                    fnv(loaded.weight().unwrap().into_iter().flat_map(f32::to_le_bytes))
                }
            };
            assert_eq!(found, reference["hash"], "{file} {name}");
            read += 1;
        }
    }
    assert_eq!(read, 18 * 4);
    assert_eq!(refused.len(), 2, "{refused:?}");
    for (message, name) in refused.iter().zip(["IQ2_XXS", "IQ3_S"]) {
        assert!(message.contains(name) && message.contains("Q4_K") || message.contains("Q2_K to Q6_K"), "{message}");
    }
}

/// A tensor to be written: its name, dimensions with the innermost last, the number of its type, and its bytes.
type Written<'a> = (&'a str, &'a [usize], u32, Vec<u8>);

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// A GGUF file of these texts and whole numbers, and tensors.
fn written(metadata: &[(&str, Value)], tensors: &[Written]) -> Vec<u8> {
    let mut file = b"GGUF\x03\0\0\0".to_vec();
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        file.extend(text(key));
        match value {
            Value::Text(value) => file.extend([&8u32.to_le_bytes()[..], &text(value)].concat()),
            Value::Unsigned(value) => file.extend([&4u32.to_le_bytes()[..], &(*value as u32).to_le_bytes()].concat()),
            other => panic!("{other:?}"),
        }
    }
    let mut offset = 0u64;
    for (name, shape, number, bytes) in tensors {
        file.extend(text(name));
        file.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&n| file.extend((n as u64).to_le_bytes()));
        file.extend(number.to_le_bytes());
        file.extend(offset.to_le_bytes());
        offset += (bytes.len() as u64).next_multiple_of(32);
    }
    for (.., bytes) in tensors {
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(bytes);
    }
    file
}

fn floats(count: usize) -> Vec<u8> {
    (0..count).flat_map(|i| (i as f32).to_le_bytes()).collect()
}

fn q8(rows: usize) -> Vec<u8> {
    let block = |row: usize| [&[0, 0x3c], &[row as u8; 32][..]].concat();
    (0..rows).flat_map(block).collect()
}

fn model(architecture: &str) -> Vec<(&'static str, Value)> {
    vec![
        ("general.architecture", Value::Text(architecture.into())),
        ("llama.attention.head_count", Value::Unsigned(2)),
        ("llama.attention.head_count_kv", Value::Unsigned(1)),
    ]
}

fn opened(folder: &tempfile::TempDir, file: &[u8]) -> Result<GgufSource> {
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, file).unwrap();
    GgufSource::open(&path, false)
}

fn weight(source: &GgufSource, name: &str) -> Array2<f32> {
    let layers = source.layers();
    let layer = layers.iter().find(|layer| layer.name == name).unwrap_or_else(|| panic!("{name} of {layers:?}"));
    match &layer.content {
        SourceContent::Ready { layer, .. } => layer.load().unwrap().weight().unwrap(),
        SourceContent::Tensors { weight, .. } => {
            let rows = weight.shape[0];
            let numbers = to_f32(weight.dtype, &source.bytes(weight).unwrap()).unwrap();
            Array2::from_shape_vec((rows, numbers.len() / rows), numbers).unwrap()
        }
    }
}

/// What the converter changes is undone, of floats and of codes alike; biases go with their weights, experts are layers.
#[test]
fn layers_are_those_of_transformers() {
    let folder = tempfile::tempdir().unwrap();
    let file = written(
        &model("llama"),
        &[
            ("blk.0.attn_q.weight", &[8, 32], 8, q8(8)),
            ("blk.0.attn_q.bias", &[8], 0, floats(8)),
            ("blk.0.attn_k.weight", &[4, 1], 0, floats(4)),
            ("blk.0.attn_v.weight", &[4, 32], 8, q8(4)),
            ("blk.0.attn_v.bias", &[4], 0, floats(4)),
            ("blk.0.ffn_up_exps.weight", &[2, 3, 32], 8, q8(6)),
        ],
    );
    let source = opened(&folder, &file).unwrap();
    let names: Vec<String> = source.layers().into_iter().map(|layer| layer.name).collect();
    let attention = |part: &str| format!("model.layers.0.self_attn.{part}_proj");
    let experts = [0, 1].map(|expert| format!("blk.0.ffn_up_exps.{expert}"));
    assert_eq!(names, [&experts[..], &["k", "q", "v"].map(attention)].concat());
    let column = |name: &str| weight(&source, name).column(0).to_vec();
    assert_eq!(column(&attention("q")), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    assert_eq!(column(&attention("k")), [0.0, 2.0, 1.0, 3.0]);
    assert_eq!(column(&attention("v")), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(column("blk.0.ffn_up_exps.1"), [3.0, 4.0, 5.0]);
    let bias = |part: &str| {
        let layer = source.layers().into_iter().find(|layer| layer.name == attention(part)).unwrap();
        let SourceContent::Ready { layer, .. } = layer.content else { panic!("{part}") };
        layer.load().unwrap().stored_bias().unwrap().unwrap().to_vec()
    };
    assert_eq!(bias("v"), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(bias("q"), [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    let kept = GgufSource::open(folder.path().join("model.gguf"), true).unwrap();
    assert_eq!(weight(&kept, "blk.0.attn_k").column(0).to_vec(), [0.0, 1.0, 2.0, 3.0]);

    let source = opened(&folder, &written(&model("gemma"), &[("output_norm.weight", &[3], 0, floats(3))])).unwrap();
    assert_eq!(weight(&source, "model.norm").column(0).to_vec(), [-1.0, 0.0, 1.0]);
    let source = opened(&folder, &written(&model("mamba"), &[("output_norm.weight", &[3], 0, floats(3))])).unwrap();
    assert!(source.notes()[0].contains("'mamba'") && source.layers()[0].name == "output_norm");
}

/// Numbers of heads that no tensor has are errors; a vector of codes is a matrix of one row.
#[test]
fn heads_and_vectors() {
    let folder = tempfile::tempdir().unwrap();
    let heads = |count: u64| {
        let metadata = vec![
            ("general.architecture", Value::Text("llama".into())),
            ("llama.attention.head_count", Value::Unsigned(count)),
        ];
        written(&metadata, &[("blk.0.attn_q.weight", &[8, 32], 8, q8(8)), ("a.weight", &[32], 8, q8(1))])
    };
    let load = |count: u64, name: &str| {
        let source = opened(&folder, &heads(count)).unwrap();
        let layer = source.layers().into_iter().find(|layer| layer.name == name).unwrap();
        let SourceContent::Ready { layer, .. } = layer.content else { panic!("{name}") };
        layer.load().map(|layer| layer.weight().unwrap())
    };
    let q = "model.layers.0.self_attn.q_proj";
    assert!(load(2, q).is_ok());
    for count in [0, 3, 16, u64::from(u32::MAX)] {
        assert!(load(count, q).unwrap_err().to_string().contains("heads"), "{count}");
    }
    assert_eq!(load(2, "a").unwrap().dim(), (1, 32));
    let mut large = header::read(&heads(2)).unwrap();
    large.metadata.insert("llama.attention.head_count".into(), Value::Unsigned(1 << 63));
    assert!(Names::of(&large.metadata).is_ok());
}

#[test]
fn parts_belong_together() {
    let folder = tempfile::tempdir().unwrap();
    let part = |number: usize, tensors: &[Written]| {
        let path = folder.path().join(format!("m-{number:05}-of-00002.gguf"));
        let count = ("split.tensors.count", Value::Unsigned(2));
        std::fs::write(&path, written(&[model("llama"), vec![count]].concat(), tensors)).unwrap();
        path
    };
    let first = part(1, &[("output_norm.weight", &[3], 0, floats(3))]);
    assert!(GgufSource::open(&first, false).unwrap_err().to_string().contains("m-00002-of-00002.gguf"));
    let second = part(2, &[("token_embd.weight", &[2, 32], 8, q8(2))]);
    for path in [&first, &second] {
        let source = GgufSource::open(path, false).unwrap();
        // The embedding is the head, too.
        assert_eq!(source.layers().len(), 3);
        assert_eq!(weight(&source, "lm_head"), weight(&source, "model.embed_tokens"));
        assert_eq!(weight(&source, "model.embed_tokens").column(3).to_vec(), [0.0, 1.0]);
        assert_eq!(source.file_name("model.embed_tokens"), "m-00002-of-00002.gguf");
    }
    part(2, &[]);
    assert!(GgufSource::open(&first, false).unwrap_err().to_string().contains("1 tensors, expected 2"));
    part(2, &[("output_norm.weight", &[3], 0, floats(3))]);
    assert!(GgufSource::open(&first, false).unwrap_err().to_string().contains("twice"));
}

#[test]
fn what_is_wrong_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let tensor = |shape: &'static [usize], number: u32, bytes: usize| -> Vec<u8> {
        written(&model("llama"), &[("a.weight", shape, number, vec![0; bytes])])
    };
    let mut version = tensor(&[1, 32], 8, 34);
    version[4] = 1;
    let mut big_endian = tensor(&[1, 32], 8, 34);
    big_endian[4..8].copy_from_slice(&3u32.to_be_bytes());
    let mut shared =
        written(&model("llama"), &[("a.weight", &[1, 32], 8, vec![0; 34]), ("b.weight", &[1, 32], 8, vec![0; 34])]);
    // Behind the name are the number of dimensions, both of them, the type, and the offset.
    let offset = shared.windows(8).position(|bytes| bytes == b"b.weight").unwrap() + 8 + 4 + 16 + 4;
    shared[offset..offset + 8].fill(0);
    for (file, says) in [
        (shared, "bytes of its own"),
        (b"GGML".to_vec(), "GGUF"),
        (version, "found 1"),
        (big_endian, "big-endian"),
        (tensor(&[1, 32], 16, 34), "IQ2_XXS"),
        (tensor(&[1, 32], 99, 34), "number 99"),
        (tensor(&[1, 31], 8, 34), "a multiple of 32"),
        (tensor(&[9, 32], 8, 34), "a place in the"),
        (tensor(&[1 << 62, 0, 32], 8, 34), "no dimension of 0"),
        (tensor(&[1 << 40, 5, 0], 8, 34), "no dimension of 0"),
        (tensor(&[usize::MAX, 32], 8, 34), "a place in the"),
        (tensor(&[1, 1, 1, 1, 32], 8, 34), "dimensions of tensor 'a.weight'"),
        (written(&model("llama"), &[]), "no tensor"),
    ] {
        let message = opened(&folder, &file).unwrap_err().to_string();
        assert!(message.contains(says) && message.contains("model.gguf"), "{message}");
    }
    let infinite = written(&model("llama"), &[("a.weight", &[1, 32], 8, [&[0, 0x7c][..], &[1; 32]].concat())]);
    let source = opened(&folder, &infinite).unwrap();
    let SourceContent::Ready { layer, .. } = &source.layers()[0].content else { panic!("a packed layer") };
    let message = layer.load().unwrap_err().to_string();
    assert!(message.contains("'a.weight'") && message.contains("scales"), "{message}");
}

proptest! {
    /// Files that are cut or changed anywhere are errors, or models: nothing panics, and nothing is made beyond their length.
    #[test]
    fn damaged_files_are_refused_or_read(
        name in prop::sample::select(vec!["q4_k.gguf", "q6_k.gguf", "tq1_0.gguf", "f16.gguf"]),
        changes in proptest::collection::vec((0usize..900, any::<u8>()), 0..4),
        cut in prop::option::of(0usize..20_000),
    ) {
        let mut file = std::fs::read(fixture(name)).unwrap();
        changes.iter().for_each(|&(at, byte)| file[at] = byte);
        file.truncate(cut.unwrap_or(file.len()));
        let folder = tempfile::tempdir().unwrap();
        if let Ok(source) = opened(&folder, &file) {
            for layer in source.layers() {
                match layer.content {
                    SourceContent::Ready { layer, .. } => drop(layer.load()),
                    SourceContent::Tensors { weight, .. } => drop(source.bytes(&weight)),
                }
            }
        }
    }
}
