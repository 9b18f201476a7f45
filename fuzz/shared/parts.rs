//! Stored parts that nobody wrote: those of real layers of every method, changed.

use std::sync::LazyLock;

use layerstore_core::Calibration;
use layerstore_core::layer::parts::{Codebook, Codes, Factor, Keys, Parts, Side, Tensor, WeightRows};
use layerstore_core::layer::{
    Accuracy, DType, DenseLayer, KeyValueLayer, Layer, Limit, MethodName, ModuleLayer, SharedLayer, VqAttentionConfig,
    VqAttentionLayer, configured, layer_from_parts, registry,
};
use layerstore_core::nn::Module;
use ndarray::{Array2, Array4, ArrayD, IxDyn};
use serde_json::{Map, Value, json};

use super::choices::Choices;

const OUTPUTS: usize = 6;
const INPUTS: usize = 8;

/// Layers of more numbers than this are read, but not run: a forward pass would take memory that nobody stored.
const MOST_WEIGHTS: usize = 1 << 14;

fn sample(rows: usize, columns: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 31 + j * 17 + i * j * 7) % 23) as f32 / 11.0 - 1.0)
}

fn linear(method: &str, settings: &Value) -> SharedLayer {
    let settings = settings.as_object().cloned().expect("settings are an object");
    let method = registry::method(method).expect("a built-in method");
    let config = method.read_settings(settings).expect("settings as the documentation has them");
    let (weight, bias) = (sample(OUTPUTS, INPUTS), sample(1, OUTPUTS).remove_axis(ndarray::Axis(0)));
    let calibration = Calibration::of(sample(40, INPUTS)).expect("finite inputs");
    config.compress(weight.view(), Some(bias.view()), Some(&calibration)).expect("settings that fit")
}

fn attention(settings: Value) -> VqAttentionLayer {
    let config: VqAttentionConfig = serde_json::from_value(settings).expect("settings as the documentation has them");
    VqAttentionLayer::by_kmeans(config, sample(30, 8).view(), sample(30, 4).view()).expect("settings that fit")
}

/// The parts of layers of every method, and their full configurations.
static LAYERS: LazyLock<Vec<(Parts, Value)>> = LazyLock::new(|| {
    let keys = |backend: Value, values: Value| {
        linear("key_value", &json!({"backend": backend, "values": values, "expected_keys_per_query": 2.0}))
    };
    let codes = json!({"type": "pq", "subvectors": 2, "codewords": 4});
    let graph = |floats: bool| json!({"type": "hnsw", "connectivity": 4, "expansion_add": 8, "expansion_search": 4, "store_float_keys": floats});
    let cells = |floats: bool| json!({"type": "ivf_pq", "clusters": 2, "probes": 1, "subvectors": 2, "bits": 2, "store_float_keys": floats});
    let heads = json!({"n_head": 4, "n_kv_head": 2, "d_model": 8, "d_k": 2, "d_v": 3, "n_code": 4, "block_len": 4});
    let with = |more: Value| {
        let mut all = heads.clone();
        let entries = all.as_object_mut().expect("an object");
        entries.extend(more.as_object().cloned().expect("an object"));
        all
    };
    let causal = attention(with(json!({"mechanism": "vq_qk"})));
    let past = causal.empty_cache(1);
    let mut tensors = std::collections::BTreeMap::new();
    tensors.insert("gain".to_owned(), ArrayD::from_elem(IxDyn(&[2, 8]), 0.5));
    let module = |kind: &str, settings: Value| {
        let settings: Map<String, Value> = settings.as_object().cloned().expect("an object");
        ModuleLayer::new(kind, settings, tensors.clone()).shared()
    };
    let half = DenseLayer::new(DType::F16, vec![2, 3, 4], vec![7u8; 48].into(), None).expect("two bytes each");
    let bits = DenseLayer::new(DType::F4, vec![4, 4], vec![7u8; 8].into(), None).expect("half a byte each");
    let layers = vec![
        linear("dense", &json!({})),
        half.shared(),
        bits.shared(),
        keys(json!({"type": "flat"}), json!("f32")),
        keys(json!({"type": "flat", "keys": "int8"}), json!("int8")),
        keys(json!({"type": "flat", "keys": "f16"}), json!("f16")),
        keys(codes.clone(), codes.clone()),
        keys(json!({"type": "pq", "subvectors": 4, "codewords": 3, "store_float_keys": true}), json!("f32")),
        keys(cells(false), json!("f32")),
        keys(cells(true), codes),
        keys(graph(false), json!("int8")),
        keys(graph(true), json!("f32")),
        linear("low_rank", &json!({"weight": {"type": "int4", "group": 4}, "rank": 2, "factors": "int8"})),
        linear(
            "low_rank",
            &json!({"weight": {"type": "int3", "group": 8}, "rank": 2, "factors": "f32", "activations": "int8"}),
        ),
        linear(
            "low_rank",
            &json!({"weight": {"type": "nf4", "group": 4, "scales": "f16"}, "rank": 1, "bias_correction": true}),
        ),
        linear("low_rank", &json!({"weight": {"type": "int4", "group": 4}, "dual_scaling": true, "rank": 0})),
        linear("low_rank", &json!({"weight": {"type": "mxint4", "group": 8}, "rank": 0})),
        linear("low_rank", &json!({"weight": {"type": "bf16"}, "rank": 1})),
        linear("ternary", &json!({"norm": true, "activation": "relu"})),
        linear("ternary", &json!({"group": 4, "rank": 1})),
        causal.with_cache(past).expect("a past of its own").shared(),
        attention(with(json!({"mechanism": "vq_k", "causal": false}))).shared(),
        attention(with(json!({"mechanism": "hyper", "hyper": {"sample_size": 4, "block_size": 4}}))).shared(),
        attention(with(json!({"mechanism": "exact"}))).shared(),
        module("rms_norm", json!({"in_features": 8, "out_features": 8})),
        module("patches", json!({"patch_size": 2})),
        module("activation", json!({"activation": "softmax"})),
    ];
    layers.iter().map(|layer| (layer.to_parts(), layer.config())).collect()
});

/// What became of changed parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// They were refused.
    Refused,
    /// They are a layer, which was run.
    Ran,
    /// They are a layer that is too wide to run here.
    Wide,
}

/// Reads a layer from parts that `bytes` choose. It is refused, or it runs as what it says it is: nothing panics, and the parts
/// that it has itself are read as the same layer.
///
/// # Panics
/// When that does not hold.
pub fn run(bytes: &[u8]) -> Outcome {
    let mut choices = Choices::new(bytes);
    let layers = &*LAYERS;
    let (mut parts, mut config) = layers[choices.below(layers.len())].clone();
    for _ in 0..choices.below(6) {
        change(&mut choices, &mut parts, &mut config);
    }
    let layer = match layer_from_parts(parts) {
        Ok(layer) => layer,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return Outcome::Refused;
        }
    };
    let own = layer.to_parts();
    let again = layer_from_parts(own.clone()).unwrap_or_else(|e| panic!("{own:?} of a layer that was read: {e}"));
    assert_eq!(again.to_parts().id(), own.id(), "{own:?}");
    let mut outcome = exercise(&layer, &mut choices);
    if let Ok(layer) = configured(&layer, &config) {
        outcome = exercise(&layer, &mut choices);
    }
    outcome
}

/// Does everything that a layer can be asked to do.
fn exercise(layer: &SharedLayer, choices: &mut Choices) -> Outcome {
    let (outputs, inputs) = (layer.out_features(), layer.in_features());
    assert!(layer.config().is_object(), "{:?}", layer.config());
    let _bytes = layer.memory_bytes();
    if outputs.saturating_mul(inputs.max(1)) > MOST_WEIGHTS || inputs > MOST_WEIGHTS {
        return Outcome::Wide;
    }
    for rows in [1, 2, 9] {
        let x = sample(rows, inputs);
        for accuracy in [Accuracy::Approximate, Accuracy::Full] {
            if let Ok(output) = layer.forward(x.view(), accuracy) {
                assert_eq!(output.y.dim(), (rows, outputs));
            }
        }
        if let Ok(gradients) = layer.backward(x.view(), sample(rows, outputs).view()) {
            assert_eq!(gradients.input.dim(), (rows, inputs));
            assert_eq!(gradients.weight.dim(), (outputs, inputs));
        }
        let _report = layer.search_report(x.view()).map_err(|e| e.to_string());
    }
    if let Ok(weight) = layer.weight() {
        assert_eq!(weight.dim(), (outputs, inputs));
        let _report = layer.correction_report(weight.view(), Some(sample(3, inputs).view()));
        let index = choices.below(outputs) as u32;
        if let Ok(rows) = layer.rows(&[index]) {
            assert_eq!(rows.dim(), (1, inputs), "row {index}");
        }
        assert!(layer.rows(&[outputs as u32]).is_err());
    }
    let bias = layer.bias();
    if let (Ok(Some(bias)), Ok(_)) = (&bias, layer.require_linear()) {
        assert_eq!(bias.len(), outputs, "{bias}");
    }
    if let Ok(Some(offset)) = layer.offset() {
        assert_eq!(offset.len(), outputs, "{offset}");
    }
    let _texts = (layer.nonlinearities(), layer.approximations());
    let _tensors =
        (layer.own_tensors(), layer.raw_weight(), layer.raw_bias(), layer.stored_bias().map_err(|e| e.to_string()));
    for position in 0..layer.positions().min(3) {
        if let Ok(Some(one)) = layer.at_position(position) {
            assert_eq!(one.positions(), 1);
        }
    }
    if let Some(keys) = layer.downcast_ref::<KeyValueLayer>() {
        let limits = [Limit::Keys(1.5), Limit::Threshold(0.0), Limit::Threshold(1.0), Limit::MaxError(0.5)];
        for limit in limits {
            if let Ok(answers) = keys.search(sample(3, inputs).view(), Some(limit)) {
                assert_eq!(answers.len(), 3);
                let all = answers.iter().flat_map(|answer| &answer.hits);
                assert!(all.into_iter().all(|hit| (hit.key as usize) < keys.rank()));
            }
        }
    }
    if let Some(attention) = layer.downcast_ref::<VqAttentionLayer>() {
        attend(attention);
    }
    let module = Module::from_layers("m", &[("m".to_owned(), layer.clone())].into());
    if let Ok(module) = module {
        let x = ArrayD::from_elem(IxDyn(&[1, 2, inputs.clamp(1, 64)]), 0.5);
        let _y = module.forward(x.view(), Accuracy::Approximate).map_err(|e| e.to_string());
        let _picture =
            module.forward(ArrayD::zeros(IxDyn(&[1, 4, 4, 3])).view(), Accuracy::Full).map_err(|e| e.to_string());
    }
    Outcome::Ran
}

fn attend(layer: &VqAttentionLayer) {
    let settings = layer.settings();
    let (heads, kv_heads) = (settings.n_head, settings.kv_heads());
    let (d_k, d_v) = (settings.d_k.unwrap_or_default(), settings.d_v.unwrap_or_default());
    if heads.saturating_mul(d_k.max(d_v).max(1)) > MOST_WEIGHTS || kv_heads > MOST_WEIGHTS {
        return;
    }
    let ones =
        |heads: usize, width: usize| Array4::from_shape_fn((1, heads, 5, width), |(_, h, t, i)| (h + t * i) as f32);
    let (q, k, v) = (ones(heads, d_k), ones(kv_heads, d_k), ones(kv_heads, d_v));
    for past in [None, layer.cache().cloned()] {
        let mut past = past;
        if let Ok(attended) = layer.attend(q.view(), k.view(), v.view(), None, past.as_mut()) {
            assert_eq!(attended.output.dim(), (1, heads, 5, d_v));
        }
    }
    let step = layer.learn(sample(3, heads * d_k).view(), sample(3, kv_heads * d_k).view(), 1);
    if let Ok((learned, _)) = step {
        assert_eq!(learned.settings(), settings);
    }
}

/// Numbers that lengths and settings are set to.
fn number(choices: &mut Choices) -> Value {
    match choices.below(16) {
        0 => json!(0),
        1 => json!(1),
        2 => json!(2),
        3 => json!(choices.below(70)),
        4 => json!(u64::MAX),
        5 => json!(i64::MAX),
        6 => json!(1u64 << 32),
        7 => json!(1u64 << 61),
        8 => json!(-1),
        9 => json!(f64::MAX),
        10 => json!(1e-320),
        11 => json!(0.5),
        12 => json!(-0.25),
        13 => json!(choices.number()),
        14 => json!(1e39),
        _ => json!(16_777_217),
    }
}

fn word(choices: &mut Choices) -> &'static str {
    const WORDS: [&str; 28] = [
        "int2",
        "int4",
        "int8",
        "nf4",
        "mxint4",
        "mxint8",
        "ternary",
        "f16",
        "bf16",
        "f32",
        "pq",
        "flat",
        "ivf_pq",
        "hnsw",
        "channel",
        "tensor",
        "score",
        "positive",
        "vq_k",
        "vq_qk",
        "hyper",
        "exact",
        "relu",
        "softmax",
        "int8_absmax",
        "F32",
        "BF16",
        "nothing",
    ];
    WORDS[choices.below(WORDS.len())]
}

fn value(choices: &mut Choices) -> Value {
    match choices.below(8) {
        0 => Value::Null,
        1 => json!(choices.below(2) == 1),
        2 => json!(word(choices)),
        3 => json!({}),
        4 => json!([number(choices), number(choices)]),
        5 => json!({"type": word(choices), "subvectors": number(choices), "codewords": number(choices)}),
        _ => number(choices),
    }
}

/// Changes, adds or takes away an entry of an object, or of one in it.
fn change_config(choices: &mut Choices, config: &mut Value) {
    let other = &LAYERS[choices.below(LAYERS.len())].1;
    let Value::Object(entries) = config else {
        *config = other.clone();
        return;
    };
    let names: Vec<String> = entries.keys().cloned().collect();
    let Some(name) = names.get(choices.below(names.len())) else {
        *config = other.clone();
        return;
    };
    match choices.below(8) {
        0 => {
            entries.remove(name);
        }
        1 => {
            if let Value::Object(other) = other
                && let Some((name, value)) = other.iter().nth(choices.below(other.len()))
            {
                entries.insert(name.clone(), value.clone());
            }
        }
        2 => *config = other.clone(),
        _ => match entries.get_mut(name) {
            Some(Value::Array(items)) if !items.is_empty() => {
                let at = choices.below(items.len());
                match choices.below(4) {
                    0 => drop(items.remove(at)),
                    1 => items.insert(at, number(choices)),
                    _ => items[at] = number(choices),
                }
            }
            Some(inner @ Value::Object(_)) if choices.below(4) > 0 => change_config(choices, inner),
            Some(entry) => *entry = value(choices),
            None => {}
        },
    }
}

fn float(choices: &mut Choices) -> f32 {
    match choices.below(12) {
        0 => f32::NAN,
        1 => f32::INFINITY,
        2 => f32::NEG_INFINITY,
        3 => f32::MAX,
        4 => f32::MIN_POSITIVE,
        5 => -0.0,
        6 => 1e-42,
        7 => 0.0,
        8 => -1.0,
        9 => f32::from_bits(choices.number() as u32),
        _ => choices.byte().into(),
    }
}

fn change_floats<'a>(choices: &mut Choices, values: impl IntoIterator<Item = &'a mut f32>) {
    let mut values: Vec<&mut f32> = values.into_iter().collect();
    for _ in 0..=choices.below(3) {
        let (at, to) = (choices.below(values.len()), float(choices));
        if let Some(value) = values.get_mut(at) {
            **value = to;
        }
    }
}

fn length(choices: &mut Choices, now: usize) -> usize {
    match choices.below(5) {
        0 => now.saturating_sub(1),
        1 => now + 1,
        2 => 0,
        3 => 1,
        _ => choices.below(20),
    }
}

fn resized<T: Clone + Default>(choices: &mut Choices, array: &Array2<T>) -> Array2<T> {
    let (rows, columns) = array.dim();
    let shape = match choices.below(3) {
        0 => (length(choices, rows), columns),
        1 => (rows, length(choices, columns)),
        _ => (columns, rows),
    };
    Array2::from_shape_fn(shape, |place| array.get(place).cloned().unwrap_or_default())
}

fn change_array(choices: &mut Choices, array: &mut Array2<f32>) {
    match choices.below(2) {
        0 => *array = resized(choices, array),
        _ => change_floats(choices, array.iter_mut()),
    }
}

fn change_list(choices: &mut Choices, values: &mut Vec<f32>) {
    match choices.below(3) {
        0 => values.truncate(values.len() / 2),
        1 => values.push(float(choices)),
        _ => change_floats(choices, values.iter_mut()),
    }
}

fn change_bytes(choices: &mut Choices, bytes: &mut bytes::Bytes) {
    let mut changed = bytes.to_vec();
    choices.mutate(&mut changed);
    *bytes = changed.into();
}

fn role(choices: &mut Choices) -> String {
    ["keys", "values", "queries", "inputs", "cells", "a", "b", "?"][choices.below(8)].to_owned()
}

/// Takes an entry away, doubles one, takes one from another layer, or hands one out to be changed.
fn change_entries<T: Clone>(
    choices: &mut Choices,
    entries: &mut Vec<T>,
    others: &[T],
    change: impl FnOnce(&mut Choices, &mut T),
) {
    let at = choices.below(entries.len());
    match choices.below(6) {
        0 if at < entries.len() => drop(entries.remove(at)),
        1 => entries.extend(entries.get(at).cloned()),
        2 => entries.extend(others.get(choices.below(others.len())).cloned()),
        3 => entries.reverse(),
        _ => {
            if let Some(entry) = entries.get_mut(at) {
                change(choices, entry);
            }
        }
    }
}

fn change(choices: &mut Choices, parts: &mut Parts, config: &mut Value) {
    let other = &LAYERS[choices.below(LAYERS.len())].0;
    match choices.below(11) {
        0 | 1 => change_config(choices, &mut parts.config),
        2 => change_config(choices, config),
        3 => {
            let names: Vec<&str> = registry::BUILT_IN.iter().map(|entry| entry.name).chain(["unknown"]).collect();
            parts.method = MethodName::from(names[choices.below(names.len())].to_owned());
        }
        4 => match (&mut parts.keys, choices.below(4)) {
            (keys, 0) => *keys = other.keys.clone(),
            (Some(Keys { scales, .. }), 1) => change_list(choices, scales),
            (Some(Keys { vectors, .. }), _) => change_array(choices, vectors),
            (None, _) => {}
        },
        5 => match (&mut parts.values, choices.below(4)) {
            (values, 0) => *values = other.values.clone(),
            (Some(values), _) => change_array(choices, values),
            (None, _) => {}
        },
        6 => {
            change_entries(
                choices,
                &mut parts.codebooks,
                &other.codebooks,
                |choices, book: &mut Codebook| match choices.below(4) {
                    0 => book.role = role(choices),
                    1 => book.subspace = [0, 1, 7, u32::MAX][choices.below(4)],
                    _ => change_array(choices, &mut book.vectors),
                },
            )
        }
        7 => change_entries(choices, &mut parts.codes, &other.codes, |choices, codes: &mut Codes| {
            match choices.below(4) {
                0 => codes.role = role(choices),
                1 => codes.codes = resized(choices, &codes.codes),
                _ => {
                    let (at, to) = (choices.below(codes.codes.len()), choices.byte());
                    codes.codes.iter_mut().skip(at).take(1).for_each(|code| *code = to);
                }
            }
        }),
        8 => change_entries(choices, &mut parts.factors, &other.factors, |choices, factor: &mut Factor| match choices
            .below(4)
        {
            0 => factor.side = if choices.below(2) == 0 { Side::A } else { Side::B },
            1 => change_list(choices, &mut factor.singular_values),
            _ => change_array(choices, &mut factor.vectors),
        }),
        9 => match (&mut parts.weights, choices.below(6)) {
            (weights, 0) => *weights = other.weights.clone(),
            (Some(WeightRows { rows, .. }), 1) => *rows = length(choices, *rows),
            (Some(WeightRows { packed, .. }), 2 | 3) => change_bytes(choices, packed),
            (Some(WeightRows { scales, .. }), 4) => change_bytes(choices, scales),
            (Some(WeightRows { zeros, .. }), _) => change_bytes(choices, zeros),
            (None, _) => {}
        },
        _ => change_entries(choices, &mut parts.tensors, &other.tensors, |choices, tensor: &mut Tensor| {
            match choices.below(6) {
                0 => {
                    let names = ["scales", "mean", "mean_output", "bias", "graph", "cells", "weight", "shift", "?"];
                    tensor.name = names[choices.below(names.len())].to_owned();
                }
                1 => tensor.dtype = ["F32", "F16", "BF16", "F64", "U8", "I64", "F4", "?"][choices.below(8)].to_owned(),
                2 => {
                    let at = choices.below(tensor.shape.len());
                    let to = number(choices).as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or_default();
                    match tensor.shape.get_mut(at) {
                        Some(length) => *length = to,
                        None => tensor.shape.push(to),
                    }
                }
                3 => {
                    // Other lengths of the same product.
                    tensor.shape.insert(choices.below(tensor.shape.len() + 1), [1, 1, 0, 2][choices.below(4)]);
                }
                _ => change_bytes(choices, &mut tensor.data),
            }
        }),
    }
}
