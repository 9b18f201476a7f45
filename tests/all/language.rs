//! Language models, run whole from the store, say what transformers says of them.

use std::path::Path;

use layerstore::layer::Accuracy;
use layerstore::{
    CacheType, Cancel, ChatMessage, ErrorKind, GenerationOptions, ImportOptions, Rules, Sampling, Snapshot, Store,
    formats, import,
};
use serde_json::Value;

use crate::support::{Place, refused};

const MODELS: &str = "tests/fixtures/language";

async fn stored(name: &str, models: &[(&str, &str)]) -> Snapshot {
    let store = Store::create(&format!("memory://language-{name}")).await.unwrap();
    for (model, rules) in models {
        let folder = model.split('-').next().unwrap();
        let rules = Rules::parse(rules, "r.toml").unwrap();
        let source = formats::open(Path::new(MODELS).join(folder)).unwrap();
        import(&store, source, model, ImportOptions { rules, ..ImportOptions::default() }).await.unwrap();
    }
    store.latest().await.unwrap()
}

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect()
}

/// Rotary positions of several kinds, windows, biases, norms of heads, tied and other heads.
#[tokio::test(flavor = "multi_thread")]
async fn logits_and_texts_are_those_of_transformers() {
    let references: Value =
        serde_json::from_slice(&std::fs::read(Path::new(MODELS).join("references.json")).unwrap()).unwrap();
    let references = references.as_object().unwrap();
    assert_eq!(references.len(), 4);
    let names: Vec<(&str, &str)> = references.keys().map(|name| (name.as_str(), "")).collect();
    let snapshot = stored("references", &names).await;
    for (name, reference) in references {
        let model = snapshot.language_model(name).await.unwrap();
        let tokens = numbers(&reference["tokens"]);
        let logits = model.logits(&tokens, Accuracy::Full).unwrap();
        assert_eq!(logits.dim(), (31, 40));
        let expected = reference["logits"].as_array().unwrap();
        for (place, row) in expected.iter().enumerate() {
            for (token, value) in row.as_array().unwrap().iter().enumerate() {
                let off = (f64::from(logits[(5 * place, token)]) - value.as_f64().unwrap()).abs();
                assert!(off < 1e-4, "{name}: {off} at {place}, {token}");
            }
        }
        let options = GenerationOptions { max_tokens: 12, accuracy: Accuracy::Full, ..GenerationOptions::default() };
        let mut told = String::new();
        let found = model.generate(&tokens[..9], &options, |text| told.push_str(text)).unwrap();
        assert_eq!(found.tokens, numbers(&reference["generated"]), "{name}");
        assert_eq!((told, found.prompt_tokens, found.ended), (found.text, 9, false), "{name}");
        // The context is 64 tokens.
        let long = GenerationOptions { max_tokens: 100, ..options.clone() };
        assert!(model.generate(&tokens[..9], &long, |_| ()).unwrap().tokens.len() <= 55);
        refused(model.generate(&[3; 65], &long, |_| ()), ErrorKind::InvalidInput, &["65", "at most 64"]);
        refused(model.generate(&[40], &long, |_| ()), ErrorKind::InvalidInput, &["40"]);
        let drawn = GenerationOptions {
            sampling: Sampling { temperature: 1.0, seed: 3, ..Sampling::default() },
            ..options.clone()
        };
        let draw = || model.generate(&tokens[..9], &drawn, |_| ()).unwrap().tokens;
        assert_eq!(draw(), draw());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn compressed_models_run_and_are_measured() {
    let int8 =
        "[[rule]]\nlayers = '.*(proj|embed_tokens)'\nmethod = 'low_rank'\nweight = { type = 'int8', group = 16 }\n";
    let keys = "[[rule]]\nlayers = '.*proj'\nmethod = 'key_value'\n";
    let models = [("llama", ""), ("llama-int8", int8), ("llama-keys", keys), ("qwen2", "")];
    let snapshot = stored("compressed", &models).await;
    let dense = snapshot.language_model("llama").await.unwrap();
    let tokens: Vec<u32> = (0..150).map(|i| (i * i * 5 + i) % 37 + 3).collect();
    let cancel = Cancel::new();
    let measure = |model: &layerstore::LanguageModel, against| {
        model.perplexity(&tokens, 32, Some(against), Accuracy::Full, &cancel, |_, _| ()).unwrap()
    };
    let same = measure(&dense, &dense);
    let against = same.against.unwrap();
    assert_eq!((same.windows, same.tokens, against.same_top), (4, 64, 1.0));
    assert!(against.mean_kl.abs() < 1e-9 && (against.perplexity - same.perplexity).abs() < 1e-9);
    // By its definition, of one window.
    let logits = dense.logits(&tokens[..31], Accuracy::Full).unwrap();
    let mean = (16..32).map(|place| {
        let row = logits.row(place - 1);
        let sum: f64 = row.iter().map(|v| f64::from(*v).exp()).sum();
        sum.ln() - f64::from(row[tokens[place] as usize])
    });
    let expected = (mean.sum::<f64>() / 16.0).exp();
    let one = dense.perplexity(&tokens[..32], 32, None, Accuracy::Full, &cancel, |_, _| ()).unwrap();
    assert!((one.perplexity / expected - 1.0).abs() < 1e-5, "{} {expected}", one.perplexity);
    let mut before = 0.0;
    for name in ["llama-keys", "llama-int8"] {
        let model = snapshot.language_model(name).await.unwrap();
        let found = measure(&model, &dense).against.unwrap();
        assert!(found.mean_kl >= before - 1e-9 && found.mean_kl < 0.01, "{name}: {found:?}");
        assert!(found.kl_99 >= found.mean_kl, "{found:?}");
        before = found.mean_kl.min(1e-6);
    }
    cancel.cancel();
    let stopped = dense.perplexity(&tokens, 32, None, Accuracy::Full, &cancel, |_, _| ());
    refused(stopped, ErrorKind::Cancelled, &[]);
    let few = dense.perplexity(&tokens[..3], 32, None, Accuracy::Full, &Cancel::new(), |_, _| ());
    refused(few, ErrorKind::InvalidInput, &["4 at least"]);
    let chat = dense.chat_tokens(&[ChatMessage { role: "user".into(), content: " abz ".into() }]).unwrap();
    assert_eq!(dense.text(&chat).unwrap().trim(), "u abz a");
    assert_eq!(chat[0], 1);
}

/// A session keeps what was read; several texts at once are each as by itself.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_and_batches_go_on_as_texts_by_themselves() {
    let snapshot = stored("sessions", &[("llama", ""), ("qwen2", "")]).await;
    let model = snapshot.language_model("llama").await.unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| (i * i * 5 + i) % 37 + 3).collect();
    let options = GenerationOptions { max_tokens: 6, accuracy: Accuracy::Full, ..GenerationOptions::default() };
    let alone = |prompt: &[u32]| model.generate(prompt, &options, |_| ()).unwrap();
    let place = Place::new();
    for kind in [CacheType::F32, CacheType::F16, CacheType::Int8] {
        let options = GenerationOptions { cache: kind, ..options.clone() };
        let mut session = model.session(kind);
        let first = model.generate_in(&mut session, &tokens[..20], &options, |_| ()).unwrap();
        assert_eq!((first.prompt_tokens, first.cached_tokens), (20, 0));
        assert_eq!(session.tokens()[..20], tokens[..20]);
        // What was added last was not read.
        assert_eq!(session.tokens()[20..], first.tokens[..5]);
        let file = place.path(&format!("{kind}.safetensors"));
        session.save(&file).unwrap();
        let mut again = model.open_session(&file).unwrap();
        assert_eq!(again.tokens(), session.tokens());
        assert_eq!((again.kind(), again.memory_bytes()), (kind, session.memory_bytes()));
        let once_more = place.path("again.safetensors");
        again.save(&once_more).unwrap();
        let bytes = |file: &Path| std::fs::metadata(file).unwrap().len();
        assert_eq!(bytes(&once_more), bytes(&file));
        // The same text, one that begins alike, one that is shorter, and another.
        let other: Vec<u32> = [&tokens[..12], &tokens[25..31]].concat();
        for (prompt, cached) in [(&tokens[..20], 19), (&other[..], 12), (&tokens[..9], 8), (&tokens[30..], 0)] {
            let expected = model.generate(prompt, &options, |_| ()).unwrap();
            let mut told = String::new();
            let found = model.generate_in(&mut again, prompt, &options, |text| told.push_str(text)).unwrap();
            assert_eq!((&found.tokens, found.cached_tokens), (&expected.tokens, cached), "{kind}");
            assert_eq!(told, found.text);
        }
        let others = snapshot.language_model("qwen2").await.unwrap();
        refused(others.open_session(&file), ErrorKind::InvalidInput, &["another model"]);
        let rounded = model.with_activations(layerstore::layer::ActivationFormat::Int8).unwrap();
        refused(rounded.open_session(&file), ErrorKind::InvalidInput, &["other activations"]);
        let bytes = std::fs::read(&file).unwrap();
        let cut = place.path("cut.safetensors");
        for length in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
            std::fs::write(&cut, &bytes[..length]).unwrap();
            assert!(model.open_session(&cut).is_err(), "{length}");
        }
        for place in [bytes.len() - 1, bytes.len() - 1000] {
            let mut other = bytes.clone();
            other[place] ^= 1;
            std::fs::write(&cut, &other).unwrap();
            refused(model.open_session(&cut), ErrorKind::InvalidInput, &["found other bytes"]);
        }
    }
    refused(model.open_session(&place.path("small.safetensors")), ErrorKind::Storage, &["small"]);
    refused(
        model.open_session(Path::new("tests/fixtures/small.safetensors")),
        ErrorKind::InvalidInput,
        &["no session in it"],
    );
    let prompts = [tokens[..20].to_vec(), tokens[3..5].to_vec(), tokens[..1].to_vec()];
    let mut told = vec![String::new(); 3];
    let all = model.generate_all(&prompts, &options, |number, text| told[number].push_str(text)).unwrap();
    for ((found, prompt), told) in all.iter().zip(&prompts).zip(told) {
        let expected = alone(prompt);
        assert_eq!((&found.tokens, &found.text, found.ended), (&expected.tokens, &expected.text, expected.ended));
        assert_eq!((told, found.prompt_tokens), (expected.text, prompt.len()));
    }
    assert!(model.generate_all(&[], &options, |_, _| ()).unwrap().is_empty());
    refused(model.generate_all(&[vec![3], vec![]], &options, |_, _| ()), ErrorKind::InvalidInput, &["one at least"]);
    options.cancel.cancel();
    refused(model.generate_all(&prompts, &options, |_, _| ()), ErrorKind::Cancelled, &[]);
}

/// What cannot be run is named; the command streams what can.
#[test]
fn models_are_run_by_the_command() {
    let place = Place::new();
    let llama = format!("{MODELS}/llama");
    place.json(&["import", &llama, "--model", "m"]);
    let generated = place.json(&["generate", "m", "--prompt", "abcd ef", "--max-tokens", "5"]);
    assert_eq!(generated["tokens"].as_array().unwrap().len(), 5);
    let printed = place.run(&["--quiet", "generate", "m", "--prompt", "abcd ef", "--max-tokens", "5"]).out;
    assert_eq!(printed.trim_end_matches('\n'), generated["text"].as_str().unwrap());
    let text = place.path("text.txt");
    std::fs::write(&text, "abcdefgh ijklmnop ".repeat(9)).unwrap();
    let text = text.display().to_string();
    let measured = place.json(&["perplexity", "m", "--text", &text, "--window", "16", "--against", "m"]);
    assert!(measured["perplexity"].as_f64().unwrap() > 1.0 && measured["against"]["same_top"] == 1.0, "{measured}");
    let prompts = place.path("prompts.txt");
    std::fs::write(&prompts, "abcd ef\nb\n").unwrap();
    let prompts = prompts.display().to_string();
    let all = place.json(&["generate", "m", "--prompts", &prompts, "--max-tokens", "5"]);
    assert_eq!(all["generations"][0]["tokens"], generated["tokens"]);
    assert_eq!(all["generations"][1]["prompt"], "b");
    let cache = place.path("cache.safetensors").display().to_string();
    let cached = ["generate", "m", "--prompt", "abcd ef", "--max-tokens", "5", "--prompt-cache", &cache];
    assert_eq!(place.json(&cached)["cached_tokens"], 0);
    let again = place.json(&cached);
    assert_eq!(again["tokens"], generated["tokens"]);
    assert_eq!(again["cached_tokens"].as_u64().unwrap() + 1, again["prompt_tokens"].as_u64().unwrap());
    place.fails(1, &["f32", "f16, as --cache-type says"], &[&cached[..], &["--cache-type", "f16"]].concat());
    place.fails(2, &["--prompt"], &["generate", "m"]);
    place.fails(2, &["--temperature"], &["generate", "m", "--prompt", "a", "--temperature=-1"]);
    place.fails(1, &["no model named 'n'"], &["generate", "n", "--prompt", "a"]);
    place.fails(1, &["--prompt", "no tokens"], &["generate", "m", "--prompt", ""]);
    place.import("plain", None);
    place.fails(1, &["model 'plain'", "config.json"], &["generate", "plain", "--prompt", "a"]);
    let folder = place.path("broken");
    std::fs::create_dir(&folder).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(Path::new(&llama).join(file), folder.join(file)).unwrap();
    }
    let config = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let broken = folder.display().to_string();
    for (from, to, says) in [
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3", "model.layers.2"),
        ("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1000000000000000000", "model.layers.2"),
        ("\"model_type\": \"llama\"", "\"model_type\": \"mamba\"", "'mamba'"),
        ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 4", "the key of block 0"),
    ] {
        std::fs::write(folder.join("config.json"), config.replace(from, to)).unwrap();
        place.json(&["import", &broken, "--model", "broken"]);
        place.fails(1, &[says], &["generate", "broken", "--prompt", "a"]);
    }
    let chat = ["generate", "broken", "--prompt", "a", "--chat"];
    std::fs::write(folder.join("config.json"), &config).unwrap();
    place.json(&["import", &broken, "--model", "broken"]);
    place.fails(1, &["chat template"], &chat);
}
