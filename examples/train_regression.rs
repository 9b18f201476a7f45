//! Training through a layer that answers from few of its keys.
//!
//! ```text
//! cargo run --example train_regression
//! ```
//!
//! The forward pass uses the keys that matter to each input; gradients are those of the exact layer, and after each step
//! the keys follow the weight. The same is done with a dense layer, for comparison.

use layerstore::Calibration;
use layerstore::layer::{Accuracy, Dense, KeyValueConfig, KeyValueLayer, Layer, Refit, SharedLayer, compress};
use ndarray::{Array2, ArrayView2};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const SAMPLES: usize = 512;
const INPUTS: usize = 48;
const OUTPUTS: usize = 24;
const STEPS: usize = 120;

/// What each answer may be off by: as few keys as certify it are used.
const ERROR: f64 = 0.05;

/// How much worse the loss may be for it.
const WITHIN: f64 = 0.05;

fn main() -> Result<()> {
    // Inputs that vary less and less from one feature to the next, and a noisy linear function of them.
    let spread = |j: usize| 0.93f32.powi(j as i32);
    let x = Array2::from_shape_fn((SAMPLES, INPUTS), |(i, j)| spread(j) * noise(i, j));
    let truth = Array2::from_shape_fn((OUTPUTS, INPUTS), |(i, j)| 0.8f32.powi(i as i32) * noise(i + 7000, j));
    let target = x.dot(&truth.t()) + Array2::from_shape_fn((SAMPLES, OUTPUTS), |(i, j)| 0.3 * noise(i + 9000, j));

    let start = Array2::from_shape_fn((OUTPUTS, INPUTS), |(i, j)| 0.05 * noise(i + 5000, j));
    let exact = compress(&Dense {}, start.view(), None, None)?.shared();
    let calibration = Calibration::of(x.clone())?;
    let config = KeyValueConfig { max_relative_error: Some(ERROR), ..KeyValueConfig::default() };
    let few = compress(&config, start.view(), None, Some(&calibration))?.shared();

    let (exact, _) = train("every weight", exact, &start, &calibration, target.view())?;
    let (few, refits) = train("few keys", few, &start, &calibration, target.view())?;
    println!("{refits} of {STEPS} refits kept the values, and only computed keys");
    println!("loss {few:.5} against {exact:.5}: {:+.1} %", 100.0 * (few / exact - 1.0));
    if few > exact * (1.0 + WITHIN) {
        return Err(format!("more than {} % worse", 100.0 * WITHIN).into());
    }
    Ok(())
}

/// Gradient descent on the mean squared error; gives the last loss, and how many refits were incremental.
fn train(
    name: &str,
    mut layer: SharedLayer,
    start: &Array2<f32>,
    inputs: &Calibration,
    target: ArrayView2<f32>,
) -> Result<(f64, usize)> {
    let (mut weight, mut incremental, x) = (start.clone(), 0, inputs.sample());
    let mut loss = f64::INFINITY;
    for step in 0..=STEPS {
        let y = layer.forward(x, Accuracy::Approximate)?.y;
        let residual = &y - &target;
        loss = residual.iter().map(|&r| f64::from(r).powi(2)).sum::<f64>() / SAMPLES as f64;
        if step % 40 == 0 {
            println!("{name:<12} step {step:>3}: loss {loss:.5}");
        }
        if step == STEPS {
            if let Some(layer) = layer.downcast_ref::<KeyValueLayer>() {
                let used: usize = layer.search(x, None)?.iter().map(|q| q.hits.len()).sum();
                println!("{:.1} of {} keys used on average", used as f64 / SAMPLES as f64, layer.rank());
            }
            break;
        }
        let gradients = layer.backward(x, (residual * (2.0 / SAMPLES as f32)).view())?;
        weight.scaled_add(-0.15, &gradients.weight);
        layer = match layer.downcast_ref::<KeyValueLayer>() {
            Some(layer) => {
                let (layer, how): (KeyValueLayer, Refit) = layer.refit(weight.view(), None, Some(inputs))?;
                incremental += usize::from(how == Refit::Keys);
                layer.shared()
            }
            None => compress(&Dense {}, weight.view(), None, None)?.shared(),
        };
    }
    Ok((loss, incremental))
}

/// The sum of a few numbers between −1 and 1 that look like chance, and are the same in every run.
fn noise(i: usize, j: usize) -> f32 {
    let mut state = (i as u64) << 32 | j as u64;
    let mut sum = 0.0;
    for _ in 0..3 {
        state = (state ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state ^= state >> 29;
        sum += (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
    }
    sum
}
