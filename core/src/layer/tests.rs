//! What holds for layers of every method.

use ndarray::{Array1, Array2};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::calibration::Calibration;
use crate::layer::registry;
use crate::layer::{
    Accuracy, Dense, KeyValueConfig, KeyValueLayer, Layer, LowRankConfig, MethodConfig, Rank, SearchSettings,
};
use crate::linalg::relative_error;

fn sample(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 7919 + j * 104_729 + seed * 31) % 1009) as f32 / 500.0 - 1.0)
}

fn methods() -> [MethodConfig; 3] {
    let low_rank = LowRankConfig { rank: Rank::Components(1), ..LowRankConfig::default() };
    [
        MethodConfig::from(Dense {}),
        MethodConfig::from(KeyValueConfig { expected_keys_per_query: Some(2.0), ..KeyValueConfig::default() }),
        MethodConfig::from(LowRankConfig {
            weight: serde_json::from_str(r#"{"type":"int8","group":"channel"}"#).unwrap(),
            ..low_rank
        }),
    ]
}

/// What a catalogue says of a layer makes it again, bit for bit.
#[test]
fn configurations_make_their_layers_again() {
    let (w, calibration) = (sample(8, 12, 1), Calibration::of(sample(40, 12, 2)).unwrap());
    for (name, settings) in [
        ("key_value", json!({"expected_keys_per_query": 2.0, "use_bias": false})),
        (
            "key_value",
            json!({"decomposition": "svd", "energy_keep": 0.9, "values": "int8", "backend": {"type": "pq", "subvectors": 2, "codewords": 4}}),
        ),
        (
            "low_rank",
            json!({"weight": {"type": "int4", "group": 4, "symmetric": false}, "rank": 2, "scaling": "exact"}),
        ),
        (
            "low_rank",
            json!({"weight": {"type": "int3", "group": 4}, "rank": {"max_bits": 16.0}, "factors": "f32", "activations": "int8"}),
        ),
        (
            "low_rank",
            json!({"weight": {"type": "int4", "group": 4}, "rank": 0, "rounding": "gptq", "bias_correction": true}),
        ),
        (
            "ternary",
            json!({"group": "channel", "scales": "f16", "rank": 1, "factors": "f32", "norm": true, "activation": "silu"}),
        ),
        ("ternary", json!({})),
    ] {
        let method = registry::method(name).unwrap();
        let Value::Object(given) = settings.clone() else { panic!("{settings}") };
        let made = method.read_settings(given).unwrap();
        let layer = made.compress(w.view(), None, Some(&calibration)).unwrap();
        let config = made.with_stored(&layer.to_parts().config);
        let again = method.settings_of(&config).unwrap();
        assert_eq!(again.with_stored(&layer.to_parts().config), config, "{name} {settings}");
        let again = again.compress(w.view(), None, Some(&calibration)).unwrap();
        assert_eq!(again.to_parts().id(), layer.to_parts().id(), "{name} {settings}");
    }
    assert!(registry::method("module").unwrap().settings_of(&json!({"kind": "gru"})).is_err());
    assert!(registry::method("low_rank").unwrap().settings_of(&json!({"rank": "many"})).is_err());
}

proptest! {
    /// Whatever a forward pass leaves out, the gradients are those of the layer that is stored.
    #[test]
    fn gradients_are_those_of_the_exact_layer(out in 2usize..9, inputs in 2usize..9, batch in 1usize..6, seed in 0usize..500) {
        let (w, x, g) = (sample(out, inputs, seed), sample(batch, inputs, seed + 1), sample(batch, out, seed + 2));
        for method in methods() {
            let calibration = Calibration::of(sample(20, inputs, seed + 3)).unwrap();
            let layer = method.compress(w.view(), None, Some(&calibration)).unwrap();
            let found = layer.backward(x.view(), g.view()).unwrap();
            assert_eq!(layer.backward_input(x.view(), g.view()).unwrap(), found.input, "without weight and bias");
            let stored = layer.weight().unwrap();
            prop_assert!(relative_error(found.input.view(), g.dot(&stored).view()) < 1e-4, "{:?}", method);
            prop_assert!(relative_error(found.weight.view(), g.t().dot(&x).view()) < 1e-4, "{:?}", method);
            prop_assert!((found.bias - g.sum_axis(ndarray::Axis(0))).iter().all(|d| d.abs() < 1e-5));
        }
    }

    /// Without the estimator: what a small change of the input changes in the approximate output.
    #[test]
    fn without_it_they_are_those_of_the_approximate_pass(out in 3usize..9, inputs in 3usize..9, seed in 0usize..500) {
        let (w, x, g) = (sample(out, inputs, seed), sample(2, inputs, seed + 1), sample(2, out, seed + 2));
        let calibration = Calibration::of(sample(30, inputs, seed + 3)).unwrap();
        let layer = methods()[1].compress(w.view(), None, Some(&calibration)).unwrap();
        let layer = layer.downcast_ref::<KeyValueLayer>().unwrap();
        let settings = SearchSettings { use_straight_through_estimator: false, ..layer.settings().clone() };
        let layer = layer.with_search(settings).unwrap();
        let gradient = layer.backward(x.view(), g.view()).unwrap().input;
        let step = sample(2, inputs, seed + 4) * 1e-4;
        let run = |x: &Array2<f32>| layer.forward(x.view(), Accuracy::Approximate).unwrap().y.mapv(f64::from);
        let (before, after) = (run(&x), run(&(&x + &step)));
        let changed = ((after - before) * g.mapv(f64::from)).sum();
        let foretold = (gradient.mapv(f64::from) * step.mapv(f64::from)).sum();
        // A key may pass the threshold on the way; else the output is linear.
        let hits = |x: &Array2<f32>| {
            let of = |q: crate::layer::QueryHits| {
                let mut keys: Vec<u32> = q.hits.iter().map(|h| h.key).collect();
                keys.sort_unstable();
                keys
            };
            layer.search(x.view(), None).unwrap().into_iter().map(of).collect::<Vec<_>>()
        };
        if hits(&x) == hits(&(&x + &step)) {
            prop_assert!((changed - foretold).abs() < 2e-5, "{} {}", changed, foretold);
        }
    }
}

#[test]
fn other_shapes_are_refused() {
    let layer = MethodConfig::from(Dense {}).compress(sample(3, 2, 1).view(), None, None).unwrap();
    assert!(layer.backward(sample(4, 2, 1).view(), sample(4, 2, 1).view()).is_err());
    assert!(layer.backward(sample(4, 2, 1).view(), sample(3, 3, 1).view()).is_err());
    let nan = Array2::from_elem((1, 3), f32::NAN);
    assert!(layer.backward(sample(1, 2, 1).view(), nan.view()).is_err());
}

/// At full accuracy a layer computes what its weight, offset and bias say, between the norm and the activation that it has.
#[test]
fn a_full_pass_is_weight_offset_and_bias() {
    let floats = r#"{"type":"pq","subvectors":4,"codewords":4,"store_float_keys":true}"#;
    for (method, settings, has_offset) in [
        ("dense", "{}".to_owned(), false),
        ("key_value", "{}".into(), false),
        ("key_value", r#"{"energy_keep":0.8}"#.into(), true),
        ("key_value", r#"{"backend":{"type":"flat","keys":"int8"},"values":"int8"}"#.into(), true),
        ("key_value", format!(r#"{{"backend":{floats}}}"#), false),
        ("key_value", format!(r#"{{"backend":{floats},"values":"f16","use_bias":false}}"#), true),
        ("low_rank", r#"{"weight":{"type":"int3","group":8},"rank":2,"activations":"int8"}"#.into(), false),
        ("low_rank", r#"{"weight":{"type":"int3","group":8},"rank":2,"bias_correction":true}"#.into(), true),
        ("ternary", r#"{"norm":true,"activation":"silu"}"#.into(), false),
        ("ternary", r#"{"norm":true,"activation":"softmax","bias_correction":true}"#.into(), true),
    ] {
        let given = serde_json::from_str(&settings).unwrap();
        let method = crate::layer::registry::method(method).unwrap().read_settings(given).unwrap();
        let (w, x, calibration) = (sample(12, 16, 1), sample(9, 16, 2), sample(60, 16, 3) + 0.7);
        let (calibration, b) = (Calibration::of(calibration).unwrap(), Array1::from_iter((0..12).map(|i| i as f32)));
        let layer = method.compress(w.view(), Some(b.view()), Some(&calibration)).unwrap();
        let mut expected = layer.weight_inputs(x.view()).unwrap().dot(&layer.weight().unwrap().t());
        let offset = layer.offset().unwrap().filter(|offset| offset.iter().any(|v| *v != 0.0));
        assert_eq!(offset.is_some(), has_offset, "{settings}");
        for more in [offset, layer.bias().unwrap()].into_iter().flatten() {
            expected += &more;
        }
        layer.activate(expected.view_mut());
        let found = layer.forward(x.view(), Accuracy::Full).unwrap().y;
        assert!(relative_error(found.view(), expected.view()) < 1e-5, "{settings}");
        let rows = layer.weight().unwrap().select(ndarray::Axis(0), &[7, 2]);
        assert!(relative_error(layer.rows(&[7, 2]).unwrap().view(), rows.view()) < 1e-6, "{settings}");
        assert_eq!(layer.nonlinearities().len(), 2 * usize::from(settings.contains("norm")), "{settings}");
        let rounds = settings.contains("activations") || method.name() == "ternary" || method.name() == "key_value";
        assert_eq!(!layer.approximations().is_empty(), rounds, "{settings}");
    }
}
