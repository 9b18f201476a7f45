//! Models that read a text to be calibrated while they are imported.

use std::collections::BTreeMap;
use std::path::Path;

use layerstore::layer::Accuracy;
use layerstore::{
    CacheType, CalibrateOptions, CalibrationFile, CalibrationInputs, CalibrationText, Cancel, EncodingOptions,
    ErrorBasis, ErrorKind, GenerationOptions, ImportOptions, ImportReport, LanguageModel, Result, Rules, Store,
    calibrate, formats, import,
};

use crate::support::{Place, refused};

const MODELS: &str = "tests/fixtures/language";

const GPTQ: &str = "[[rule]]\nlayers = '.*(proj|query|key|value|dense)'\nmethod = 'low_rank'\n\
    weight = { type = 'int3', group = 16 }\nrounding = 'gptq'\nrank = 2\n";

fn text() -> String {
    let letters: Vec<char> = ('a'..='z').collect();
    (0..900usize).map(|i| if i % 7 == 6 { '\n' } else { letters[(i * i * 5 + 3 * i) % 26] }).collect()
}

async fn calibrated(store: &Store, model: &str, inputs: CalibrationInputs) -> Result<ImportReport> {
    let source = formats::open(Path::new(MODELS).join(model.split('-').next().unwrap())).unwrap();
    let options = ImportOptions {
        rules: Rules::parse(GPTQ, "r.toml").unwrap(),
        calibration_text: Some(CalibrationText { text: text(), tokens: 600, inputs }),
        ..ImportOptions::default()
    };
    import(store, source, model, options).await
}

fn artifacts(report: &ImportReport) -> BTreeMap<&str, &str> {
    report.layers.iter().map(|layer| (layer.layer.as_str(), layer.artifact.as_str())).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_made_of_what_those_before_give() {
    let store = Store::create("memory://text-calibration").await.unwrap();
    for (model, first, second) in [
        ("llama", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        ("bert", "encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.query"),
    ] {
        let report = calibrated(&store, model, CalibrationInputs::Compressed).await.unwrap();
        let source = formats::open(Path::new(MODELS).join(model)).unwrap();
        let plain = import(&store, source, "plain", ImportOptions::default()).await.unwrap();
        let names = |report: &ImportReport| report.layers.iter().map(|l| l.layer.clone()).collect::<Vec<_>>();
        assert_eq!(names(&report), names(&plain), "{model}");
        let of_text = report.layers.iter().filter(|layer| layer.error_basis == ErrorBasis::Activations).count();
        assert_eq!(of_text, if model == "llama" { 14 } else { 12 }, "{model}");
        // Nothing is made again.
        let again = calibrated(&store, model, CalibrationInputs::Compressed).await.unwrap();
        assert!(again.layers.iter().all(|layer| layer.reused) && again.written_bytes == 0);
        assert_eq!(artifacts(&again), artifacts(&report));
        // The first block's inputs are the same, whichever way; those behind it are not.
        let dense = calibrated(&store, &format!("{model}-dense"), CalibrationInputs::Dense).await.unwrap();
        assert_eq!(artifacts(&dense)[first], artifacts(&report)[first]);
        assert_ne!(artifacts(&dense)[second], artifacts(&report)[second]);
    }
    // Without a configuration, there is nothing to run.
    let source = formats::open("tests/fixtures/small.safetensors").unwrap();
    let options = ImportOptions {
        calibration_text: Some(CalibrationText { text: text(), tokens: 10, inputs: CalibrationInputs::Dense }),
        ..ImportOptions::default()
    };
    refused(import(&store, source, "small", options).await, ErrorKind::InvalidInput, &["config.json"]);
}

#[test]
fn texts_calibrate_by_the_command() {
    let place = Place::new();
    let (rules, file) = (place.path("r.toml"), place.path("text.txt"));
    std::fs::write(&rules, GPTQ).unwrap();
    std::fs::write(&file, text()).unwrap();
    let (rules, file) = (rules.display().to_string(), file.display().to_string());
    let llama = format!("{MODELS}/llama");
    let with = |more: &[&str]| {
        let all = ["import", &llama, "--model", "m", "--rules", &rules, "--calibration-text", &file];
        [&all[..], more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    fn of(all: &[String]) -> Vec<&str> {
        all.iter().map(String::as_str).collect()
    }
    let plan = place.json(&of(&with(&["--dry-run"])));
    let calibrated = plan["layers"].as_array().unwrap().iter().filter(|layer| layer["calibrated"] == true);
    assert_eq!(calibrated.count(), 14);
    let report = place.json(&of(&with(&["--calibration-tokens", "300"])));
    assert_eq!(report["layers"].as_array().unwrap().len(), place.json(&["layers", "m"]).as_array().unwrap().len());
    let generated = place.json(&["generate", "m", "--prompt", "abcd", "--max-tokens", "3"]);
    assert_eq!(generated["tokens"].as_array().unwrap().len(), 3);
    // No number of blocks is believed before there are layers for them.
    let folder = place.path("broken");
    std::fs::create_dir(&folder).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(Path::new(&llama).join(file), folder.join(file)).unwrap();
    }
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let many = config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000000000000000");
    assert_ne!(many, config);
    std::fs::write(folder.join("config.json"), many).unwrap();
    let broken = folder.display().to_string();
    place.fails(1, &["model.layers.2"], &["import", &broken, "--model", "b", "--calibration-text", &file]);
    place.fails(1, &["2 at least"], &of(&with(&["--calibration-tokens", "1"])));
    place.fails(2, &["compressed", "dense"], &of(&with(&["--calibration-inputs", "both"])));
    place.fails(2, &["--calibration"], &of(&with(&["--calibration", "x.safetensors"])));
}

/// Statistics of a stored model serve an import of the same one, as the text itself does with the inputs of dense blocks.
#[test]
fn statistics_are_written_by_the_command() {
    let place = Place::new();
    let (rules, file, output) = (place.path("r.toml"), place.path("text.txt"), place.path("statistics.safetensors"));
    std::fs::write(&rules, GPTQ).unwrap();
    std::fs::write(&file, text()).unwrap();
    let [rules, file, output] = [rules, file, output].map(|path| path.display().to_string());
    for (model, layers, statistics) in [("llama", 14, 8), ("bert", 12, 8)] {
        let folder = format!("{MODELS}/{model}");
        place.json(&["import", &folder, "--model", model]);
        let written = place.json(&["calibrate", model, "--text", &file, "--output", &output, "--tokens", "600"]);
        assert_eq!((&written["layers"], &written["statistics"]), (&layers.into(), &statistics.into()), "{written}");
        assert_eq!(written["bytes"], std::fs::metadata(&output).unwrap().len());
        let import = |name: &str, more: &[&str]| {
            place.json(&[&["import", &folder, "--model", name, "--rules", &rules][..], more].concat())
        };
        let by_file = import("by-file", &["--calibration", &output]);
        let dense = ["--calibration-text", &file, "--calibration-tokens", "600", "--calibration-inputs", "dense"];
        let by_text = import("by-text", &dense);
        let errors = |report: &serde_json::Value| -> Vec<f64> {
            let layers = report["layers"].as_array().unwrap().iter();
            layers.filter_map(|layer| layer["relative_error"].as_f64()).collect()
        };
        let (by_file, by_text) = (errors(&by_file), errors(&by_text));
        assert!(by_file.len() >= layers && by_file.len() == by_text.len());
        for (a, b) in by_file.iter().zip(&by_text) {
            // A token more or less than a window of 128 is in the sample that errors are measured on.
            assert!((a - b).abs() < 0.05 * (a + b) + 1e-6, "{model}: {a} {b}");
        }
        // No inputs are kept but those of whole windows.
        let few = place.json(&["calibrate", model, "--text", &file, "--output", &output, "--sample", "0"]);
        assert!(few["bytes"].as_u64().unwrap() < written["bytes"].as_u64().unwrap());
    }
    place.fails(1, &["2 at least"], &["calibrate", "llama", "--text", &file, "--output", &output, "--tokens", "1"]);
    place.fails(1, &["no model named 'n'"], &["calibrate", "n", "--text", &file, "--output", &output]);
    place.import("plain", None);
    place.fails(1, &["config.json of the model"], &["calibrate", "plain", "--text", &file, "--output", &output]);
    place.fails(1, &["/nowhere/"], &["calibrate", "llama", "--text", &file, "--output", "/nowhere/s.safetensors"]);
    let text = std::fs::read(&file).unwrap();
    place.fails(1, &["ending in .safetensors"], &["calibrate", "llama", "--text", &file, "--output", &file]);
    assert_eq!(std::fs::read(&file).unwrap(), text);
}

/// Attention by codes, its codebooks of the queries and keys that the model has for the text, runs in the model.
#[tokio::test(flavor = "multi_thread")]
async fn models_attend_by_codes() {
    const CODES: &str = "[[rule]]\nlayers = 'model\\.layers\\.1\\.self_attn'\nmethod = 'vq_attention'\nn_head = 4\nn_kv_head = 2\n\
        n_code = 24\nblock_len = 16\nquery = 'q_proj'\nkey = 'k_proj'\nvalue = 'v_proj'\noutput = 'o_proj'\n";
    const BOTH_WAYS: &str = "[[rule]]\nlayers = 'encoder\\.layer\\.\\d+\\.attention'\nmethod = 'vq_attention'\nn_head = 4\n\
        n_code = 4\ncausal = false\nquery = 'self.query'\nkey = 'self.key'\nvalue = 'self.value'\noutput = 'output.dense'\n";
    let store = Store::create("memory://attend-by-codes").await.unwrap();
    let imported = async |model: &str, folder: &str, rules: &str, inputs: Option<CalibrationInputs>| {
        let source = formats::open(Path::new(MODELS).join(folder)).unwrap();
        let calibration_text = inputs.map(|inputs| CalibrationText { text: text(), tokens: 600, inputs });
        let rules = Rules::parse(rules, "r.toml").unwrap();
        import(&store, source, model, ImportOptions { rules, calibration_text, ..ImportOptions::default() }).await
    };
    imported("exact", "llama", "", None).await.unwrap();
    let report = imported("codes", "llama", CODES, Some(CalibrationInputs::Compressed)).await.unwrap();
    let block = report.layers.iter().find(|layer| layer.layer == "model.layers.1.self_attn").unwrap();
    assert!(block.relative_error.is_some_and(|error| error > 0.0 && error < 1.0), "{block:?}");
    let again = imported("codes", "llama", CODES, Some(CalibrationInputs::Compressed)).await.unwrap();
    assert_eq!(again.written_bytes, 0);
    let snapshot = store.latest().await.unwrap();
    let (exact, codes) =
        (snapshot.language_model("exact").await.unwrap(), snapshot.language_model("codes").await.unwrap());
    let tokens: Vec<u32> = (0..60).map(|i| (i * i * 5 + i) % 37 + 3).collect();
    let found = codes.perplexity(&tokens, 60, Some(&exact), Accuracy::Approximate, &Cancel::new(), |_, _| ()).unwrap();
    let against = found.against.unwrap();
    assert!(against.mean_kl > 1e-9 && against.mean_kl < 0.5, "{against:?}");
    // The cache of that block does not grow.
    let bytes = |model: &LanguageModel, length: usize| {
        let mut session = model.session(CacheType::F32);
        let options = GenerationOptions { max_tokens: 1, ..GenerationOptions::default() };
        model.generate_in(&mut session, &tokens[..length], &options, |_| ()).unwrap();
        session.memory_bytes()
    };
    assert_eq!(2 * (bytes(&codes, 40) - bytes(&codes, 20)), bytes(&exact, 40) - bytes(&exact, 20));
    let handle = snapshot.attention("codes", "model.layers.1.self_attn").await.unwrap();
    refused(handle.load().await, ErrorKind::InvalidInput, &["rotary"]);
    // Codebooks of queries and keys that are not rotated are none of this model's.
    let file = Place::new();
    let statistics = file.path("s.safetensors");
    let options = CalibrateOptions { tokens: 600, ..CalibrateOptions::default() };
    calibrate(&snapshot, "exact", &text(), &statistics, options).await.unwrap();
    let source = formats::open(Path::new(MODELS).join("llama")).unwrap();
    let options = ImportOptions {
        rules: Rules::parse(CODES, "r.toml").unwrap(),
        calibration: Some(CalibrationFile::open(&statistics).unwrap()),
        ..ImportOptions::default()
    };
    import(&store, source, "plain", options).await.unwrap();
    let snapshot = store.latest().await.unwrap();
    refused(snapshot.language_model("plain").await, ErrorKind::InvalidInput, &["before they are rotated"]);
    // An encoder's attention sees the whole text.
    imported("bert", "bert", "", None).await.unwrap();
    imported("bert-codes", "bert", BOTH_WAYS, Some(CalibrationInputs::Compressed)).await.unwrap();
    let snapshot = store.latest().await.unwrap();
    let texts: Vec<String> = text().lines().take(4).map(str::to_owned).collect();
    let encode = async |model: &str, accuracy| {
        let options = EncodingOptions { accuracy, ..EncodingOptions::default() };
        snapshot.encoder(model).await.unwrap().encode(&texts, &options, |_| ()).unwrap()
    };
    let (expected, found) = (encode("bert", Accuracy::Full).await, encode("bert-codes", Accuracy::Approximate).await);
    let off = (&found - &expected).iter().fold(0f32, |most, v| most.max(v.abs()));
    // Of weights as small as these, attention is about even, whatever queries and keys are.
    assert!(off > 0.0 && off < 1e-3, "{off}");
    assert_eq!(encode("bert-codes", Accuracy::Full).await, expected);
}
