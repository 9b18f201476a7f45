use ndarray::{Array1, Array2, Array3, ArrayD, Axis, IxDyn, s};
use proptest::prelude::*;

use super::training::{GluTraining, TernaryTraining};
use super::*;
use crate::layer::{Accuracy, Activation, DenseLayer, Layer, RmsNorm, SharedLayer, TernaryLayer};

fn sample(shape: &[usize], seed: u64) -> ArrayD<f32> {
    let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    ArrayD::from_shape_fn(IxDyn(shape), |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

fn matrix(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    sample(&[rows, columns], seed).into_dimensionality().unwrap()
}

fn ternary(out: usize, inputs: usize, positions: usize, seed: u64) -> TernaryLayer {
    let kernel = matrix(out, inputs, seed);
    let bias = Array1::from_shape_fn(out, |j| 0.05 * j as f32 - 0.1);
    let gain = matrix(positions, inputs, seed + 1) * 0.3 + 1.0;
    let norm = RmsNorm::new(Some(gain), None).unwrap();
    let training = TernaryTraining { kernel, bias: Some(bias), norm, activation: Activation::Linear };
    training.freeze().unwrap()
}

fn mml(out: usize, inputs: usize, positions: usize, seed: u64) -> SharedLayer {
    ternary(out, inputs, positions, seed).shared()
}

fn dense(out: usize, inputs: usize, seed: u64) -> SharedLayer {
    let bias = Array1::from_elem(out, 0.1);
    DenseLayer::from_f32(matrix(out, inputs, seed).view(), Some(bias.view())).shared()
}

fn gru(inputs: usize, units: usize, heads: usize, fully: bool, sequence: SequenceConfig) -> Gru {
    let config = GruConfig { units, fully_mml: fully, num_heads: heads, sequence, ..GruConfig::default() };
    let kernel = mml(if fully { 3 } else { 2 } * units, inputs, 1, 11);
    let output = if fully { mml(units, units, 1, 13) } else { dense(units, units, 13) };
    Gru::new(config, kernel, (!fully).then(|| dense(units, inputs, 17)), output).unwrap()
}

fn lru(inputs: usize, units: usize, state_dim: usize, fully: bool, sequence: SequenceConfig) -> Lru {
    let config = LruConfig { units, state_dim, fully_mml: fully, sequence, ..LruConfig::default() };
    let out = |out, inputs, seed| if fully { mml(out, inputs, 1, seed) } else { dense(out, inputs, seed) };
    let layers = LruLayers {
        b_re: mml(state_dim, inputs, 1, 21),
        b_im: mml(state_dim, inputs, 1, 23),
        c_re: out(units, state_dim, 25),
        c_im: out(units, state_dim, 27),
        d: out(units, inputs, 29),
    };
    let spectrum = LruSpectrum::initial(&config, 5).unwrap();
    Lru::new(config, spectrum, layers).unwrap()
}

fn glu(units: usize, hidden: usize, positions: usize) -> Glu {
    let config =
        GluConfig { units, intermediate_size: Some(hidden), activation: Activation::Silu, ..GluConfig::default() };
    Glu::new(config, mml(2 * hidden, units, positions, 31), mml(units, hidden, 1, 33)).unwrap()
}

const ALL: SequenceConfig = SequenceConfig {
    return_sequences: true,
    return_state: false,
    go_backwards: false,
    stateful: false,
    zero_output_for_mask: false,
};

fn block(width: usize, positions: usize, fully: bool) -> TransformerBlock {
    let norm = |seed| RmsNorm::new(Some(matrix(positions, width, seed) * 0.2 + 1.0), None).unwrap();
    let mixer = GruTokenMixer::new(gru(width, width, 2, fully, ALL)).unwrap();
    TransformerBlock::new(BlockConfig::default(), mixer, norm(41), glu(width, 10, positions), norm(43)).unwrap()
}

/// One of everything that goes step by step.
fn model(positions: usize) -> Module {
    let table =
        |rows, seed| EmbeddingTable::new(DenseLayer::from_f32(matrix(rows, 8, seed).view(), None).shared()).unwrap();
    let parts = vec![
        ("tokens", Module::TokenEmbedding(TokenEmbedding::new(table(30, 51), Some(table(positions, 52))).unwrap())),
        ("block", Module::TransformerBlock(Box::new(block(8, positions, true)))),
        ("plain", Module::TransformerBlock(Box::new(block(8, positions, false)))),
        ("lru", Module::Lru(Box::new(lru(8, 8, 6, false, ALL)))),
        ("attention", Module::GruTokenMixer(GruTokenMixer::new(gru(8, 8, 4, true, ALL)).unwrap())),
        (
            "norm",
            Module::RmsNorm(RmsNorm::new(Some(Array2::ones((1, 8))), Some(Array2::from_elem((1, 8), 0.1))).unwrap()),
        ),
        ("glu", Module::Glu(glu(8, 6, 1))),
        ("head", Module::Linear(mml(5, 8, positions, 55))),
        ("softmax", Module::Activation(Activation::Softmax)),
    ];
    Module::Sequential(parts.into_iter().map(|(name, module)| (name.to_owned(), module)).collect())
}

fn tokens(batch: usize, steps: usize) -> ArrayD<f32> {
    ArrayD::from_shape_fn(IxDyn(&[batch, steps]), |i| ((i[0] * 7 + i[1] * 11) % 30) as f32)
}

fn near(a: &ArrayD<f32>, b: &ArrayD<f32>, allowed: f32) -> bool {
    a.shape() == b.shape() && a.iter().zip(b).all(|(a, b)| (a - b).abs() <= allowed * (1.0 + b.abs()))
}

#[test]
fn steps_give_what_the_whole_sequence_does() {
    let model = model(9);
    let tokens = tokens(3, 9);
    let whole = model.forward(tokens.view(), Accuracy::Approximate).unwrap();
    let mut state = model.initial_state(3);
    assert_eq!(state.states.len(), 4);
    for step in 0..9 {
        let x = tokens.slice(s![.., step..step + 1]).into_dimensionality().unwrap();
        let y = model.step(x, &mut state, Accuracy::Approximate).unwrap().into_dyn();
        let expected = whole.index_axis(Axis(1), step).to_owned();
        assert!(near(&y, &expected, 1e-5), "step {step}: {y} for {expected}");
    }
    // There is no tenth position, and what failed has changed nothing.
    let before = state.clone();
    let message = model.step(Array2::zeros((3, 1)).view(), &mut state, Accuracy::Approximate).unwrap_err().to_string();
    assert!(message.contains("position") && state == before, "{message}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However a sequence is cut, what is left of its beginning is all that its end needs.
    #[test]
    fn states_carry_over(fully in any::<bool>(), cut in 1usize..8, backwards in any::<bool>(), seed in any::<u64>()) {
        let x: Array3<f32> = sample(&[2, 9, 6], seed).into_dimensionality().unwrap();
        let sequence = SequenceConfig { go_backwards: backwards, ..ALL };
        let (gru, lru) = (gru(6, 8, 2, fully, sequence), lru(6, 8, 5, fully, sequence));
        let part = |from: usize, to: usize| match backwards {
            false => x.slice(s![.., from..to, ..]),
            true => x.slice(s![.., 9 - to..9 - from, ..]),
        };
        let run = |x: ndarray::ArrayView3<f32>, state: Option<ndarray::ArrayView3<f32>>, second: bool| match second {
            false => gru.forward(x, state, None, Accuracy::Approximate).unwrap(),
            true => lru.forward(x, state, None, Accuracy::Approximate).unwrap(),
        };
        for second in [false, true] {
            let whole = run(x.view(), None, second);
            let first = run(part(0, cut), None, second);
            let rest = run(part(cut, 9), Some(first.state.view()), second);
            let joined = ndarray::concatenate(Axis(1), &[first.outputs.view(), rest.outputs.view()]).unwrap();
            prop_assert!(near(&joined.into_dyn(), &whole.outputs.into_dyn(), 1e-5));
            prop_assert!(near(&rest.state.into_dyn(), &whole.state.into_dyn(), 1e-5));
        }
    }

    /// Steps that are left out are as if they were not there; the last one's output is the last one's that is.
    #[test]
    fn masks_leave_steps_out(there in proptest::collection::vec(any::<bool>(), 7), zero in any::<bool>()) {
        let x: Array3<f32> = sample(&[1, 7, 6], 3).into_dimensionality().unwrap();
        let sequence = SequenceConfig { zero_output_for_mask: zero, ..ALL };
        let mask = Array2::from_shape_vec((1, 7), there.clone()).unwrap();
        let kept: Vec<usize> = (0..7).filter(|&i| there[i]).collect();
        let gru = |sequence| gru(6, 8, 2, true, sequence);
        let ran = gru(sequence).forward(x.view(), None, Some(mask.view()), Accuracy::Approximate).unwrap();
        let last = gru(SequenceConfig { return_sequences: false, ..sequence });
        let last = last.forward(x.view(), None, Some(mask.view()), Accuracy::Approximate).unwrap();
        prop_assert_eq!(&last.state, &ran.state);
        let expected = ran.outputs.slice(s![.., 6.., ..]).to_owned();
        prop_assert!(near(&last.outputs.into_dyn(), &expected.into_dyn(), 1e-6));
        let short = x.select(Axis(1), &kept);
        if kept.is_empty() {
            prop_assert!(ran.outputs.iter().chain(&ran.state).all(|v| *v == 0.0));
            return Ok(());
        }
        let alone = gru(ALL).forward(short.view(), None, None, Accuracy::Approximate).unwrap();
        prop_assert!(near(&alone.state.into_dyn(), &ran.state.into_dyn(), 1e-6));
        let mut before = Array1::zeros(8);
        for (step, there) in there.into_iter().enumerate() {
            let expected = match there {
                true => alone.outputs.slice(s![0, kept.iter().position(|&k| k == step).unwrap(), ..]).to_owned(),
                false if zero => Array1::zeros(8),
                false => before.clone(),
            };
            let found = ran.outputs.slice(s![0, step, ..]).to_owned();
            prop_assert!(near(&found.clone().into_dyn(), &expected.into_dyn(), 1e-6));
            before = found;
        }
    }
}

/// More rows than go through the layers at once.
#[test]
fn long_sequences_go_through_in_parts() {
    let x: Array3<f32> = sample(&[3, 700, 6], 7).into_dimensionality().unwrap();
    let gru = gru(6, 8, 2, true, ALL);
    let whole = gru.forward(x.view(), None, None, Accuracy::Approximate).unwrap();
    let mut state = initial_state(&gru, 3);
    for step in 0..700 {
        let y = gru.step(x.index_axis(Axis(1), step), &mut state, Accuracy::Approximate).unwrap();
        let expected = whole.outputs.index_axis(Axis(1), step).to_owned();
        assert!(near(&y.into_dyn(), &expected.into_dyn(), 1e-5), "step {step}");
    }
    assert!(near(&state.into_dyn(), &whole.state.into_dyn(), 1e-5));
}

#[test]
fn modules_become_layers_and_come_back() {
    let patches = vec![
        ("patches".to_owned(), Module::Patches(Patches::new(2).unwrap())),
        ("embed".to_owned(), Module::PatchEmbedding(PatchEmbedding::new(mml(8, 4, 6, 61), None).unwrap())),
        ("mean".to_owned(), Module::Mean),
        ("flatten".to_owned(), Module::Flatten),
    ];
    let images = sample(&[2, 4, 7, 1], 9);
    for (module, x) in [(model(9), tokens(2, 9)), (Module::Sequential(patches), images)] {
        let layers = module.to_layers("net");
        let mut by_name: std::collections::BTreeMap<_, _> = layers.iter().cloned().collect();
        assert_eq!(by_name.len(), layers.len());
        by_name.insert("another".into(), dense(2, 2, 1));
        let back = Module::from_layers("net", &by_name).unwrap();
        let run = |module: &Module| module.forward(x.view(), Accuracy::Approximate).unwrap();
        assert_eq!(run(&back), run(&module));
        let parts = |layers: &[(String, SharedLayer)]| {
            layers.iter().map(|(name, layer)| (name.clone(), layer.to_parts().id())).collect::<Vec<_>>()
        };
        assert_eq!(parts(&back.to_layers("net")), parts(&layers));
        // Whatever is missing is named.
        for (name, _) in &layers {
            let mut without = by_name.clone();
            without.remove(name);
            match Module::from_layers("net", &without) {
                Err(e) => assert!(e.to_string().contains(name.as_str()) || e.to_string().contains("data_gate"), "{e}"),
                Ok(_) => panic!("'{name}' is not missed"),
            }
        }
    }
    let unknown = crate::layer::ModuleLayer::new("moe", Default::default(), Default::default()).shared();
    let message = Module::from_layers("a", &[("a".to_owned(), unknown)].into()).unwrap_err().to_string();
    assert!(message.contains("moe") && message.contains("transformer_block"), "{message}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |result: crate::error::Result<ArrayD<f32>>, expected: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    let run = |module: Module, x: ArrayD<f32>| module.forward(x.view(), Accuracy::Approximate);
    refused(run(model(9), tokens(2, 7)), "9 positions");
    refused(run(model(9), tokens(2, 9) + 21.0), "whole number from 0 to 29");
    refused(run(model(9), tokens(2, 9) + 0.5), "whole number");
    refused(run(Module::Gru(gru(6, 8, 2, true, ALL)), sample(&[2, 6], 1)), "[batch, steps, features]");
    refused(run(Module::Gru(gru(6, 8, 2, true, ALL)), sample(&[2, 0, 6], 1)), "at least 1");
    refused(run(Module::Gru(gru(6, 8, 2, true, ALL)), ArrayD::from_elem(IxDyn(&[1, 1, 6]), f32::NAN)), "finite");
    refused(run(Module::Patches(Patches::new(2).unwrap()), sample(&[2, 6], 1)), "channels");
    assert!(Patches::new(0).is_err());
    let config = GruConfig { units: 8, num_heads: 3, fully_mml: true, ..GruConfig::default() };
    assert!(Gru::new(config, mml(24, 6, 1, 1), None, mml(8, 8, 1, 1)).unwrap_err().to_string().contains("divide"));
    let config = GruConfig { units: 8, fully_mml: true, ..GruConfig::default() };
    assert!(Gru::new(config.clone(), mml(24, 6, 1, 1), Some(dense(8, 6, 1)), mml(8, 8, 1, 1)).is_err());
    assert!(Gru::new(config, mml(16, 6, 1, 1), None, mml(8, 8, 1, 1)).unwrap_err().to_string().contains("(24, 6)"));
    for sequence in [SequenceConfig { return_sequences: false, ..ALL }, SequenceConfig { go_backwards: true, ..ALL }] {
        let message = GruTokenMixer::new(gru(6, 8, 2, true, sequence)).unwrap_err().to_string();
        assert!(message.contains("each step's output"), "{message}");
    }
    let gru = gru(6, 8, 2, true, ALL);
    let state = Array3::zeros((1, 4, 2));
    assert!(gru.forward(Array3::zeros((1, 2, 6)).view(), Some(state.view()), None, Accuracy::Full).is_err());
    let mask = Array2::from_elem((1, 3), true);
    assert!(gru.forward(Array3::zeros((1, 2, 6)).view(), None, Some(mask.view()), Accuracy::Full).is_err());
    let tanh = GluConfig { units: 8, activation: Activation::Tanh, ..GluConfig::default() };
    assert!(Glu::new(tanh, mml(12, 8, 1, 1), mml(8, 6, 1, 1)).unwrap_err().to_string().contains("sigmoid"));
    assert_eq!(GluConfig::default().intermediate(48), 256);
    assert_eq!(GluConfig { hidden_ratio: 4, ..GluConfig::default() }.intermediate(100), 512);
    let ring = LruConfig { state_dim: 2, r_min: 0.9, r_max: 0.5, ..LruConfig::default() };
    assert!(LruSpectrum::initial(&ring, 1).is_err());
    let ring = LruConfig { state_dim: 500, r_min: 0.4, r_max: 0.9, max_phase: 1.0, ..LruConfig::default() };
    let LruSpectrum { nu_log, theta_log, gamma_log } = LruSpectrum::initial(&ring, 1).unwrap();
    for ((nu, theta), gamma) in nu_log.iter().zip(&theta_log).zip(&gamma_log) {
        let size = (-nu.exp()).exp();
        assert!((0.4 - 1e-5..0.9 + 1e-5).contains(&size) && theta.exp() <= 1.0);
        assert!((gamma.exp() - (1.0 - size * size).sqrt()).abs() < 1e-5);
    }
}

/// A ternary layer in training.
fn in_training(out: usize, inputs: usize, activation: Activation, seed: u64) -> TernaryTraining {
    let gain = matrix(2, inputs, seed + 1) * 0.3 + 1.0;
    TernaryTraining {
        kernel: matrix(out, inputs, seed),
        bias: Some(Array1::from_shape_fn(out, |j| 0.1 * j as f32)),
        norm: RmsNorm::new(Some(gain), None).unwrap(),
        activation,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// What is frozen gives what training gave.
    #[test]
    fn frozen_as_trained(out in 1usize..12, inputs in 1usize..60, seed in 0u64..9999) {
        let training = in_training(out, inputs, Activation::Gelu, seed);
        let x = matrix(6, inputs, seed ^ 77) * 3.0;
        let (y, _) = training.forward(x.view()).unwrap();
        let frozen = training.freeze().unwrap().shared().forward(x.view(), Accuracy::Approximate).unwrap().y;
        prop_assert_eq!(frozen, y);
        let glu = GluTraining {
            gate: in_training(10, inputs, Activation::Linear, seed ^ 5),
            down: TernaryTraining { norm: RmsNorm::new(Some(Array2::ones((1, 5))), None).unwrap(), ..in_training(out, 5, Activation::Linear, seed ^ 6) },
            activation: Activation::Silu,
        };
        let (y, _) = glu.forward(x.view()).unwrap();
        let frozen = glu.freeze().unwrap();
        let frozen = frozen.forward(x.view().insert_axis(Axis(0)).into_shape_with_order((3, 2, inputs)).unwrap().into_dyn(), Accuracy::Approximate).unwrap();
        let frozen: Vec<f32> = frozen.iter().copied().collect();
        prop_assert_eq!(frozen, y.iter().copied().collect::<Vec<f32>>());
    }
}

/// Gradients are those of the pass with `v + stop_gradient(round(v) − v)` for each rounded number: a pass that is linear in
/// ternary weights and rounded inputs, with differences of what was rounded held fast.
#[test]
fn straight_through() {
    let training = in_training(4, 6, Activation::Tanh, 3);
    let x = matrix(4, 6, 8) * 2.0;
    let weights = matrix(4, 4, 9);
    let loss_of = |y: &Array2<f32>| y.iter().zip(&weights).map(|(y, w)| f64::from(*y) * f64::from(*w)).sum::<f64>();
    let (_, tape) = training.forward(x.view()).unwrap();
    let found = training.backward(&tape, weights.view()).unwrap();
    // What rounding added, at this point.
    let normalized = training.norm.forward(x.view()).unwrap();
    let steps = normalized.map_axis(Axis(1), |row| 127.0 / row.iter().fold(0f32, |m, v| m.max(v.abs())));
    let rounded =
        Array2::from_shape_fn(normalized.dim(), |(i, j)| (normalized[[i, j]] * steps[i]).round_ties_even() / steps[i]);
    let added_x = &rounded - &normalized;
    let mean = |kernel: &Array2<f32>| kernel.mapv(f32::abs).mean().unwrap();
    let scale = mean(&training.kernel);
    let added_w = training.kernel.mapv(|w| (w / scale).round().clamp(-1.0, 1.0)) - &training.kernel;
    let pass = |training: &TernaryTraining, x: &Array2<f32>| {
        let x = training.norm.forward(x.view()).unwrap() + &added_x;
        // y = (x̃ · (W + stop(W̃ − W))ᵀ) γ, whose gradient through W̃ is γ x̃.
        let w = &training.kernel + &added_w;
        let y = x.dot(&w.t()) * mean(&training.kernel) + training.bias.as_ref().unwrap();
        loss_of(&y.mapv(f32::tanh))
    };
    let step = 1e-2f32;
    let slope = |up: f64, down: f64| ((up - down) / (2.0 * f64::from(step))) as f32;
    for place in [(0, 0), (1, 3), (3, 5), (2, 2)] {
        let moved = |by: f32| {
            let mut other = training.clone();
            other.kernel[place] += by;
            pass(&other, &x)
        };
        let expected = slope(moved(step), moved(-step));
        assert!(
            (found.kernel[place] - expected).abs() < 0.02 * (1.0 + expected.abs()),
            "{} for {expected}",
            found.kernel[place]
        );
        let moved = |by: f32| {
            let mut other = x.clone();
            other[place] += by;
            pass(&training, &other)
        };
        let expected = slope(moved(step), moved(-step));
        assert!(
            (found.input[place] - expected).abs() < 0.02 * (1.0 + expected.abs()),
            "{} for {expected}",
            found.input[place]
        );
    }
    let moved = |by: f32| {
        let mut gain = training.norm.gain().unwrap().clone();
        gain[[1, 2]] += by;
        let other = TernaryTraining { norm: RmsNorm::new(Some(gain), None).unwrap(), ..training.clone() };
        pass(&other, &x)
    };
    let expected = slope(moved(step), moved(-step));
    assert!((found.gain.unwrap()[[1, 2]] - expected).abs() < 0.02 * (1.0 + expected.abs()));
    let moved = |by: f32| {
        let mut other = training.clone();
        other.bias.as_mut().unwrap()[2] += by;
        pass(&other, &x)
    };
    let expected = slope(moved(step), moved(-step));
    assert!((found.bias.unwrap()[2] - expected).abs() < 0.02 * (1.0 + expected.abs()));
}

#[test]
fn a_gate_has_gradients_too() {
    let glu = GluTraining {
        gate: TernaryTraining { norm: RmsNorm::default(), ..in_training(6, 4, Activation::Linear, 3) },
        down: TernaryTraining { norm: RmsNorm::default(), ..in_training(2, 3, Activation::Linear, 5) },
        activation: Activation::Sigmoid,
    };
    let x = matrix(5, 4, 2);
    let (y, tape) = glu.forward(x.view()).unwrap();
    let found = glu.backward(&tape, Array2::ones(y.dim()).view()).unwrap();
    // A step against the gradient lowers the loss.
    let mut lower = glu.clone();
    lower.gate.kernel.scaled_add(-0.02, &found.gate.kernel);
    lower.down.bias.as_mut().unwrap().scaled_add(-0.02, &found.down.bias.unwrap());
    assert!(lower.forward(x.view()).unwrap().0.sum() < y.sum());
    assert_eq!((found.input.dim(), found.gate.gain, found.down.kernel.dim()), ((5, 4), None, (2, 3)));
    assert!(glu.backward(&tape, Array2::ones((5, 3)).view()).is_err());
}
