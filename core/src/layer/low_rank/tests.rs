use ndarray::{Array1, Array2, Axis};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::calibration::Calibration;
use crate::error::Error;
use crate::layer::method::Method;
use crate::layer::shape::LayerShape;
use crate::layer::traits::{Accuracy, Layer};
use crate::layer::{MethodConfig, bits_per_weight, compress, configured, layer_from_parts};
use crate::linalg::{matmul_nt, relative_error};
use crate::quant::{ActivationFormat, Clipping, Group, RowType, ScaleType, WeightFormat, WeightType};

fn sample(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    Array2::from_shape_fn((rows, columns), |(_, j)| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as f32 / (1u32 << 31) as f32 * 2.0 - 1.0) * (1.0 + 3.0 * (j % 4) as f32)
    })
}

fn built(config: &LowRankConfig, w: &Array2<f32>, x: &Array2<f32>) -> LowRankLayer {
    let calibration = Calibration::of(x.clone()).unwrap();
    compress(config, w.view(), Some(Array1::ones(w.nrows()).view()), Some(&calibration)).unwrap()
}

fn configs() -> impl Strategy<Value = LowRankConfig> {
    use WeightType::{Bf16, Int, MxInt, Nf4};
    let types = prop::sample::select(vec![Int(2), Int(3), Int(4), Int(8), Nf4, MxInt(4), Bf16]);
    let factors = prop::sample::select(vec![RowType::F32, RowType::F16, RowType::Int8]);
    let scalings = prop::sample::select(vec![Scaling::Identity, Scaling::MeanAbs, Scaling::Rms, Scaling::Exact]);
    (types, factors, scalings, any::<[bool; 5]>(), 0usize..3).prop_map(
        |(weight_type, factors, scaling, [symmetric, gptq, half, bias_correction, dual], rank)| {
            let scales = if half { ScaleType::F16 } else { ScaleType::F32 };
            LowRankConfig {
                weight: WeightFormat { weight_type, group: Group::Size(4), symmetric, minimum: false, scales },
                rounding: if gptq && !weight_type.is_float() { Rounding::Gptq } else { Rounding::Nearest },
                rank: Rank::Components(rank),
                factors,
                scaling,
                bias_correction,
                dual_scaling: dual && !weight_type.is_float(),
                ..LowRankConfig::default()
            }
        },
    )
}

proptest! {
    /// The forward pass is the reference product with the weight the layer stands for, and parts bring it back, of
    /// as many bytes as its settings say.
    #[test]
    fn forward_is_the_stored_weight(config in configs(), out in 2usize..150, seed in 0u64..100) {
        let (w, x) = (sample(out, 12, seed), sample(30, 12, seed + 1));
        let layer = built(&config, &w, &x);
        let y = layer.forward(x.view(), Accuracy::Approximate).unwrap().y;
        let mut reference = x.dot(&layer.weight().unwrap().t()) + 1.0;
        if config.bias_correction {
            // Over the calibration inputs nothing is left of the mean error.
            let mean = |y: &Array2<f32>| y.mean_axis(Axis(0)).unwrap();
            let off = mean(&(x.dot(&w.t()) + 1.0)) - mean(&reference);
            reference += &off;
        }
        // The bias correction is kept in f16.
        let allowed = if config.bias_correction { 1e-3 } else { 1e-5 };
        prop_assert!(relative_error(y.view(), reference.view()) < allowed);
        let parts = layer.to_parts();
        let back = layer_from_parts(parts.clone()).unwrap();
        prop_assert_eq!(back.to_parts(), parts.clone());
        prop_assert_eq!(back.forward(x.view(), Accuracy::Full).unwrap().y, y);
        let Rank::Components(rank) = config.rank else { unreachable!() };
        let shape = LayerShape { out_features: out, in_features: 12, has_bias: true };
        let expected = config.stored_bytes(shape, rank).unwrap();
        prop_assert_eq!(parts.stored_bytes() as usize, expected);
    }

    /// Each component helps, all of them make up the whole error, and `exact` beats the others on its inputs.
    #[test]
    fn correction_is_the_best_of_its_rank(seed in 0u64..60) {
        let (w, x) = (sample(10, 16, seed), sample(200, 16, seed + 1));
        let exact_output = x.dot(&w.t());
        let error = |scaling, rank| {
            let config = LowRankConfig {
                rank: Rank::Components(rank),
                scaling,
                ridge_relative: 1e-6,
                factors: RowType::F32,
                // Which rounds alike for all scalings.
                clipping: Clipping::Absmax,
                weight: WeightFormat { group: Group::Size(16), symmetric: true, ..WeightFormat::default() },
                ..LowRankConfig::default()
            };
            let layer = built(&config, &w, &x);
            relative_error(layer.linear(x.view(), Accuracy::Approximate).unwrap().y.view(), exact_output.view())
        };
        for rank in [1, 3, 6] {
            for other in [Scaling::Identity, Scaling::MeanAbs, Scaling::Rms] {
                prop_assert!(error(Scaling::Exact, rank) <= error(other, rank) * 1.001, "{:?}", other);
            }
            prop_assert!(error(Scaling::Exact, rank) <= error(Scaling::Exact, rank - 1) * 1.001);
        }
        for scaling in [Scaling::Identity, Scaling::MeanAbs, Scaling::Rms, Scaling::Exact] {
            prop_assert!(error(scaling, 10) < 1e-5);
        }
    }

    /// A rank by error is the smallest that does, one by bits the largest that fits.
    #[test]
    fn ranks_follow_from_targets(seed in 0u64..40, max_error in 0.01f64..0.1, more in 0f64..20.0) {
        let (w, x) = (sample(24, 16, seed), sample(100, 16, seed + 1));
        let base = LowRankConfig { weight: WeightFormat { group: Group::Channel, ..WeightFormat::default() }, factors: RowType::F32, ridge_relative: 0.0, ridge_regularization: 1e-9, scaling: Scaling::Exact, ..LowRankConfig::default() };
        let rank_of = |layer: &LowRankLayer| layer.singular_values().len();
        let error = |rank| {
            let layer = built(&LowRankConfig { rank, ..base.clone() }, &w, &x);
            let y = layer.linear(x.view(), Accuracy::Approximate).unwrap().y;
            (rank_of(&layer), relative_error(y.view(), x.dot(&w.t()).view()))
        };
        let (rank, found) = error(Rank::MaxError(MaxError { max_error }));
        prop_assert!(found <= max_error * 1.001, "{} {}", found, max_error);
        prop_assert!(rank == 0 || error(Rank::Components(rank - 1)).1 > max_error * 0.999);
        let shape = LayerShape { out_features: 24, in_features: 16, has_bias: true };
        let bits = |rank| bits_per_weight(base.stored_bytes(shape, rank).unwrap() as u64, 24, 16).unwrap();
        let max_bits = bits(0) + more;
        let limited = LowRankConfig { rank: Rank::MaxBits(MaxBits { max_bits }), ..base.clone() };
        let layer = built(&limited, &w, &x);
        let rank = rank_of(&layer);
        // Of all that is stored, the bias too.
        let found = bits_per_weight(layer.to_parts().stored_bytes(), 24, 16).unwrap();
        prop_assert_eq!(found, bits(rank));
        prop_assert!(found <= max_bits + 1e-9 && (rank == 16 || bits(rank + 1) > max_bits - 0.1));
    }
}

/// The same error whatever the size of inputs and weights, or a refusal.
#[test]
fn sizes_do_not_matter() {
    let normal = |rows, seed| crate::linalg::normal_matrix(rows, 64, seed).mapv(|v| v as f32);
    let (w, x) = (normal(64, 1) * 0.02, normal(256, 2) + 0.5);
    for scaling in [Scaling::Identity, Scaling::MeanAbs, Scaling::Rms, Scaling::Exact] {
        for (factors, gptq, bias_correction) in [
            (RowType::F16, false, false),
            (RowType::F16, true, true),
            (RowType::F32, false, true),
            (RowType::Int8, false, false),
        ] {
            let config = LowRankConfig {
                scaling,
                factors,
                bias_correction,
                rounding: if gptq { Rounding::Gptq } else { Rounding::Nearest },
                rank: Rank::Components(8),
                ..LowRankConfig::default()
            };
            let error = |weights: f32, inputs: f32| {
                let (w, x) = (&w * weights, &x * inputs);
                let layer = compress(&config, w.view(), None, Some(&Calibration::of(x.clone())?))?;
                let back = layer_from_parts(layer.to_parts()).unwrap();
                let y = back.linear(x.view(), Accuracy::Approximate)?.y;
                Ok::<_, Error>(relative_error(y.view(), matmul_nt(x.view(), w.view()).view()))
            };
            let plain = error(1.0, 1.0).unwrap();
            for inputs in [1e-12, 1e-6, 1e-5, 1e-3, 1e3, 1e6, 1e7, 1e15] {
                let found = error(1.0, inputs).unwrap();
                assert!((found / plain - 1.0).abs() < 0.05, "{config:?} inputs × {inputs}: {found} {plain}");
            }
            for weights in [1e-12, 1e-9, 1e-5, 1e6, 1e12] {
                match error(weights, 1.0) {
                    Ok(found) => {
                        assert!((found / plain - 1.0).abs() < 0.05, "{config:?} × {weights}: {found} {plain}")
                    }
                    Err(e) => {
                        assert!(factors == RowType::F16 && e.to_string().contains("f16"), "{config:?} × {weights}: {e}")
                    }
                }
            }
        }
    }
}

/// Inputs that say nothing, or too little: the layer is what it is without them, and says so; or is made with a floor.
#[test]
fn statistics_that_vanish_are_not_used() {
    let normal = |rows, seed| crate::linalg::normal_matrix(rows, 64, seed).mapv(|v| v as f32);
    let w = normal(32, 1);
    let base = LowRankConfig { rank: Rank::Components(4), ..LowRankConfig::default() };
    let uncalibrated = compress(&base, w.view(), None, None).unwrap().weight().unwrap();
    let (zeros, ones) = (Array2::zeros((16, 64)), Array2::ones((100, 64)));
    let of = |config: &LowRankConfig, x: &Array2<f32>| {
        let calibration = Calibration::of(x.clone()).unwrap();
        let layer = compress(config, w.view(), None, Some(&calibration)).unwrap();
        let back = layer_from_parts(layer.to_parts()).unwrap();
        assert_eq!(back.to_parts(), layer.to_parts());
        (config.unusable(&calibration), layer)
    };
    let gptq = || LowRankConfig { rounding: Rounding::Gptq, ..base.clone() };
    for (config, x) in [
        (gptq(), &zeros),
        (LowRankConfig { bias_correction: true, ..gptq() }, &zeros),
        (LowRankConfig { scaling: Scaling::Exact, ..base.clone() }, &zeros),
        (LowRankConfig { scaling: Scaling::Rms, ..base.clone() }, &zeros),
        (LowRankConfig { scaling: Scaling::MeanAbs, ..base.clone() }, &zeros),
        (LowRankConfig { bias_correction: true, ..gptq() }, &ones),
        (LowRankConfig { bias_correction: true, ..gptq() }, &Array2::ones((1, 64))),
        (LowRankConfig { bias_correction: true, scaling: Scaling::Exact, ..base.clone() }, &ones),
    ] {
        let (reason, layer) = of(&config, x);
        assert_eq!(layer.weight().unwrap(), uncalibrated, "{config:?}");
        let noted = layer.config()["adapted"][0].as_str().unwrap().to_owned();
        assert!(noted.contains("not used") && noted.contains(reason.unwrap()), "{noted}");
    }
    for (config, says) in [
        (LowRankConfig { damping: 0.0, ..gptq() }, "damping: 0 to 0.01"),
        (LowRankConfig { damping: 0.0, bias_correction: true, ..gptq() }, "damping: 0 to 0.01"),
        (LowRankConfig { scaling: Scaling::Exact, ridge_relative: 0.0, ..base.clone() }, "ridge_relative: 0 to"),
    ] {
        let (reason, layer) = of(&config, &normal(8, 2));
        assert!(
            reason.is_none() && layer.config()["adapted"][0].as_str().unwrap().starts_with(says),
            "{}",
            layer.config()
        );
        assert!(relative_error(layer.weight().unwrap().view(), w.view()) < 0.2);
    }
    let alone = LowRankConfig { scaling: Scaling::Rms, ..LowRankConfig::default() };
    let adapted = json!(["scaling: not used, rank is 0"]);
    assert_eq!(of(&alone, &normal(8, 2)).1.config()["adapted"], adapted);
    // So it needs no inputs.
    assert_eq!(compress(&alone, w.view(), None, None).unwrap().config()["adapted"], adapted);
    // What needs no help is not noted.
    assert!(of(&gptq(), &normal(8, 2)).1.config().get("adapted").is_none());
    assert!(
        of(&LowRankConfig { scaling: Scaling::Exact, ..base }, &Array2::ones((100, 64)))
            .1
            .config()
            .get("adapted")
            .is_none()
    );
}

/// How inputs are rounded is no part of the artifact: the catalogue says it.
#[test]
fn activations_are_a_matter_of_running() {
    let (w, x) = (sample(24, 64, 1), sample(5, 64, 2));
    let config = LowRankConfig { activations: ActivationFormat::Int8, rank: Rank::Components(3), ..Default::default() };
    let (rounded, plain) =
        (built(&config, &w, &x), built(&LowRankConfig { activations: ActivationFormat::F32, ..config }, &w, &x));
    assert_eq!(rounded.to_parts(), plain.to_parts());
    assert_eq!(rounded.config()["activations"], "int8");
    let back = configured(&layer_from_parts(plain.to_parts()).unwrap(), &rounded.config()).unwrap();
    let run = |layer: &dyn Layer, accuracy| layer.forward(x.view(), accuracy).unwrap().y;
    assert_eq!(run(&*back, Accuracy::Approximate), run(&rounded, Accuracy::Approximate));
    assert_eq!(run(&*back, Accuracy::Full), run(&plain, Accuracy::Approximate));
    let off = relative_error(run(&*back, Accuracy::Approximate).view(), run(&plain, Accuracy::Full).view());
    assert!(off > 0.0 && off < 0.01, "{off}");
    let floats = LowRankConfig {
        weight: WeightFormat { weight_type: WeightType::Bf16, ..Default::default() },
        activations: ActivationFormat::Int8,
        ..Default::default()
    };
    assert!(MethodConfig::from(floats).validate().unwrap_err().to_string().contains("stay floats"));
}

#[test]
fn what_does_not_fit_is_refused() {
    let w = sample(6, 8, 1);
    let refuse = |config: LowRankConfig, expected: &str| {
        let message = MethodConfig::from(config).compress(w.view(), None, None).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    let fits = LowRankConfig {
        weight: WeightFormat { group: Group::Size(8), ..WeightFormat::default() },
        rank: Rank::Components(2),
        ..LowRankConfig::default()
    };
    refuse(LowRankConfig { rank: Rank::Components(7), ..fits.clone() }, "at most 6");
    let of_bits = |max_bits| LowRankConfig { rank: Rank::MaxBits(MaxBits { max_bits }), ..fits.clone() };
    refuse(of_bits(4.0), "at least 9");
    // A bias of 6 numbers is 4 bits more for each of 48 weights.
    let shape = LayerShape { out_features: 6, in_features: 8, has_bias: true };
    assert!(Method::check(&of_bits(12.9), LayerShape { has_bias: false, ..shape }, false).is_ok());
    let message = Method::check(&of_bits(12.9), shape, false).unwrap_err().to_string();
    assert!(message.contains("at least 13.000, the bits of a 6 × 8 weight with its bias"), "{message}");
    refuse(LowRankConfig { rank: Rank::MaxError(MaxError { max_error: 0.0 }), ..fits.clone() }, "above 0");
    for scaling in [Scaling::Exact, Scaling::Rms, Scaling::MeanAbs] {
        refuse(LowRankConfig { scaling, ..fits.clone() }, "calibration");
    }
    refuse(LowRankConfig { rounding: Rounding::Gptq, ..fits.clone() }, "calibration inputs for rounding");
    refuse(LowRankConfig { weight: WeightFormat { group: Group::Size(3), ..fits.weight }, ..fits.clone() }, "divisor");
    refuse(LowRankConfig { ridge_relative: -1.0, ..fits.clone() }, "at least 0");
    let floats = WeightFormat { weight_type: WeightType::F16, ..fits.weight };
    refuse(LowRankConfig { weight: floats, rounding: Rounding::Gptq, ..fits.clone() }, "stay floats");
    refuse(LowRankConfig { weight: floats, dual_scaling: true, ..fits }, "stay floats");
}

/// The defaults need no inputs and fit layers of few outputs.
#[test]
fn defaults_have_no_correction() {
    let layer = compress(&LowRankConfig::default(), sample(3, 64, 1).view(), None, None).unwrap();
    let config = layer.config();
    assert_eq!((layer.singular_values().len(), &config["rank"]), (0, &json!(0)));
    assert!(config.get("adapted").is_none());
}

#[test]
fn ranks_are_numbers_or_targets() {
    let read = |text: &str| serde_json::from_str::<LowRankConfig>(text).map(|c| c.rank);
    assert_eq!(read(r#"{"rank": 4}"#).unwrap(), Rank::Components(4));
    assert_eq!(read(r#"{"rank": {"max_bits": 4.5}}"#).unwrap(), Rank::MaxBits(MaxBits { max_bits: 4.5 }));
    for (bad, says) in [
        ("-1", "integer `-1`, expected a whole number"),
        ("4.5", "floating point `4.5`, expected a whole number"),
        ("\"all\"", "{ max_error = 0.05 }"),
        ("{\"max_bit\": 3}", "expected `max_error` or `max_bits`"),
        ("{\"max_bits\": \"few\"}", "string \"few\""),
        ("{\"max_bits\": 3, \"max_error\": 0.1}", "invalid length 2, expected a whole number"),
        ("{}", "map"),
    ] {
        let message = read(&format!(r#"{{"rank": {bad}}}"#)).unwrap_err().to_string();
        assert!(message.contains(says), "{bad}: {message}");
    }
    for rank in [Rank::Components(0), Rank::MaxError(MaxError { max_error: 0.5 })] {
        let text = serde_json::to_string(&LowRankConfig { rank, ..LowRankConfig::default() }).unwrap();
        assert_eq!(read(&text).unwrap(), rank, "{text}");
    }
}

/// A group whose weights are all 0 gives exactly 0: codes that stand around a level above 0 leave no rounding behind.
#[test]
fn weights_of_nothing_give_nothing() {
    let x = sample(9, 64, 3) * 100.0;
    let mut half = sample(8, 64, 4);
    half.slice_mut(ndarray::s![.., 32..]).fill(0.0);
    let only_second = {
        let mut x = x.clone();
        x.slice_mut(ndarray::s![.., ..32]).fill(0.0);
        x
    };
    for weight_type in ["int2", "int4", "int8", "nf4", "mxint4", "mxint8", "ternary"] {
        for (symmetric, scales) in [(true, "f32"), (false, "f32"), (true, "f16")] {
            let mut format = json!({"type": weight_type, "group": 32});
            if weight_type.starts_with("int") {
                format["symmetric"] = symmetric.into();
            }
            if !weight_type.starts_with("mx") {
                format["scales"] = scales.into();
            }
            for clipping in ["mse", "absmax", "hqq"] {
                let config = json!({"weight": format, "clipping": clipping});
                let config: LowRankConfig = serde_json::from_value(config).unwrap();
                for (w, x) in [(&Array2::zeros((8, 64)), &x), (&half, &only_second)] {
                    let layer = compress(&config, w.view(), None, None).unwrap();
                    let layer = layer_from_parts(layer.to_parts()).unwrap();
                    let y = layer.forward(x.view(), Accuracy::Approximate).unwrap().y;
                    assert!(y.iter().all(|y| y.abs() < 1e-30), "{weight_type} {symmetric} {scales} {clipping}: {y}");
                }
            }
        }
    }
}
