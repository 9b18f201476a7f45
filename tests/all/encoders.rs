//! Text encoders, run whole from the store, give the vectors of transformers.

use std::path::Path;

use layerstore::layer::{Accuracy, ActivationFormat};
use layerstore::{EncodingOptions, ErrorKind, ImportOptions, Pooling, Rules, Store, formats, import};
use ndarray::Array2;
use serde_json::Value;

use crate::support::{Place, refused};

const MODELS: &str = "tests/fixtures/language";

fn references() -> Value {
    serde_json::from_slice(&std::fs::read(Path::new(MODELS).join("encoders.json")).unwrap()).unwrap()
}

fn matrix(value: &Value) -> Array2<f32> {
    let rows: Vec<Vec<f32>> = serde_json::from_value(value.clone()).unwrap();
    Array2::from_shape_fn((rows.len(), rows[0].len()), |(i, j)| rows[i][j])
}

fn off(a: &Array2<f32>, b: &Array2<f32>) -> f32 {
    assert_eq!(a.dim(), b.dim());
    (a - b).iter().fold(0f32, |most, v| most.max(v.abs()))
}

/// Positions that begin behind the padding's, poolings, texts that are cut off, and others beside that change nothing.
#[tokio::test(flavor = "multi_thread")]
async fn vectors_are_those_of_transformers() {
    let store = Store::create("memory://encoders").await.unwrap();
    let int8 = "[[rule]]\nlayers = '.*(self|dense).*'\nmethod = 'low_rank'\nweight = { type = 'int8', group = 16 }\n";
    for (model, rules) in [("bert", ""), ("roberta", ""), ("bert-int8", int8)] {
        let source = formats::open(Path::new(MODELS).join(model.split('-').next().unwrap())).unwrap();
        let rules = Rules::parse(rules, "r.toml").unwrap();
        import(&store, source, model, ImportOptions { rules, ..ImportOptions::default() }).await.unwrap();
    }
    let snapshot = store.latest().await.unwrap();
    let references = references();
    for (name, reference) in references.as_object().unwrap() {
        let model = snapshot.encoder(name).await.unwrap();
        let texts: Vec<String> = serde_json::from_value(reference["texts"].clone()).unwrap();
        for (text, tokens) in texts.iter().zip(reference["tokens"].as_array().unwrap()) {
            let expected: Vec<u32> = serde_json::from_value(tokens.clone()).unwrap();
            assert_eq!(model.tokens(text).unwrap(), expected, "{name}: {text}");
        }
        let tokens = model.tokens(&texts[0]).unwrap();
        let features = model.features_of(&[&tokens], Accuracy::Full).unwrap();
        assert!(off(&features[0], &matrix(&reference["features"])) < 1e-4, "{name}");
        assert_eq!(model.pooling().to_string(), reference["pooling"].as_str().unwrap());
        for pooling in [Pooling::Mean, Pooling::Cls, Pooling::Last] {
            let mut told = 0;
            let model = model.with_pooling(pooling);
            let vectors = model.encode(&texts, &EncodingOptions::default(), |done| told = done).unwrap();
            let off = off(&vectors, &matrix(&reference["vectors"][pooling.to_string()]));
            assert!(off < 2e-5 && told == texts.len(), "{name} {pooling}: {off}");
        }
        // The table of positions has 24 rows, of which one family leaves out two.
        assert_eq!(model.features_of(&[&[5; 23]], Accuracy::Full).is_ok(), name == "bert", "{name}");
        refused(model.features_of(&[&[5; 25]], Accuracy::Full), ErrorKind::InvalidInput, &["25"]);
        refused(model.features_of(&[&[]], Accuracy::Full), ErrorKind::InvalidInput, &["found 0"]);
        refused(model.features_of(&[&[40]], Accuracy::Full), ErrorKind::InvalidInput, &["40"]);
    }
    let texts = ["ab cd", "the dog", "zz"];
    let encode = |model: &layerstore::TextEncoder| model.encode(&texts, &EncodingOptions::default(), |_| ()).unwrap();
    let dense = encode(&snapshot.encoder("bert").await.unwrap());
    let compressed = snapshot.encoder("bert-int8").await.unwrap();
    assert!(off(&encode(&compressed), &dense) < 0.01);
    let rounded = encode(&compressed.with_activations(ActivationFormat::Int8).unwrap());
    assert!(off(&rounded, &dense) < 0.02 && rounded != encode(&compressed));
    let longer = compressed.with_normalize(false);
    assert!(encode(&longer).iter().map(|v| v * v).sum::<f32>() > 3.1);
    let cancelled = EncodingOptions::default();
    cancelled.cancel.cancel();
    refused(compressed.encode(&texts, &cancelled, |_| ()), ErrorKind::Cancelled, &[]);
    refused(snapshot.language_model("bert").await, ErrorKind::InvalidInput, &["'bert'", "llama"]);
}

#[test]
fn texts_are_embedded_by_the_command() {
    let place = Place::new();
    place.json(&["import", &format!("{MODELS}/bert"), "--model", "m"]);
    let texts = place.path("lines.txt");
    let lines: Vec<String> = serde_json::from_value(references()["bert"]["texts"].clone()).unwrap();
    std::fs::write(&texts, lines.join("\n") + "\n").unwrap();
    let (texts, out) = (texts.display().to_string(), place.path("e.npy").display().to_string());
    let told = place.json(&["embed", "m", "--input", &texts, "--output", &out]);
    assert_eq!((&told["texts"], &told["features"], &told["pooling"]), (&4.into(), &32.into(), &"mean".into()));
    let (vectors, _) = formats::read_array(&out).unwrap();
    assert!(off(&vectors, &matrix(&references()["bert"]["vectors"]["mean"])) < 2e-5);
    place.json(&["embed", "m", "--input", &texts, "--output", &out, "--pooling", "cls", "--exact"]);
    let (vectors, _) = formats::read_array(&out).unwrap();
    assert!(off(&vectors, &matrix(&references()["bert"]["vectors"]["cls"])) < 2e-5);
    place.fails(2, &["mean, cls or last"], &["embed", "m", "--input", &texts, "--output", &out, "--pooling", "max"]);
    place.fails(1, &["e.txt"], &["embed", "m", "--input", &texts, "--output", "e.txt"]);
    std::fs::write(&texts, "a\n\nb\n").unwrap();
    place.fails(1, &["an empty line 2"], &["embed", "m", "--input", &texts, "--output", &out]);
    place.json(&["import", &format!("{MODELS}/llama"), "--model", "l"]);
    std::fs::write(&texts, "a\n").unwrap();
    place.fails(1, &["'llama'", "roberta"], &["embed", "l", "--input", &texts, "--output", &out]);
    // Keys and values in less memory, rounded inputs, and speeds.
    let generate = |more: &[&str]| {
        let all = [&["generate", "l", "--prompt", "abcd ef", "--max-tokens", "5"], more].concat();
        place.json(&all)["tokens"].clone()
    };
    assert_eq!(generate(&["--cache-type", "f16"]), generate(&[]));
    assert_eq!(generate(&["--cache-type", "int8"]), generate(&[]));
    let speed = place.json(&["bench", "l", "-p", "16", "-n", "8", "-r", "2"]);
    assert_eq!(speed["generated_tokens_per_second"].as_array().unwrap().len(), 2, "{speed}");
    assert!(speed["weight_bytes"].as_u64().unwrap() > 0 && speed["kernels"].is_string());
    place.fails(1, &["at most 64"], &["bench", "l", "-p", "65"]);
    place.fails(1, &["from 1 to"], &["bench", "l", "-r", "0"]);
    place.fails(2, &["f32, f16 or int8"], &["generate", "l", "--prompt", "a", "--cache-type", "q4"]);
}
