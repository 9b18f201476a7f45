//! Models that read a text to be calibrated while they are imported.

use std::collections::BTreeMap;
use std::path::Path;

use layerstore::{
    CalibrationInputs, CalibrationText, ErrorBasis, ErrorKind, ImportOptions, ImportReport, Result, Rules, Store,
    formats, import,
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
