//! Models for other programs: what goes out comes in again as it was, and what a format cannot hold is said before.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use layerstore::formats::{OpenOptions, SourceContent, TensorSource, open, open_with};
use layerstore::layer::{Accuracy, DType, LowRankLayer};
use layerstore::{
    CalibrationFile, ErrorKind, ExportDtype, ExportFormat, ExportOptions, ExportReport, ImportOptions, ImportReport,
    Rules, Store, export, import,
};
use ndarray::Array2;
use serde_json::{Value, json};

use crate::support::{Place, refused};

const GGUF: &str = "tests/fixtures/formats/gguf";
const QUANTIZED: &str = "tests/fixtures/formats/quantized";

/// A store in memory, and a folder for files.
struct Work {
    place: Place,
    store: Store,
}

impl Work {
    async fn new(name: &str) -> Self {
        let store = Store::create(&format!("memory://formats-out-{name}")).await.unwrap();
        Work { place: Place::new(), store }
    }

    async fn import(&self, source: Arc<dyn TensorSource>, model: &str, rules: &str) -> ImportReport {
        let rules = Rules::parse(rules, "rules.toml").unwrap();
        import(&self.store, source, model, ImportOptions { rules, ..ImportOptions::default() }).await.unwrap()
    }

    async fn export(&self, model: &str, output: &str, options: ExportOptions) -> layerstore::Result<ExportReport> {
        let format = ExportFormat::of_output(Path::new(output)).unwrap();
        let format = if options.format == ExportFormat::default() { format } else { options.format };
        let latest = self.store.latest().await.unwrap();
        export(&latest, model, &self.place.path(output), ExportOptions { format, ..options }).await
    }
}

/// Every layer's weight, and what it is stored as.
fn weights(source: &dyn TensorSource) -> BTreeMap<String, (String, Vec<f32>)> {
    let weight = |content: SourceContent| match content {
        SourceContent::Tensors { weight, .. } => {
            let numbers = source.bytes(&weight).unwrap();
            let numbers = layerstore_core::layer::to_f32(weight.dtype, &numbers).unwrap();
            (format!("{:?} {:?}", weight.dtype, weight.shape), numbers)
        }
        SourceContent::Ready { layer, .. } => {
            let layer = layer.load().unwrap();
            (layer.config()["weight"].to_string(), layer.weight().unwrap().into_iter().collect())
        }
    };
    source.layers().into_iter().map(|layer| (layer.name, weight(layer.content))).collect()
}

fn numbers(shape: (usize, usize), seed: usize) -> Array2<f32> {
    Array2::from_shape_fn(shape, |(i, j)| (((i * 131 + j * 17 + seed * 97) % 211) as f32 - 105.0) / 64.0)
}

/// Writes tensors of f32.
fn write(path: &Path, tensors: &[(&str, Vec<usize>)]) {
    let raw: Vec<Vec<u8>> = tensors
        .iter()
        .enumerate()
        .map(|(seed, (_, shape))| {
            let count: usize = shape.iter().product();
            numbers((1, count), seed).into_iter().flat_map(f32::to_le_bytes).collect()
        })
        .collect();
    let views = tensors.iter().zip(&raw).map(|((name, shape), raw)| {
        (*name, safetensors::tensor::TensorView::new(DType::F32, shape.clone(), raw).unwrap())
    });
    safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, path).unwrap();
}

fn parsed(path: PathBuf) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Types of blocks come back to the bit, under both kinds of names, with the metadata as they were.
#[tokio::test(flavor = "multi_thread")]
async fn gguf_comes_back_as_it_came() {
    let work = Work::new("gguf").await;
    let mut read = 0;
    let mut files: Vec<PathBuf> = std::fs::read_dir(GGUF)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "gguf"))
        .collect();
    files.sort();
    for path in files {
        for keep_names in [false, true] {
            let Ok(source) = open_with(&path, OpenOptions { keep_names, ..OpenOptions::default() }) else { continue };
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            work.import(source.clone(), &name, "").await;
            let output = format!("{name}-{keep_names}.gguf");
            let report = work.export(&name, &output, ExportOptions::default()).await.unwrap();
            assert!(report.notes.is_empty() && report.remarks.is_empty(), "{report:?}");
            // The file itself, whatever names are asked for.
            for keep_names in [false, true] {
                let options = OpenOptions { keep_names, ..OpenOptions::default() };
                let before = open_with(&path, options.clone()).unwrap();
                let after = open_with(work.place.path(&output), options).unwrap();
                assert_eq!(weights(&*before), weights(&*after), "{name}");
                let metadata = |source: &dyn TensorSource| {
                    let files = source.side_files();
                    files.iter().find(|file| file.name == "metadata.gguf").unwrap().read().unwrap()
                };
                assert_eq!(metadata(&*before), metadata(&*after), "{name}");
            }
            let lengths = [path.clone(), work.place.path(&output)].map(|path| std::fs::metadata(path).unwrap().len());
            // TQ1_0 is written as TQ2_0.
            assert!(lengths[0] == lengths[1] || name == "tq1_0", "{name}: {lengths:?}");
            read += 1;
        }
    }
    assert_eq!(read, 2 * 18);
}

/// Layers of integers are read by compressed-tensors as they were.
#[tokio::test(flavor = "multi_thread")]
async fn compressed_tensors_stay_packed() {
    let work = Work::new("compressed").await;
    for name in ["ct_pack_quantized_4", "ct_pack_quantized_8"] {
        let source = open(Path::new(QUANTIZED).join(name)).unwrap();
        work.import(source.clone(), name, "").await;
        let options = ExportOptions { format: ExportFormat::CompressedTensors, ..ExportOptions::default() };
        work.export(name, name, options).await.unwrap();
        let folder = work.place.path(name);
        let again = open(&folder).unwrap();
        assert_eq!(weights(&*source), weights(&*again), "{name}");
        let before = parsed(Path::new(QUANTIZED).join(name).join("config.json"));
        let after = parsed(folder.join("config.json"));
        let weights = |config: &Value| config["quantization_config"]["config_groups"]["group_0"]["weights"].clone();
        for key in ["num_bits", "group_size", "symmetric", "strategy"] {
            assert_eq!(weights(&before)[key], weights(&after)[key], "{name}: {key}");
        }
        assert_eq!(after["quantization_config"]["format"], "pack-quantized");
        // As numbers, the configuration says nothing of quantised weights.
        let report = work.export(name, &format!("{name}-dense"), ExportOptions::default()).await.unwrap();
        assert!(report.remarks[0].contains("without the quantisation"), "{report:?}");
        let dense = work.place.path(&format!("{name}-dense"));
        assert!(parsed(dense.join("config.json")).get("quantization_config").is_none());
        let values = |source: &dyn TensorSource| -> Vec<Vec<f32>> {
            self::weights(source).into_values().map(|(_, values)| values).collect()
        };
        assert_eq!(values(&*source), values(&*open(&dense).unwrap()));
    }
    // Codes of more kinds than it has, and layers that it does not look up by row.
    let source = open(Path::new(QUANTIZED).join("ct_pack_quantized_4_asym")).unwrap();
    work.import(source, "asymmetric", "").await;
    let options = || ExportOptions { format: ExportFormat::CompressedTensors, ..ExportOptions::default() };
    refused(
        work.export("asymmetric", "a", options()).await,
        ErrorKind::InvalidInput,
        &["asymmetric weight", "--allow-dequantize"],
    );
}

const ATTENTION: &str = "transformer.h.0.attn";

/// A model of GPT-2's kind, with experts beside it.
fn gpt2(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let config = json!({
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "num_local_experts": 2, "hidden_size": 8,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    std::fs::write(folder.join("vocab.json"), "{}").unwrap();
    std::fs::write(folder.join("LICENSE"), "free").unwrap();
    write(
        &folder.join("model.safetensors"),
        &[
            ("transformer.wte.weight", vec![12, 8]),
            ("transformer.h.0.attn.c_attn.weight", vec![8, 24]),
            ("transformer.h.0.attn.c_attn.bias", vec![24]),
            ("transformer.h.0.attn.c_proj.weight", vec![8, 8]),
            ("transformer.h.0.experts.gate_up_proj", vec![2, 6, 8]),
        ],
    );
}

/// What is understood of a configuration and split by rules is put together again, files and all.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_seen_otherwise_goes_out_as_it_came() {
    let work = Work::new("seen").await;
    let folder = work.place.path("gpt2");
    gpt2(&folder);
    let options = OpenOptions { keep: vec!["LICENSE".into()], ..OpenOptions::default() };
    let source = open_with(&folder, options).unwrap();
    let split = format!("[[rule]]\nlayers = '{ATTENTION}.c_attn'\nmethod = 'dense'\nsplit = 3\n");
    for rules in ["", &split] {
        let report = work.import(source.clone(), "m", rules).await;
        let mut names: Vec<&str> = report.layers.iter().map(|layer| layer.layer.as_str()).collect();
        let parts = names.iter().position(|name| name.ends_with("c_attn") || name.ends_with("c_attn.0")).unwrap();
        let split: Vec<&str> = names.drain(parts..parts + if rules.is_empty() { 1 } else { 3 }).collect();
        assert_eq!(split.len(), if rules.is_empty() { 1 } else { 3 });
        assert_eq!(
            names,
            [
                "lm_head",
                "transformer.h.0.attn.c_proj",
                "transformer.h.0.experts.gate_up_proj.0",
                "transformer.h.0.experts.gate_up_proj.1",
                "transformer.wte"
            ]
        );
        let head = &report.layers[0];
        assert_eq!((head.dense_bytes, head.stored_bytes), (0, 4 * 12 * 8), "{head:?}");
        // The head's weights are counted once.
        assert_eq!(report.dense_bytes, report.stored_bytes);
        let files: Vec<&str> = report.files.iter().map(|file| file.name.as_str()).collect();
        assert_eq!(files, ["LICENSE", "config.json", "vocab.json"]);
        let output = format!("out{}", rules.len());
        let report = work.export("m", &output, ExportOptions::default()).await.unwrap();
        assert_eq!((report.format, report.layers), (ExportFormat::HuggingFace, 6 + 2 * usize::from(!rules.is_empty())));
        let again = work.place.path(&output);
        for file in ["config.json", "vocab.json", "LICENSE"] {
            assert_eq!(std::fs::read(folder.join(file)).unwrap(), std::fs::read(again.join(file)).unwrap(), "{file}");
        }
        // The same tensors, in the order of their names.
        let tensors = |folder: &Path| {
            let bytes = std::fs::read(folder.join("model.safetensors")).unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let all = tensors.tensors().into_iter().map(|(n, t)| (n, (t.shape().to_vec(), t.data().to_vec())));
            all.collect::<BTreeMap<_, _>>()
        };
        assert_eq!(tensors(&folder), tensors(&again));
        let occupied = work.export("m", &output, ExportOptions::default()).await;
        refused(occupied, ErrorKind::InvalidInput, &["not empty"]);
    }
    // A part of a split weight runs as its rows.
    let latest = work.store.latest().await.unwrap();
    let part = latest.layer("m", &format!("{ATTENTION}.c_attn.1")).await.unwrap();
    let x = numbers((2, 8), 5);
    let y = part.forward(x.view(), Accuracy::Full).await.unwrap().y;
    let weight = part.load().await.unwrap().weight().unwrap();
    let bias = part.load().await.unwrap().bias().unwrap().unwrap();
    let all = open(&folder).unwrap();
    let whole = all.matrix(all.tensor(&format!("{ATTENTION}.c_attn.weight")).unwrap()).unwrap();
    assert_eq!(weight, whole.slice(ndarray::s![8..16, ..]));
    assert_eq!(y, x.dot(&weight.t()) + &bias);
    // A head that is compressed by itself is written, and the configuration says so.
    let rules = "[[rule]]\nlayers = 'lm_head'\nmethod = 'low_rank'\nweight = { type = 'int8', group = 8 }\n";
    work.import(source, "untied", rules).await;
    let report = work.export("untied", "untied", ExportOptions::default()).await.unwrap();
    assert!(report.remarks[0].contains("'lm_head.weight' is no longer tied"), "{report:?}");
    assert_eq!(parsed(work.place.path("untied/config.json"))["tie_word_embeddings"], false);
}

/// A rule that asks for what a weight is not is refused before any work, for all layers at once.
#[tokio::test(flavor = "multi_thread")]
async fn arrangements_that_do_not_fit_are_named() {
    let work = Work::new("arrangements").await;
    let path = work.place.path("m.safetensors");
    write(&path, &[("a.weight", vec![6, 4]), ("b.weight", vec![5, 4]), ("e", vec![2, 3, 4]), ("n.weight", vec![4])]);
    let source = open(&path).unwrap();
    for (rule, says) in [
        ("split = 4", &["found 2 things", "'a'", "divides its 6 rows", "'b'"][..]),
        ("split = [3, 3]", &["'b'", "5 together"]),
        ("split = 'experts'", &["'a'", "[experts, rows, columns]"]),
    ] {
        let rules = format!("[[rule]]\nlayers = '[ab]'\nmethod = 'dense'\n{rule}\n");
        let rules = Rules::parse(&rules, "r.toml").unwrap();
        let options = ImportOptions { rules, ..ImportOptions::default() };
        refused(import(&work.store, source.clone(), "m", options).await, ErrorKind::InvalidInput, says);
    }
    let report = work
        .import(source, "m", "[[rule]]\nlayers = 'e'\nmethod = 'dense'\nsplit = 'experts'\ntranspose = true\n")
        .await;
    let names: Vec<&str> = report.layers.iter().map(|layer| layer.layer.as_str()).collect();
    assert_eq!(names, ["a", "b", "e.0", "e.1", "n"]);
    assert_eq!((report.layers[2].out_features, report.layers[2].in_features), (4, 3));
    for (rules, says) in [
        ("[[rule]]\nlayers = 'a'\nmethod = 'dense'\nsplit = 0\n", "split: found 0"),
        ("[[rule]]\nlayers = 'a'\nmethod = 'dense'\nsplit = 'rows'\n", "expected \"experts\""),
        ("[[rule]]\nlayers = 'a'\nmethod = 'dense'\ntranspose = 1\n", "expected true or false"),
        (
            "[[rule]]\nlayers = 'a'\nmethod = 'vq_attention'\nn_head = 1\nquery = 'q'\nkey = 'k'\nvalue = 'v'\nsplit = 2\n",
            "rule of their own",
        ),
    ] {
        let message = Rules::parse(rules, "r.toml").unwrap_err().to_string();
        assert!(message.contains(says), "{message}");
    }
}

/// A base and an adapter together compute what the layers do.
#[tokio::test(flavor = "multi_thread")]
async fn adapters_are_the_corrections() {
    let work = Work::new("peft").await;
    let path = work.place.path("m.safetensors");
    let names = ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.embed_tokens"];
    write(
        &path,
        &[
            ("model.layers.0.q_proj.weight", vec![24, 32]),
            ("model.layers.1.q_proj.weight", vec![24, 32]),
            ("model.embed_tokens.weight", vec![40, 32]),
        ],
    );
    let rules = "[[rule]]\nlayers = '.*0.q_proj'\nmethod = 'low_rank'\nrank = 5\nweight = { type = 'int4', group = 32, symmetric = true }\n\
                 [[rule]]\nlayers = '.*'\nmethod = 'low_rank'\nrank = 3\nweight = { type = 'int4', group = 32, symmetric = true }\n";
    work.import(open(&path).unwrap(), "m", rules).await;
    let options = ExportOptions { format: ExportFormat::Peft, ..ExportOptions::default() };
    work.export("m", "adapter", options).await.unwrap();
    let config = parsed(work.place.path("adapter/adapter_config.json"));
    assert_eq!((&config["r"], &config["lora_alpha"]), (&json!(5), &json!(5)));
    assert_eq!(config["rank_pattern"], json!({names[0]: 5, names[1]: 3, names[2]: 3}));
    let options = ExportOptions { without_correction: true, ..ExportOptions::default() };
    work.export("m", "base.safetensors", options).await.unwrap();
    let adapter = open(work.place.path("adapter/adapter_model.safetensors")).unwrap();
    let base = open(work.place.path("base.safetensors")).unwrap();
    let latest = work.store.latest().await.unwrap();
    let tensor = |source: &Arc<dyn TensorSource>, name: String| source.matrix(source.tensor(&name).unwrap()).unwrap();
    for (name, rank) in names.iter().zip([5, 3, 3]) {
        let factor = |part: &str| tensor(&adapter, format!("base_model.model.{name}.{part}"));
        let correction = match name.contains("embed") {
            false => factor("lora_B.weight").dot(&factor("lora_A.weight")),
            true => factor("lora_embedding_B").dot(&factor("lora_embedding_A")).reversed_axes(),
        };
        let sum = tensor(&base, format!("{name}.weight")) + &correction;
        let layer = latest.layer("m", name).await.unwrap().load().await.unwrap();
        let weight = layer.weight().unwrap();
        assert!((&sum - &weight).iter().all(|d| d.abs() < 1e-5), "{name}");
        assert_eq!(layer.downcast_ref::<LowRankLayer>().unwrap().singular_values().len(), rank);
    }
    // What is left of a layer without its correction stays packed.
    let options = || ExportOptions { format: ExportFormat::CompressedTensors, ..ExportOptions::default() };
    let kept = work.export("m", "packed", options()).await;
    refused(kept, ErrorKind::InvalidInput, &["found 3 things", "a correction of rank 5", "--allow-dequantize"]);
    let kept = work.export("m", "packed", ExportOptions { without_correction: true, ..options() }).await;
    refused(kept, ErrorKind::InvalidInput, &["an embedding"]);
    let options = ExportOptions { without_correction: true, allow_dequantize: true, ..options() };
    work.export("m", "packed", options).await.unwrap();
    work.import(open(&path).unwrap(), "dense", "").await;
    let options = ExportOptions { format: ExportFormat::Peft, ..ExportOptions::default() };
    refused(work.export("dense", "none", options).await, ErrorKind::InvalidInput, &["none in model 'dense'"]);
}

/// A small Llama, as transformers has it.
fn llama(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": 8, "tie_word_embeddings": true, "bos_token_id": 1,
        "eos_token_id": 2,
    });
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let tokenizer = json!({
        "added_tokens": [{"id": 1, "content": "<s>", "special": true}, {"id": 2, "content": "</s>", "special": true}],
        "pre_tokenizer": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 3, "b": 4, "ab": 5, "<unk>": 0}, "merges": [["a", "b"]]},
    });
    std::fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let block = |part: &str| format!("model.layers.0.{part}.weight");
    let tensors = [
        ("model.embed_tokens.weight".to_owned(), vec![8, 64]),
        ("model.norm.weight".to_owned(), vec![64]),
        (block("input_layernorm"), vec![64]),
        (block("post_attention_layernorm"), vec![64]),
        (block("self_attn.q_proj"), vec![64, 64]),
        (block("self_attn.k_proj"), vec![32, 64]),
        (block("self_attn.v_proj"), vec![32, 64]),
        (block("self_attn.o_proj"), vec![64, 64]),
        (block("mlp.gate_proj"), vec![96, 64]),
        (block("mlp.up_proj"), vec![96, 64]),
        (block("mlp.down_proj"), vec![64, 96]),
    ];
    let tensors: Vec<(&str, Vec<usize>)> = tensors.iter().map(|(name, shape)| (name.as_str(), shape.clone())).collect();
    write(&folder.join("model.safetensors"), &tensors);
}

/// A model of transformers' becomes a GGUF file by what lies beside it.
#[tokio::test(flavor = "multi_thread")]
async fn gguf_is_made_of_transformers_files() {
    let work = Work::new("made").await;
    let folder = work.place.path("llama");
    llama(&folder);
    let source = open(&folder).unwrap();
    let rules = "[[rule]]\nlayers = '.*proj'\nmethod = 'low_rank'\nweight = { type = 'int4', group = 32, symmetric = true, scales = 'f16' }\n";
    work.import(source.clone(), "m", rules).await;
    work.import(source, "dense", "").await;
    work.export("m", "m.gguf", ExportOptions::default()).await.unwrap();
    let again = open(work.place.path("m.gguf")).unwrap();
    work.import(again.clone(), "again", "").await;
    let latest = work.store.latest().await.unwrap();
    let mut packed = 0;
    for record in latest.layers("m").await.unwrap() {
        let (before, after) =
            (latest.layer("m", &record.layer).await.unwrap(), latest.layer("again", &record.layer).await.unwrap());
        let weight = |layer: Arc<dyn layerstore::layer::Layer>| layer.weight();
        packed += usize::from(after.record().method == "low_rank");
        match (weight(before.load().await.unwrap()), weight(after.load().await.unwrap())) {
            (Ok(before), Ok(after)) => assert_eq!(before, after, "{}", record.layer),
            (before, after) => assert!(before.is_err() && after.is_err(), "{}", record.layer),
        }
    }
    assert_eq!(packed, 7);
    let metadata = again.metadata();
    for (key, value) in [
        ("general.architecture", "llama"),
        ("llama.embedding_length", "64"),
        ("llama.attention.head_count_kv", "2"),
        ("llama.rope.dimension_count", "16"),
        ("tokenizer.ggml.model", "gpt2"),
        ("tokenizer.ggml.pre", "gpt-2"),
        ("tokenizer.ggml.tokens", "[<unk>, <s>, </s>, a, b, ab, [PAD6], [PAD7]]"),
        ("tokenizer.ggml.token_type", "[1, 3, 3, 1, 1, 1, 5, 5]"),
        ("tokenizer.ggml.merges", "[a b]"),
        ("tokenizer.ggml.eos_token_id", "2"),
    ] {
        assert_eq!(metadata.get(key).map(String::as_str), Some(value), "{key}");
    }
    // What transformers needs is made of it again.
    let latest = work.store.latest().await.unwrap();
    let config: Value = serde_json::from_slice(&latest.file("again", "config.json").await.unwrap()).unwrap();
    let before = parsed(folder.join("config.json"));
    for key in before.as_object().unwrap().keys() {
        assert_eq!(config[key], before[key], "{key}");
    }
    let tokenizer: Value = serde_json::from_slice(&latest.file("again", "tokenizer.json").await.unwrap()).unwrap();
    assert_eq!(tokenizer["model"]["vocab"]["ab"], 5);
    // Numbers in another type.
    let options = ExportOptions { dtype: Some(ExportDtype::Q8_0), ..ExportOptions::default() };
    work.export("dense", "q8.gguf", options).await.unwrap();
    let rounded = weights(&*open(work.place.path("q8.gguf")).unwrap());
    let (format, values) = &rounded["model.layers.0.mlp.up_proj"];
    assert!(format.contains("int8"), "{format}");
    let exact = &weights(&*open(&folder).unwrap())["model.layers.0.mlp.up_proj"].1;
    assert!(values.iter().zip(exact).all(|(a, b)| (a - b).abs() < 0.01));
    assert!(rounded["model.norm"].0.contains("F32"));
    let options = ExportOptions { dtype: Some(ExportDtype::Q8_0), ..ExportOptions::default() };
    refused(work.export("dense", "q8.safetensors", options).await, ErrorKind::InvalidInput, &["q8_0", "of gguf alone"]);
}

/// What another program runs otherwise is refused, or said.
#[tokio::test(flavor = "multi_thread")]
async fn what_other_programs_run_otherwise_is_said() {
    let work = Work::new("otherwise").await;
    let folder = work.place.path("llama");
    llama(&folder);
    let with = |changes: Value| {
        let mut config = parsed(folder.join("config.json"));
        changes.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    };
    for (changes, says) in [
        (json!({"hidden_act": "gelu"}), "the activation gelu"),
        (json!({"hidden_act": "silu", "model_type": "mistral", "sliding_window": 16}), "windows of 16 tokens"),
        (json!({"sliding_window": null, "num_hidden_layers": 2}), "1 blocks of 64 features"),
        (json!({"num_hidden_layers": 1, "eos_token_id": 9}), "eos_token_id is 9, of 8 tokens"),
    ] {
        with(changes);
        work.import(open(&folder).unwrap(), "m", "").await;
        refused(work.export("m", "m.gguf", ExportOptions::default()).await, ErrorKind::InvalidInput, &[says]);
    }
    // Llama 3.1's positions are a tensor there, and a setting here.
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    });
    with(json!({"eos_token_id": 2, "model_type": "llama", "rope_scaling": llama3.clone(), "rope_theta": 500000.0}));
    work.import(open(&folder).unwrap(), "m", "").await;
    work.export("m", "m.gguf", ExportOptions::default()).await.unwrap();
    work.import(open(work.place.path("m.gguf")).unwrap(), "again", "").await;
    let report = work.export("again", "again", ExportOptions::default()).await.unwrap();
    assert!(report.remarks[0].contains("rope_freqs.weight"), "{report:?}");
    assert_eq!(parsed(work.place.path("again/config.json"))["rope_scaling"], llama3);
    // Constants that outputs need are biases, where the family has any.
    let inputs = work.place.path("inputs.safetensors");
    write(&inputs, &[("model.layers.0.self_attn.q_proj", vec![96, 64]), ("model.layers.0.mlp.up_proj", vec![96, 64])]);
    let rules = |layers: &str| {
        format!(
            "[[rule]]\nlayers = '{layers}'\nmethod = 'low_rank'\nbias_correction = true\nweight = {{ type = 'int4', group = 32, symmetric = true, scales = 'f16' }}\n"
        )
    };
    let import_with = async |model: &str, layers: &str| {
        let rules = Rules::parse(&rules(layers), "r.toml").unwrap();
        let calibration = Some(CalibrationFile::open(&inputs).unwrap());
        let options = ImportOptions { rules, calibration, ..ImportOptions::default() };
        import(&work.store, open(&folder).unwrap(), model, options).await.unwrap();
    };
    import_with("biased", ".*q_proj").await;
    let report = work.export("biased", "biased", ExportOptions::default()).await.unwrap();
    assert_eq!(report.added_biases.len(), 4, "{report:?}");
    let config = parsed(work.place.path("biased/config.json"));
    assert_eq!((&config["attention_bias"], config.get("mlp_bias")), (&json!(true), None));
    let again = open(work.place.path("biased")).unwrap();
    let zeros = again.vector(again.tensor("model.layers.0.self_attn.o_proj.bias").unwrap()).unwrap();
    assert_eq!(zeros.to_vec(), [0.0; 64]);
    with(json!({"model_type": "qwen2"}));
    import_with("qwen2", ".*up_proj").await;
    let says = ["up_proj.bias", "--allow-approximate"];
    refused(work.export("qwen2", "qwen2", ExportOptions::default()).await, ErrorKind::InvalidInput, &says);
    refused(work.export("qwen2", "q.gguf", ExportOptions::default()).await, ErrorKind::InvalidInput, &says);
    let options = ExportOptions { allow_approximate: true, ..ExportOptions::default() };
    let report = work.export("qwen2", "q.gguf", options).await.unwrap();
    assert!(report.remarks.iter().any(|remark| remark.contains("no such bias")), "{report:?}");
}

/// All layers that a format cannot hold are named at once, and nothing is written.
#[tokio::test(flavor = "multi_thread")]
async fn what_gguf_cannot_hold_is_said_before() {
    let work = Work::new("unheld").await;
    let folder = work.place.path("llama");
    llama(&folder);
    let rules = "[[rule]]\nlayers = '.*q_proj'\nmethod = 'key_value'\n\
                 [[rule]]\nlayers = '.*up_proj'\nmethod = 'low_rank'\nweight = { type = 'int4', group = 32 }\n\
                 [[rule]]\nlayers = '.*down_proj'\nmethod = 'low_rank'\nweight = { type = 'int4', group = 32, symmetric = true }\n";
    work.import(open(&folder).unwrap(), "m", rules).await;
    let says = ["found 3 things", "key_value layers", "zero points", "scales that are no f16", "--allow-dequantize"];
    refused(work.export("m", "m.gguf", ExportOptions::default()).await, ErrorKind::InvalidInput, &says);
    assert!(!work.place.path("m.gguf").exists());
    let options = ExportOptions { allow_dequantize: true, dtype: Some(ExportDtype::F16), ..ExportOptions::default() };
    work.export("m", "m.gguf", options).await.unwrap();
    let options = ExportOptions { allow_dequantize: true, allow_approximate: true, ..ExportOptions::default() };
    work.export("m", "rounded.gguf", options).await.unwrap();
    let rounded = &weights(&*open(work.place.path("rounded.gguf")).unwrap())["model.layers.0.mlp.down_proj"];
    assert!(rounded.0.contains("int4"), "{}", rounded.0);
    let text = work.place.path("plain");
    std::fs::create_dir(&text).unwrap();
    write(&text.join("model.safetensors"), &[("a.weight", vec![2, 2])]);
    work.import(open(&text).unwrap(), "plain", "").await;
    refused(
        work.export("plain", "plain.gguf", ExportOptions::default()).await,
        ErrorKind::InvalidInput,
        &["config.json"],
    );
    let report = work.export("plain", "folder", ExportOptions::default()).await.unwrap();
    assert!(report.remarks[0].contains("no config.json"), "{report:?}");
}
