use ndarray::{Array1, Array2};
use proptest::prelude::*;

use super::*;
use crate::calibration::Calibration;
use crate::layer::{MethodConfig, Rank, Scaling, SharedLayer, compress, configured, layer_from_parts};
use crate::linalg::relative_error;

fn sample(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    Array2::from_shape_fn((rows, columns), |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

/// `DenseMML` as its formula says, in f64.
fn slow(x: &Array2<f32>, kernel: &Array2<f32>, gain: &Array2<f32>, bias: &Array1<f32>) -> Array2<f64> {
    let mean = kernel.iter().map(|w| f64::from(w.abs())).sum::<f64>() / kernel.len() as f64;
    let ternary = kernel.mapv(|w| (f64::from(w) / mean.clamp(1e-5, 1e9)).round_ties_even().clamp(-1.0, 1.0));
    let mut y = Array2::zeros((x.nrows(), kernel.nrows()));
    for (place, row) in x.rows().into_iter().enumerate() {
        let length = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt().max(1e-7);
        let gain = gain.row(place % gain.nrows());
        let n: Vec<f64> = row
            .iter()
            .zip(gain)
            .map(|(v, g)| f64::from(*v) / length * (row.len() as f64).sqrt() * f64::from(*g))
            .collect();
        let steps = 127.0 / n.iter().fold(0f64, |m, v| m.max(v.abs())).clamp(1e-5, 1e9);
        let whole: Array1<f64> = n.iter().map(|v| (v * steps).round_ties_even().clamp(-128.0, 127.0)).collect();
        for (j, weights) in ternary.rows().into_iter().enumerate() {
            y[[place, j]] = weights.dot(&whole) * mean / steps + f64::from(bias[j]);
        }
    }
    y
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// The formula, whichever way the layer was made, and the same numbers, to the bit, from stored parts again and again.
    #[test]
    fn as_the_formula_says(out in 1usize..9, inputs in 1usize..70, positions in 1usize..4, seed in any::<u64>()) {
        let kernel = sample(out, inputs, seed);
        let gain = sample(positions, inputs, seed ^ 1) + 2.0;
        let bias = Array1::from_shape_fn(out, |j| j as f32 * 0.1);
        let x = sample(3 * positions, inputs, seed ^ 2);
        let norm = RmsNorm::new(Some(gain.clone()), None).unwrap();
        let config = TernaryConfig { norm: true, ..TernaryConfig::default() };
        let made = compress(&config, kernel.view(), Some(bias.view()), None).unwrap();
        let layer = made.with_norm(Some(norm)).unwrap();
        let expected = slow(&x, &kernel, &gain, &bias);
        let y = layer.forward(x.view(), Accuracy::Approximate).unwrap().y;
        // A number that is all but halfway between two whole ones may go either way: a step of one product.
        let allowed = 1e-4 + 0.06 * f64::from(kernel.mapv(f32::abs).mean().unwrap());
        for (found, expected) in y.iter().zip(&expected) {
            prop_assert!((f64::from(*found) - expected).abs() <= allowed, "{} for {}", found, expected);
        }
        let mut parts = layer.to_parts();
        for _ in 0..3 {
            let back = layer_from_parts(parts.clone()).unwrap();
            prop_assert_eq!(back.forward(x.view(), Accuracy::Approximate).unwrap().y, y.clone());
            let again = back.to_parts();
            prop_assert_eq!(again.id(), parts.id());
            prop_assert_eq!(&again, &parts);
            parts = again;
        }
    }
}

#[test]
fn stored_at_eight_fifths_of_a_bit() {
    let weight = sample(64, 640, 3);
    let layer = MethodConfig::from(TernaryConfig::default()).compress(weight.view(), None, None).unwrap();
    let parts = layer.to_parts();
    assert_eq!(parts.weights.as_ref().unwrap().packed.len(), 64 * 640 / 5);
    assert_eq!(parts.stored_bytes(), 64 * 640 / 5 + 64 * 4);
    assert!(layer.memory_bytes() as u64 <= 64 * 640 / 4 + 64 * 4 + 64);
    let shape = LayerShape { out_features: 64, in_features: 640, has_bias: false };
    let expected = MethodConfig::from(TernaryConfig::default()).expected_bytes(shape).unwrap();
    assert_eq!(expected, Some(parts.stored_bytes() as usize));
}

#[test]
fn a_correction_and_a_better_scale_take_off_error() {
    let weight = sample(48, 64, 5).dot(&sample(64, 64, 6)) * 0.1;
    let x = sample(300, 64, 7).dot(&sample(64, 64, 8));
    let exact = x.dot(&weight.t());
    let calibration = Calibration::of(x.clone()).unwrap();
    let error = |text: &str| {
        let config: TernaryConfig = serde_json::from_str(text).unwrap();
        let layer = compress(&config, weight.view(), None, Some(&calibration)).unwrap();
        relative_error(layer.linear(x.view(), Accuracy::Approximate).unwrap().y.view(), exact.view())
    };
    let plain = error(r#"{}"#);
    let fitted = error(r#"{"clipping": "mse", "group": 16}"#);
    let corrected = error(r#"{"clipping": "mse", "group": 16, "rank": 16, "scaling": "exact"}"#);
    let rounded = error(r#"{"clipping": "mse", "group": 16, "rank": 16, "scaling": "exact", "rounding": "gptq"}"#);
    assert!(
        fitted < plain && corrected < 0.6 * fitted && rounded < corrected,
        "{plain} {fitted} {corrected} {rounded}"
    );
}

#[test]
fn settings_are_read_and_written() {
    let read = |text: &str| serde_json::from_str::<TernaryConfig>(text);
    let config =
        read(r#"{"group": "channel", "rank": 8, "scaling": "rms", "norm": true, "activation": "relu"}"#).unwrap();
    assert_eq!((config.weights.rank, config.weights.scaling), (Rank::Components(8), Scaling::Rms));
    assert_eq!((config.norm, config.activation), (true, Activation::Relu));
    assert_eq!(serde_json::from_value::<TernaryConfig>(json!(config)).unwrap(), config);
    assert_eq!(read("{}").unwrap(), TernaryConfig::default());
    for (text, expected) in [
        (r#"{"weight": {"type": "int4"}}"#, "give `group` and `scales`"),
        (r#"{"grup": 4}"#, "grup"),
        (r#"{"activation": "rele"}"#, "activation"),
        (r#"{"norm": 3}"#, "norm"),
    ] {
        let message = read(text).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn what_is_stored_runs_as_it_did() {
    let weight = sample(5, 12, 1);
    let config: TernaryConfig = serde_json::from_str(r#"{"activations": "f32", "activation": "tanh"}"#).unwrap();
    let method = MethodConfig::from(config);
    let layer = method.compress(weight.view(), None, None).unwrap();
    let x = sample(2, 12, 2);
    let run = |layer: &SharedLayer| layer.forward(x.view(), Accuracy::Approximate).unwrap().y;
    let stored = layer_from_parts(layer.to_parts()).unwrap();
    assert_ne!(run(&stored), run(&layer));
    assert_eq!(run(&configured(&stored, &layer.config()).unwrap()), run(&layer));
    assert_eq!(run(&configured(&stored, &method.with_stored(&stored.to_parts().config)).unwrap()), run(&layer));
    assert!(run(&layer).iter().all(|v| v.abs() < 1.0));
    let message = TernaryLayer::from_ternary(ndarray::array![[0, 3]].view(), 1.0, None).unwrap_err().to_string();
    assert!(message.contains("-1, 0 or 1"), "{message}");
}
