//! Keras-MML's layers, each saved in a store, opened at a snapshot, and run.

use layerstore::Store;
use layerstore::layer::{
    Accuracy, Activation, ActivationFormat, DenseLayer, Layer, RmsNorm, SharedLayer, TernaryConfig, TernaryLayer,
    compress,
};
use layerstore::nn::{
    BlockConfig, EmbeddingTable, Glu, GluConfig, Gru, GruConfig, GruTokenMixer, Lru, LruConfig, LruLayers, LruSpectrum,
    Module, PatchEmbedding, Patches, SequenceConfig, TokenEmbedding, TransformerBlock, decode_ternary, encode_ternary,
};
use layerstore_core::quant::unpack;
use ndarray::{Array1, Array2, Array3, ArrayD, Axis, Ix3};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Case, Tally, Tensor, narrow};

fn config<T: DeserializeOwned>(case: &Case) -> T {
    serde_json::from_value(case.index["config"].clone()).unwrap_or_else(|e| panic!("{}: {e}", case.name))
}

fn vector(case: &Case, name: &str) -> Option<Array1<f32>> {
    case.has(name).then(|| case.vector(name).mapv(|v| v as f32))
}

/// Gains are stored in the shape of the inputs less their batch.
fn by_position(case: &Case, name: &str) -> Option<Array2<f32>> {
    case.has(name).then(|| {
        let all = case.any(name).mapv(|v| v as f32);
        let features = *all.shape().last().unwrap();
        let shape = (all.len() / features, features);
        all.into_shape_with_order(shape).unwrap()
    })
}

/// `DenseMML` where there is a gain, else `Dense`.
fn linear(case: &Case, prefix: &str, activation: Activation) -> SharedLayer {
    let kernel = narrow(&case.matrix(&format!("{prefix}kernel"))).reversed_axes().as_standard_layout().into_owned();
    let bias = vector(case, &format!("{prefix}bias"));
    let bias = bias.as_ref().map(|b| b.view());
    match by_position(case, &format!("{prefix}norm_gain")) {
        None => DenseLayer::from_f32(kernel.view(), bias).shared(),
        Some(gain) => {
            let layer = compress(&TernaryConfig::default(), kernel.view(), bias, None).unwrap();
            let norm = RmsNorm::new(Some(gain), None).unwrap();
            layer.with_norm(Some(norm)).unwrap().with_activation(activation).shared()
        }
    }
}

fn plain(case: &Case, prefix: &str) -> SharedLayer {
    linear(case, prefix, Activation::Linear)
}

fn glu(case: &Case, prefix: &str, config: GluConfig) -> Glu {
    Glu::new(config, plain(case, &format!("{prefix}gate_dense.")), plain(case, &format!("{prefix}down_dense.")))
        .unwrap()
}

fn gru(case: &Case, prefix: &str, config: GruConfig) -> Gru {
    let part = |name: &str| format!("{prefix}{name}.");
    let gate = case.has(&format!("{prefix}data_gate.kernel")).then(|| plain(case, &part("data_gate")));
    Gru::new(config, plain(case, &part("kernel")), gate, plain(case, &part("output_gate"))).unwrap()
}

fn token_mixer(case: &Case, prefix: &str, units: &Value) -> GruTokenMixer {
    let settings = &case.index["config"];
    let config = GruConfig {
        units: units.as_u64().unwrap() as usize,
        num_heads: settings["num_heads"].as_u64().unwrap() as usize,
        fully_mml: settings["fully_mml"].as_bool().unwrap(),
        sequence: SequenceConfig { return_sequences: true, ..SequenceConfig::default() },
        ..GruConfig::default()
    };
    GruTokenMixer::new(gru(case, prefix, config)).unwrap()
}

fn table(case: &Case, name: &str) -> Option<EmbeddingTable> {
    let rows = case.has(name).then(|| narrow(&case.matrix(name)))?;
    Some(EmbeddingTable::new(DenseLayer::from_f32(rows.view(), None).shared()).unwrap())
}

fn module(case: &Case) -> Module {
    let settings = &case.index["config"];
    match case.index["layer"].as_str().unwrap() {
        "DenseMML" => {
            let activation = serde_json::from_value(settings["activation"].clone()).unwrap_or(Activation::Linear);
            Module::Linear(linear(case, "w.", activation))
        }
        "DenseMML (saved)" => {
            let activation = serde_json::from_value(settings["activation"].clone()).unwrap();
            let shape: Vec<usize> = case.any("out.kernel_shape").iter().map(|&v| v as usize).collect();
            let bytes: Vec<u8> = case.any("out.kernel_encoded").iter().map(|&v| v as u8).collect();
            let kernel = decode_ternary(&bytes, shape.iter().product()).unwrap();
            let kernel = Array2::from_shape_vec((shape[0], shape[1]), kernel).unwrap();
            case.holds("out.kernel_decoded", kernel.mapv(f64::from).into_dyn());
            let steps = *case.any("out.kernel_scale").first().unwrap() as f32;
            let layer = TernaryLayer::from_ternary(kernel.t(), 1.0 / steps, vector(case, "out.bias")).unwrap();
            let norm = RmsNorm::new(by_position(case, "out.norm_gain"), None).unwrap();
            Module::Linear(layer.with_norm(Some(norm)).unwrap().with_activation(activation).shared())
        }
        "RMSNorm" => Module::RmsNorm(RmsNorm::new(by_position(case, "w.gain"), by_position(case, "w.bias")).unwrap()),
        name if name.ends_with("GLUMML") || name == "BilinearMML" => Module::Glu(glu(case, "w.", config(case))),
        "GRUMML" | "GRUCellMML" => Module::Gru(gru(case, "w.", config(case))),
        "LRUMML" | "LRUCellMML" => {
            let of = |name: &str| plain(case, &format!("w.{name}."));
            let layers =
                LruLayers { b_re: of("b_re"), b_im: of("b_im"), c_re: of("c_re"), c_im: of("c_im"), d: of("d") };
            let [nu_log, theta_log, gamma_log] =
                ["nu_log", "theta_log", "gamma_log"].map(|name| vector(case, &format!("w.{name}")).unwrap());
            let spectrum = LruSpectrum { nu_log, theta_log, gamma_log };
            Module::Lru(Box::new(Lru::new(config::<LruConfig>(case), spectrum, layers).unwrap()))
        }
        "AttentionMML" => Module::GruTokenMixer(token_mixer(case, "w.gru.", &settings["out_dim"])),
        "TransformerBlockMML" => {
            let ffn = GluConfig {
                units: settings["embedding_dim"].as_u64().unwrap() as usize,
                intermediate_size: settings["ffn_dim"].as_u64().map(|n| n as usize),
                activation: Activation::Silu,
                ..GluConfig::default()
            };
            let norm = |name: &str| RmsNorm::new(by_position(case, &format!("w.{name}.gain")), None).unwrap();
            let block = TransformerBlock::new(
                config::<BlockConfig>(case),
                token_mixer(case, "w.attention.", &settings["embedding_dim"]),
                norm("attention_norm"),
                glu(case, "w.ffn.", ffn),
                norm("ffn_norm"),
            );
            Module::TransformerBlock(Box::new(block.unwrap()))
        }
        "TokenEmbedding" => {
            let tokens = table(case, "w.token_embedding").unwrap();
            Module::TokenEmbedding(TokenEmbedding::new(tokens, table(case, "w.position_embedding")).unwrap())
        }
        "PatchEmbedding" => {
            let positions = table(case, "w.position_embedding");
            Module::PatchEmbedding(PatchEmbedding::new(plain(case, "w.projection."), positions).unwrap())
        }
        "Patches" => Module::Patches(Patches::new(settings["patch_size"].as_u64().unwrap() as usize).unwrap()),
        other => panic!("{}: a {other}", case.name),
    }
}

fn three(tensor: &Tensor) -> Array3<f32> {
    tensor.mapv(|v| v as f32).into_dimensionality::<Ix3>().unwrap()
}

fn run(case: &Case, module: &Module) {
    let input = ["in.x", "in.tokens", "in.images"].into_iter().find(|name| case.has(name)).unwrap();
    let x: ArrayD<f32> = case.any(input).mapv(|v| v as f32);
    let holds = |name: &str, found: ArrayD<f32>| case.holds(name, found.mapv(f64::from));
    let is_cell = case.index["layer"].as_str().unwrap().ends_with("CellMML");
    match module {
        Module::Gru(_) | Module::Lru(_) if is_cell => {
            let x = x.into_dimensionality().unwrap();
            let mut state = three(case.any("in.state"));
            let y = match module {
                Module::Gru(gru) => gru.step(x.view(), &mut state, Accuracy::Approximate).unwrap(),
                Module::Lru(lru) => lru.step(x.view(), &mut state, Accuracy::Approximate).unwrap(),
                _ => panic!("no cell"),
            };
            holds("out.y", y.into_dyn());
            holds("out.state", state.into_dyn());
            return;
        }
        Module::Gru(_) | Module::Lru(_) => {
            let x = x.clone().into_dimensionality().unwrap();
            let state = case.has("in.initial_state").then(|| three(case.any("in.initial_state")));
            let state = state.as_ref().map(|s| s.view());
            let (output, all) = match module {
                Module::Gru(gru) => {
                    let output = gru.forward(x.view(), state, None, Accuracy::Approximate).unwrap();
                    (output, gru.config().sequence.return_sequences)
                }
                Module::Lru(lru) => {
                    let output = lru.forward(x.view(), state, None, Accuracy::Approximate).unwrap();
                    (output, lru.config().sequence.return_sequences)
                }
                _ => panic!("no sequence"),
            };
            if case.has("out.state") {
                holds("out.state", output.state.into_dyn());
            }
            if state.is_some() {
                holds("out.y", output.outputs.into_dyn());
                return;
            }
            let last = output.outputs.clone().index_axis_move(Axis(1), 0).into_dyn();
            holds("out.y", if all { output.outputs.into_dyn() } else { last });
        }
        Module::Linear(layer) if case.has("out.x_int8") => {
            integers(case, layer.downcast_ref::<TernaryLayer>().unwrap(), &x);
        }
        _ => {}
    }
    holds("out.y", module.forward(x.view(), Accuracy::Approximate).unwrap());
    if case.has("out.y_reloaded") {
        holds("out.y_reloaded", module.forward(x.view(), Accuracy::Approximate).unwrap());
    }
}

/// The integers that are multiplied, and their scales.
fn integers(case: &Case, layer: &TernaryLayer, x: &ArrayD<f32>) {
    let features = *x.shape().last().unwrap();
    let rows = x.clone().into_shape_with_order((x.len() / features, features)).unwrap();
    let normalized = layer.normalized(rows.view()).unwrap();
    case.holds("out.x_norm", normalized.mapv(f64::from).into_shape_with_order(x.shape()).unwrap());
    let (mut steps, mut whole) = (vec![], vec![]);
    for row in normalized.rows() {
        let (scale, row) = ActivationFormat::Int8Absmax.whole(row.to_slice().unwrap()).unwrap();
        steps.push(1.0 / f64::from(scale));
        whole.extend(row.into_iter().map(f64::from));
    }
    let batch = &x.shape()[..x.ndim() - 1];
    case.holds("out.x_scale", Tensor::from_shape_vec(batch, steps).unwrap());
    case.holds("out.x_int8", Tensor::from_shape_vec(x.shape(), whole).unwrap());
    let packed = layer.low_rank().quantized();
    let mut ternary = Array2::zeros((packed.nrows(), packed.ncols()));
    for (row, mut to) in ternary.rows_mut().into_iter().enumerate() {
        let mut codes = vec![0; packed.ncols()];
        unpack(packed.row_codes(row), 2, &mut codes);
        to.assign(&codes.into_iter().map(|code| f64::from(code) - 1.0).collect::<Array1<f64>>());
    }
    case.holds("out.w_ternary", ternary.reversed_axes().as_standard_layout().into_owned().into_dyn());
    let steps = Tensor::from_elem(ndarray::IxDyn(&[]), 1.0 / f64::from(packed.scales()[0]));
    case.holds("out.w_scale", steps);
}

fn encoding(case: &Case) {
    let count = case.index["config"]["n_arrays"].as_u64().unwrap();
    for number in 0..count {
        let values: Vec<i8> = case.any(&format!("in.a{number:02}")).iter().map(|&v| v as i8).collect();
        let bytes: Vec<u8> = case.any(&format!("out.bytes{number:02}")).iter().map(|&v| v as u8).collect();
        assert_eq!(encode_ternary(&values).unwrap(), bytes, "{} {number}", case.name);
        assert_eq!(decode_ternary(&bytes, values.len()).unwrap(), values, "{} {number}", case.name);
    }
}

#[tokio::test]
async fn golden_matmul_free() {
    let cases = Case::of("keras_mml");
    let (encodings, cases): (Vec<&Case>, Vec<&Case>) =
        cases.iter().partition(|case| case.index["layer"] == "encode_ternary_array");
    let mut tally = Tally::default();
    for case in encodings {
        encoding(case);
        tally.ran(case, "encode_ternary_array", &[]);
    }
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(&folder.path().join("layers").display().to_string()).await.unwrap();
    let name = |place: usize| format!("golden.{place}");
    let layers = cases.iter().enumerate().flat_map(|(place, case)| module(case).to_layers(&name(place)));
    let layers: Vec<(String, SharedLayer)> = layers.collect();
    store.save_layers("golden", "golden", &layers, None).await.unwrap();
    store.create_snapshot("saved").await.unwrap();
    store.save_layers("golden", "golden", &[], None).await.unwrap();
    let snapshot = store.at("saved").await.unwrap();
    for (place, case) in cases.into_iter().enumerate() {
        let loaded = snapshot.module("golden", &name(place)).await.unwrap().load().await.unwrap();
        run(case, &loaded);
        // What is saved again is the same, to the bit.
        let artifacts = |module: &Module| {
            let layers = module.to_layers(&name(place)).into_iter();
            layers.map(|(name, layer)| (name, layer.to_parts().id())).collect::<Vec<_>>()
        };
        assert_eq!(artifacts(&loaded), artifacts(&module(case)), "{}", case.name);
        tally.ran(case, case.index["layer"].as_str().unwrap(), &[]);
    }
    tally.expect(&[
        ("AttentionMML", 3),
        ("BilinearMML", 1),
        ("DenseMML", 8),
        ("DenseMML (saved)", 1),
        ("GLUMML", 2),
        ("GRUCellMML", 2),
        ("GRUMML", 13),
        ("GeGLUMML", 1),
        ("LRUCellMML", 2),
        ("LRUMML", 6),
        ("PatchEmbedding", 4),
        ("Patches", 2),
        ("RMSNorm", 5),
        ("ReGLUMML", 1),
        ("SeGLUMML", 1),
        ("SwiGLUMML", 2),
        ("TokenEmbedding", 2),
        ("TransformerBlockMML", 2),
        ("encode_ternary_array", 1),
    ]);
}
