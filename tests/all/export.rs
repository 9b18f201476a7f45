//! An export says what the layers compute at full accuracy: layer by layer, for every method and its settings.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use layerstore::formats::TensorSource;
use layerstore::layer::{Accuracy, DType};
use layerstore::{
    CalibrationFile, ErrorKind, ExportOptions, ImportOptions, Progress, Rules, Snapshot, Store, export, formats, import,
};
use layerstore_core::layer::from_f32;
use layerstore_core::linalg::relative_error;
use ndarray::{Array1, Array2, Axis};
use serde_json::json;

use crate::support::{CHECKPOINT, INPUTS, Place, field, refused};

const OUT: usize = 40;
const IN: usize = 64;

/// Methods and settings, as rules give them.
const SETTINGS: &[(&str, &str)] = &[
    ("dense", ""),
    ("key_value", ""),
    ("key_value", "decomposition = 'svd'"),
    ("key_value", "energy_keep = 0.9"),
    ("key_value", "decomposition = 'svd'\nmin_singular_value = 2.0"),
    ("key_value", "ridge_relative = 0.5\nridge_regularization = 0.1"),
    ("key_value", "use_bias = false"),
    ("key_value", "use_bias = false\nenergy_keep = 0.9"),
    ("key_value", "use_approximate_inference = false\nvalues = 'int8'"),
    ("key_value", "expected_keys_per_query = 5\nmax_ids_capacity = 3"),
    ("key_value", "ranking = 'score'\nsides = 'positive'\nthreshold = 0.5"),
    ("key_value", "max_relative_error = 0.3\nbackend = { type = 'flat', keys = 'f16' }"),
    ("key_value", "backend = { type = 'flat', keys = 'int8' }\nvalues = 'int8'"),
    ("key_value", "decomposition = 'svd'\nbackend = { type = 'flat', keys = 'int8' }\nvalues = 'f16'"),
    ("key_value", "values = { type = 'pq', subvectors = 20, codewords = 32 }\nuse_straight_through_estimator = false"),
    ("key_value", "backend = { type = 'pq', subvectors = 32, codewords = 32 }"),
    ("key_value", "backend = { type = 'pq', subvectors = 32, codewords = 32, store_float_keys = true }"),
    ("key_value", "backend = { type = 'pq', subvectors = 9, store_float_keys = true }\nvalues = 'f16'"),
    ("key_value", "backend = { type = 'ivf_pq', clusters = 4, probes = 2, bits = 5 }\nenergy_keep = 0.95"),
    ("key_value", "backend = { type = 'ivf_pq', clusters = 4, probes = 2, bits = 4, store_float_keys = true }"),
    ("key_value", "backend = { type = 'hnsw' }\non_misfit = 'error'"),
    ("key_value", "backend = { type = 'hnsw', vectors = 'bf16' }\nvalues = 'int8'"),
    ("key_value", "backend = { type = 'hnsw', vectors = 'f16', store_float_keys = true }"),
    ("low_rank", ""),
    ("low_rank", "bias_correction = true"),
    ("low_rank", "bias_correction = true\nrank = 0\nweight = { type = 'int2', group = 16 }"),
    (
        "low_rank",
        "bias_correction = true\nrank = 4\nactivations = 'int8'\nweight = { type = 'int3', symmetric = true }",
    ),
    ("low_rank", "rank = 4\nactivations = 'int8_absmax'\nweight = { type = 'int5', group = 'channel' }"),
    ("low_rank", "rank = { max_bits = 9.0 }\nweight = { type = 'int6', group = 'tensor', scales = 'f16' }"),
    ("low_rank", "rank = { max_error = 0.02 }\nweight = { type = 'int7', group = 32, symmetric = true }\nsvd = 'full'"),
    ("low_rank", "rank = 2\nweight = { type = 'int8', group = 64 }\nclipping = 'absmax'\nfactors = 'f32'"),
    ("low_rank", "rank = 3\nweight = { type = 'nf4', group = 32 }\nfactors = 'int8'\nscaling = 'mean_abs'"),
    ("low_rank", "rank = 3\nweight = { type = 'mxint4' }\nfactors = 'int8'\nscaling = 'rms'\nbias_correction = true"),
    ("low_rank", "rank = 3\nweight = { type = 'mxint2', group = 16 }\nclipping = 'mse'"),
    ("low_rank", "rank = 0\nweight = { type = 'ternary', group = 16 }\nbias_correction = true"),
    ("low_rank", "rank = 5\nweight = { type = 'f16' }\nbias_correction = true"),
    ("low_rank", "rank = 0\nweight = { type = 'bf16' }\nbias_correction = true"),
    ("low_rank", "rank = 4\nclipping = 'hqq'\nweight = { type = 'int3', group = 32 }"),
    ("low_rank", "rank = 4\nclipping = { percentile = 99.0 }\nweight = { type = 'int4', group = 32 }"),
    ("low_rank", "rank = 4\ndual_scaling = true\nbias_correction = true\nweight = { type = 'int2', group = 32 }"),
    ("low_rank", "rank = 4\nrounding = 'gptq'\nscaling = 'exact'\nbias_correction = true"),
    (
        "low_rank",
        "rank = 4\nrounding = 'gptq'\nactivation_order = true\ndual_scaling = true\nscaling = 'exact'\nsweeps = 0",
    ),
    (
        "low_rank",
        "rank = 4\nrounding = 'gptq'\ndamping = 0.01\nridge_relative = 0.1\nridge_regularization = 0.1\nscaling = 'exact'",
    ),
    ("ternary", ""),
    ("ternary", "bias_correction = true"),
    ("ternary", "bias_correction = true\nactivations = 'f32'\ngroup = 'channel'\nclipping = 'mse'"),
    ("ternary", "group = 16\nscales = 'f16'\nrank = 8\nscaling = 'exact'\nbias_correction = true\nrounding = 'gptq'"),
    ("ternary", "group = 32\nrank = 8\nfactors = 'int8'\nactivations = 'int8'\ndual_scaling = true"),
];

/// Numbers that look random, within −1 … 1.
fn sample(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(0x9e37_79b9);
    Array2::from_shape_fn((rows, columns), |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

/// Inputs whose mean is far from 0.
fn inputs(rows: usize, seed: u64) -> Array2<f32> {
    let mean = Array1::from_shape_fn(IN, |j| 0.8 - (j % 5) as f32 * 0.3);
    sample(rows, IN, seed) * 1.2 + mean
}

/// A tensor to write: its name, dtype and numbers.
type Tensor = (String, DType, Vec<usize>, Vec<f32>);

fn matrix(name: &str, dtype: DType, array: &Array2<f32>) -> Tensor {
    (name.to_owned(), dtype, array.shape().to_vec(), array.iter().copied().collect())
}

fn vector(name: &str, dtype: DType, array: &Array1<f32>) -> Tensor {
    (name.to_owned(), dtype, vec![array.len()], array.to_vec())
}

fn write(path: &Path, tensors: &[Tensor]) {
    let raw: Vec<_> = tensors.iter().map(|(_, dtype, _, values)| from_f32(*dtype, values).unwrap()).collect();
    let views = tensors.iter().zip(&raw).map(|((name, dtype, shape, _), raw)| {
        (name, safetensors::tensor::TensorView::new(*dtype, shape.clone(), raw).unwrap())
    });
    let views: Vec<_> = views.collect();
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A checkpoint and inputs of its layers in a folder, imported by rules.
struct Model {
    place: Place,
    store: Store,
}

impl Model {
    async fn new(name: &str, tensors: &[Tensor], activations: &[Tensor], rules: &str) -> Self {
        let place = Place::new();
        write(&place.path("checkpoint.safetensors"), tensors);
        write(&place.path("inputs.safetensors"), activations);
        let store = Store::create(&format!("memory://export-{name}")).await.unwrap();
        let rules = Rules::parse(rules, "rules.toml").unwrap();
        let calibration = Some(CalibrationFile::open(place.path("inputs.safetensors")).unwrap());
        let options = ImportOptions { rules, calibration, ..ImportOptions::default() };
        let checkpoint = formats::open(place.path("checkpoint.safetensors")).unwrap();
        import(&store, checkpoint, "m", options).await.unwrap();
        Model { place, store }
    }

    async fn latest(&self) -> Snapshot {
        self.store.latest().await.unwrap()
    }

    async fn export(&self, model: &str, allow_approximate: bool) -> layerstore::Result<layerstore::ExportReport> {
        let options = ExportOptions { allow_approximate, ..ExportOptions::default() };
        export(&self.latest().await, model, &self.file(model), options).await
    }

    fn file(&self, model: &str) -> std::path::PathBuf {
        self.place.path(&format!("{model}.safetensors"))
    }
}

/// x · Wᵀ + b of a file.
fn plain(source: &dyn TensorSource, layer: &str, x: &Array2<f32>, with_bias: bool) -> Array2<f32> {
    let weight = source.matrix(source.tensor(&format!("{layer}.weight")).unwrap()).unwrap();
    let y = x.dot(&weight.t());
    match source.tensor(&format!("{layer}.bias")).filter(|_| with_bias) {
        Some(bias) => y + &source.vector(bias).unwrap(),
        None => y,
    }
}

/// The largest error of a row, beside the rows' usual length.
fn apart(found: &Array2<f32>, expected: &Array2<f32>) -> f64 {
    let length = |row: ndarray::ArrayView1<f32>| row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let usual = expected.rows().into_iter().map(length).sum::<f64>() / expected.nrows() as f64;
    let errors = found - expected;
    errors.rows().into_iter().map(length).fold(0f64, f64::max) / usual
}

#[tokio::test(flavor = "multi_thread")]
async fn every_layer_is_written_as_it_computes() {
    let (mut tensors, mut activations, mut rules) = (vec![], vec![], String::new());
    for (i, (method, settings)) in SETTINGS.iter().enumerate() {
        rules.push_str(&format!("[[rule]]\nlayers = 's{i}\\..*'\nmethod = '{method}'\n{settings}\n"));
        let narrow = if i % 2 == 0 { DType::F16 } else { DType::BF16 };
        for (name, dtype, biased) in [("a", DType::F32, false), ("b", DType::F32, true), ("c", narrow, i % 4 < 2)] {
            let (layer, seed) = (format!("s{i}.{name}"), 7 * i as u64 + u64::from(name.as_bytes()[0]));
            // Singular values that fall, so that settings which drop some drop little.
            let low = sample(OUT, 3, seed + 1).dot(&sample(3, IN, seed + 2));
            tensors.push(matrix(&format!("{layer}.weight"), dtype, &(low + sample(OUT, IN, seed))));
            if biased {
                tensors.push(vector(&format!("{layer}.bias"), dtype, &sample(1, OUT, seed + 3).row(0).to_owned()));
            }
            activations.push(matrix(&layer, DType::F32, &inputs(160, seed + 4)));
        }
    }
    let model = Model::new("all", &tensors, &activations, &rules).await;
    let report = model.export("m", false).await.unwrap();
    assert_eq!((report.layers, report.bytes), (3 * SETTINGS.len(), model.file("m").metadata().unwrap().len()));
    let (file, original) = (formats::open(model.file("m")).unwrap(), &tensors);
    let names: BTreeSet<&String> = original.iter().map(|t| &t.0).chain(&report.added_biases).collect();
    assert!(names.into_iter().eq(file.tensors().keys()));
    for (name, dtype, shape, _) in original {
        let found = file.tensor(name).unwrap();
        assert_eq!((found.dtype, &found.shape), (*dtype, shape), "{name}");
    }

    // As it runs in the store, on inputs one of which is 0: its output is what the bias alone says.
    let mut x = inputs(12, 99);
    x.row_mut(0).fill(0.0);
    let latest = model.latest().await;
    let mut outputs = BTreeMap::new();
    let mut constants = 0;
    for (i, (method, settings)) in SETTINGS.iter().enumerate() {
        for name in ["a", "b", "c"] {
            let layer = format!("s{i}.{name}");
            let dtype = file.tensor(&format!("{layer}.weight")).unwrap().dtype;
            let tolerance = match dtype {
                DType::F32 => 2e-5,
                DType::F16 => 2e-3,
                _ => 1e-2,
            };
            let expected = latest.layer("m", &layer).await.unwrap().forward(x.view(), Accuracy::Full).await.unwrap().y;
            let found = plain(&*file, &layer, &x, true);
            let error = apart(&found, &expected);
            assert!(error < tolerance, "{layer} {method} {settings}: {error}");
            let bias = format!("{layer}.bias");
            if report.added_biases.contains(&bias) {
                assert_eq!(file.tensor(&bias).unwrap().dtype, dtype, "{bias}");
                let notes = &report.notes[&layer];
                assert!(notes.iter().any(|note| note.contains("bias is added")), "{layer}: {notes:?}");
                // Without it the check above fails.
                let error = apart(&plain(&*file, &layer, &x, false), &expected);
                assert!(dtype != DType::F32 || error > tolerance, "{layer} {method} {settings}: {error}");
                constants += 1;
            }
            outputs.insert(layer, found);
        }
    }
    assert!(constants > SETTINGS.len() / 2, "{constants}");
    let noted =
        |layer: &str, says: &str| report.notes.get(layer).is_some_and(|all| all.iter().any(|n| n.contains(says)));
    for (i, (method, settings)) in SETTINGS.iter().enumerate() {
        let searches = *method == "key_value" && !settings.contains("use_approximate_inference");
        let rounds = *method == "ternary" && !settings.contains("'f32'") || settings.contains("activations = 'int8");
        assert_eq!(noted(&format!("s{i}.a"), "full accuracy"), searches || rounds, "{method} {settings}");
        let leaves_out = settings.contains("use_bias = false");
        assert_eq!(noted(&format!("s{i}.b"), "leave out the checkpoint's bias"), leaves_out, "{method} {settings}");
    }

    // Imported again, it computes the same; exported again, it is the same.
    import(&model.store, file.clone(), "back", ImportOptions::default()).await.unwrap();
    let latest = model.latest().await;
    for (layer, expected) in &outputs {
        let handle = latest.layer("back", layer).await.unwrap();
        let found = handle.forward(x.view(), Accuracy::Approximate).await.unwrap().y;
        assert!(relative_error(found.view(), expected.view()) < 1e-6, "{layer}");
    }
    let again = model.export("back", false).await.unwrap();
    assert_eq!((again.added_biases.len(), again.notes.len()), (0, 0));
    let back = formats::open(model.file("back")).unwrap();
    assert_eq!(back.tensors(), file.tensors());
    for tensor in file.tensors().values() {
        assert_eq!(back.bytes(tensor).unwrap(), file.bytes(tensor).unwrap(), "{}", tensor.name);
    }
}

/// What a weight and a bias do not say is refused, all of it in one error, and left out where that is asked for.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_weight_does_not_say() {
    let layers = ["norm", "relu", "both", "plain"];
    let weights: Vec<Tensor> =
        (0..).zip(layers).map(|(i, l)| matrix(&format!("{l}.weight"), DType::F32, &sample(OUT, IN, i))).collect();
    let activations: Vec<Tensor> = (10..).zip(layers).map(|(i, l)| matrix(l, DType::F32, &inputs(100, i))).collect();
    let rule = |layer: &str, settings: &str| format!("[[rule]]\nlayers = '{layer}'\nmethod = 'ternary'\n{settings}\n");
    let rules = rule("norm", "norm = true\nbias_correction = true")
        + &rule("relu", "activation = 'relu'")
        + &rule("both", "norm = true\nactivation = 'hard_sigmoid'")
        + &rule("plain", "");
    let model = Model::new("unsaid", &weights, &activations, &rules).await;
    let says = [
        "found 3 things",
        "layer 'both': what a weight and a bias in a checkpoint are to say: found an RMSNorm before its weight and the \
         activation hard_sigmoid after it",
        "layer 'norm': what",
        "layer 'relu': what a weight and a bias in a checkpoint are to say: found the activation relu after it",
        "--allow-approximate",
    ];
    refused(model.export("m", false).await, ErrorKind::InvalidInput, &says);
    assert!(!model.file("m").exists());
    let report = model.export("m", true).await.unwrap();
    assert_eq!(report.added_biases, ["norm.bias"]);
    assert!(report.notes["norm"].contains(&"written without an RMSNorm before its weight".to_owned()), "{report:?}");
    assert!(report.notes["relu"].contains(&"written without the activation relu after it".to_owned()), "{report:?}");
    let (file, latest) = (formats::open(model.file("m")).unwrap(), model.latest().await);
    let x = inputs(6, 40);
    for name in layers {
        // The rest is there.
        let layer = latest.layer("m", name).await.unwrap().load().await.unwrap();
        let inner = layer.weight_inputs(x.view()).unwrap().to_owned();
        let mut found = plain(&*file, name, &inner, true);
        layer.activate(found.view_mut());
        let expected = layer.forward(x.view(), Accuracy::Full).unwrap().y;
        assert!(apart(&found, &expected) < 2e-5, "{name}");
    }
}

/// A constant goes where a bias can stand, in a dtype that holds it.
#[tokio::test(flavor = "multi_thread")]
async fn constants_without_a_place_for_a_bias() {
    let rules = "[[rule]]\nlayers = 'table|taken|full|wide|fine'\nmethod = 'low_rank'\nrank = 0\nbias_correction = true\n\
                 weight = { type = 'int2', group = 'channel' }\n";
    let layers = ["table", "taken", "full", "wide", "fine"];
    let large = |seed| sample(OUT, IN, seed) * 100.0;
    let tensors = [
        // Not named NAME.weight.
        matrix("table", DType::F32, &sample(OUT, IN, 1)),
        // What would be its bias is a tensor by itself, of another length.
        matrix("taken.weight", DType::F32, &sample(OUT, IN, 2)),
        vector("taken.bias", DType::F32, &Array1::ones(IN)),
        // With the constant it is beyond F16, and without it near the end.
        matrix("full.weight", DType::F16, &large(3)),
        vector("full.bias", DType::F16, &Array1::from_elem(OUT, 65_000.0)),
        // Beyond F16 where there was no bias.
        matrix("wide.weight", DType::F16, &large(4)),
        matrix("fine.weight", DType::F16, &sample(OUT, IN, 5)),
    ];
    let mut activations: Vec<Tensor> =
        (10..).zip(layers).map(|(i, l)| matrix(l, DType::F32, &inputs(100, i))).collect();
    activations[2].3.iter_mut().for_each(|v| *v *= 60.0);
    activations[3].3.iter_mut().for_each(|v| *v *= 3000.0);
    let model = Model::new("places", &tensors, &activations, rules).await;
    let says = [
        "found 3 things",
        "layer 'table'",
        "'table' cannot have a bias",
        "layer 'taken'",
        "'taken.weight' cannot have a bias",
        "layer 'full'",
        "a part of its bias, which F16 does not hold",
    ];
    refused(model.export("m", false).await, ErrorKind::InvalidInput, &says);
    let report = model.export("m", true).await.unwrap();
    assert_eq!(report.added_biases, ["fine.bias", "wide.bias"]);
    let file = formats::open(model.file("m")).unwrap();
    let dtype = |name: &str| file.tensor(name).unwrap().dtype;
    assert_eq!((dtype("wide.bias"), dtype("fine.bias"), dtype("full.bias")), (DType::F32, DType::F16, DType::F16));
    assert_eq!(file.vector(file.tensor("taken.bias").unwrap()).unwrap(), Array1::<f32>::ones(IN));
    assert_eq!(file.tensors().len(), tensors.len() + 2);
    assert!(report.notes["table"].iter().any(|note| note.starts_with("written without the constant")), "{report:?}");
    let latest = model.latest().await;
    let zero = Array2::zeros((1, IN));
    for name in ["wide", "fine"] {
        let y = latest.layer("m", name).await.unwrap().forward(zero.view(), Accuracy::Full).await.unwrap().y;
        let bias = file.vector(file.tensor(&format!("{name}.bias")).unwrap()).unwrap().insert_axis(Axis(0));
        assert!(relative_error(bias.view(), y.view()) < 1e-3, "{name}");
    }
}

/// The command refuses, notes and reports.
#[test]
fn the_command_says_what_the_file_does_not() {
    let place = Place::new();
    let rules = place.path("rules.toml");
    let import = |model: &str, settings: &str| {
        std::fs::write(&rules, format!("[[rule]]\nlayers = 'blocks\\..*'\n{settings}\n")).unwrap();
        place.import(model, Some(rules.to_str().unwrap()));
    };
    import("normed", "method = 'ternary'\nnorm = true");
    import(
        "corrected",
        "method = 'low_rank'\nweight = { type = 'int2', group = 16 }\nbias_correction = true\nrank = 0",
    );
    let file = place.path("out.safetensors");
    let args = |model: &'static str| ["export", model, "--output", file.to_str().unwrap()];
    place.fails(1, &["blocks.0.down", "blocks.1.up", "RMSNorm", "--allow-approximate"], &args("normed"));
    assert!(!file.exists());
    let ran = place.run(&[&args("normed")[..], &["--allow-approximate"]].concat());
    assert!(ran.code == 0 && ran.err.contains("and 5 more: written without an RMSNorm"), "{}", ran.err);
    let report = place.json(&args("corrected"));
    assert_eq!(report["added_biases"], json!(["blocks.0.mix.bias", "blocks.1.mix.bias"]));
    assert!(
        field(field(&report, "notes"), "blocks.0.mix")[0].as_str().unwrap().contains("a bias is added"),
        "{report}"
    );
    let ran = place.run(&args("corrected"));
    assert!(ran.out.contains("2 biases added"), "{}", ran.out);
    assert!(ran.err.contains("note: layer 'blocks.0.mix' and 1 more: a bias is added"), "{}", ran.err);
    // As it runs, by the command as well.
    let (file, x) = (formats::open(&file).unwrap(), place.path("x.npy").display().to_string());
    let inputs = layerstore::ActivationsFile::open(INPUTS).unwrap().get("blocks.0.mix", 48).unwrap().unwrap();
    formats::write_array(&x, inputs.view(), false).unwrap();
    let y = place.path("y.npy").display().to_string();
    place.json(&["forward", "corrected", "blocks.0.mix", "--input", &x, "--output", &y]);
    let expected = formats::read_array(&y).unwrap().0;
    assert!(apart(&plain(&*file, "blocks.0.mix", &inputs, true), &expected) < 2e-3);
    assert_eq!(file.tensors().len(), formats::open(CHECKPOINT).unwrap().tensors().len() + 2);
}

/// Counts what it is told.
#[derive(Default)]
struct Told(Mutex<(usize, u64, Vec<u64>)>);

impl Progress for Told {
    fn started(&self, layers: usize, bytes: u64) {
        let mut told = self.0.lock().unwrap();
        (told.0, told.1) = (layers, bytes);
    }

    fn layer_done(&self, bytes: u64, _skipped: bool) {
        self.0.lock().unwrap().2.push(bytes);
    }
}

/// Layers are counted, not tensors: a layer with a bias has two.
#[tokio::test(flavor = "multi_thread")]
async fn progress_counts_layers() {
    let place = Place::new();
    place.import("m", None);
    let store = Store::open(&place.store()).await.unwrap();
    let told = Arc::new(Told::default());
    let options = ExportOptions { progress: told.clone(), ..ExportOptions::default() };
    let latest = store.latest().await.unwrap();
    export(&latest, "m", &place.path("m.safetensors"), options).await.unwrap();
    let stored = latest.layers("m").await.unwrap().len();
    let (layers, bytes, done) = &*told.0.lock().unwrap();
    assert_eq!((*layers, done.len(), *bytes), (stored, *layers, done.iter().sum()));
    assert!(formats::open(place.path("m.safetensors")).unwrap().tensors().len() > *layers);
}
