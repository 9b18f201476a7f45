//! Ternary layers beside the dense f32 product, and recurrent layers over lengths. `make bench`, or
//! `cargo bench --bench matmul_free`.
//!
//! Weights are made up, since only shapes decide the time. The dense product is the fastest of ndarray, faer and
//! matrixmultiply, and of ndarray on all threads, in the same run; inputs of ternary layers are rounded to int8 within the time.
//! Times are medians.

mod dense;

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

use layerstore_core::layer::{Accuracy, DenseLayer, Layer, RmsNorm, SharedLayer, TernaryLayer};
use layerstore_core::nn::{Gru, GruConfig, Lru, LruConfig, LruLayers, LruSpectrum, Module, SequenceConfig};
use ndarray::{Array2, Array3, ArrayView2};

use dense::{dense_on_all_threads, matrix, median, micros};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Widths of the recurrent layers.
const WIDTH: usize = 256;

/// The time of T-MAC's and BitNet's I2_S kernel for 2048 × 2048 on one thread of an EPYC 7V13, as published, in µs.
const I2_S: f64 = 58.0;

fn main() -> Result<()> {
    // `cargo test` also runs bench targets: measuring is for `cargo bench` alone.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    println!("ternary, one scale for the tensor, int8 inputs");
    println!(
        "{:<16} {:>6} {:>14} {:>10} {:>14} {:>12} {:>12}",
        "out × in", "batch", "dense f32 µs", "ours µs", "dense / ours", "stored bits", "memory bits"
    );
    for (out, inputs, batch) in
        [(4096, 4096, 1), (4096, 14_336, 1), (2048, 2048, 1), (1536, 384, 1), (4096, 4096, 4), (4096, 4096, 32)]
    {
        let weight = matrix(out, inputs, 1);
        let x = matrix(batch, inputs, 2);
        let dense = micros(dense_on_all_threads(weight.view(), x.view()));
        let layer = ternary(weight.view())?;
        let ours = micros(timed(&layer, x.view()));
        let bits = |bytes: usize| 8.0 * bytes as f64 / (out * inputs) as f64;
        let stored = layer.to_parts().weights.map_or(0, |weights| weights.packed.len());
        println!(
            "{:<16} {batch:>6} {dense:>14.1} {ours:>10.1} {:>14.2} {:>12.3} {:>12.3}",
            format!("{out} × {inputs}"),
            dense / ours,
            bits(stored),
            bits(layer.memory_bytes()),
        );
    }
    let layer = ternary(matrix(2048, 2048, 1).view())?;
    let x = matrix(1, 2048, 2);
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
    let ours = one.install(|| micros(timed(&layer, x.view())));
    println!("\n2048 × 2048 on one thread: {ours:.1} µs; published for I2_S on an EPYC 7V13: {I2_S:.1} µs\n");
    lengths()
}

/// Ternary weights of random signs, a third of them 0.
fn ternary(weight: ArrayView2<f32>) -> Result<TernaryLayer> {
    let signs = weight.mapv(|w| if w < -1.0 / 3.0 { -1 } else { i8::from(w > 1.0 / 3.0) });
    Ok(TernaryLayer::from_ternary(signs.view(), 0.02, None)?)
}

fn timed(layer: &dyn Layer, x: ArrayView2<f32>) -> std::time::Duration {
    median(|| {
        black_box(layer.forward(black_box(x), Accuracy::Approximate).map(|o| o.y).ok());
    })
}

/// The time of a token, in a sequence and by itself, at lengths up to 64K.
fn lengths() -> Result<()> {
    println!("recurrent layers of {WIDTH}, µs a token: a whole sequence, and a step behind so many tokens");
    println!("{:<10} {:>10} {:>14} {:>14}", "layer", "tokens", "in a sequence", "a step");
    for (name, module) in modules()? {
        for length in [1024, 4096, 16_384, 65_536] {
            let x = matrix(length, WIDTH, 3).into_shape_with_order((1, length, WIDTH))?;
            let started = Instant::now();
            let state = run(&module, &x)?;
            let whole = micros(started.elapsed()) / length as f64;
            let next = matrix(1, WIDTH, 4);
            let step = median(|| {
                let mut state = state.clone();
                let y = match &module {
                    Module::Gru(gru) => gru.step(black_box(next.view()), &mut state, Accuracy::Approximate),
                    Module::Lru(lru) => lru.step(black_box(next.view()), &mut state, Accuracy::Approximate),
                    _ => return,
                };
                black_box(y.ok());
            });
            println!("{name:<10} {length:>10} {whole:>14.2} {:>14.2}", micros(step));
        }
    }
    Ok(())
}

fn run(module: &Module, x: &Array3<f32>) -> Result<Array3<f32>> {
    Ok(match module {
        Module::Gru(gru) => gru.forward(x.view(), None, None, Accuracy::Approximate)?.state,
        Module::Lru(lru) => lru.forward(x.view(), None, None, Accuracy::Approximate)?.state,
        other => return Err(format!("no recurrent module: {}", other.kind()).into()),
    })
}

fn modules() -> Result<BTreeMap<&'static str, Module>> {
    let sequence = SequenceConfig { return_sequences: true, ..SequenceConfig::default() };
    let mml = |out: usize, seed: u64| -> Result<SharedLayer> {
        Ok(ternary(matrix(out, WIDTH, seed).view())?.with_norm(Some(RmsNorm::default()))?.shared())
    };
    let config = GruConfig { units: WIDTH, fully_mml: true, num_heads: 4, sequence, ..GruConfig::default() };
    let gru = Gru::new(config.clone(), mml(3 * WIDTH, 5)?, None, mml(WIDTH, 6)?)?;
    let dense = |seed: u64| -> SharedLayer {
        let weight: Array2<f32> = matrix(WIDTH, WIDTH, seed) * 0.1;
        DenseLayer::from_f32(weight.view(), None).shared()
    };
    let mixed = GruConfig { fully_mml: false, ..config };
    let mixed = Gru::new(mixed, mml(2 * WIDTH, 5)?, Some(dense(7)), dense(8))?;
    let config = LruConfig { units: WIDTH, state_dim: WIDTH, fully_mml: true, sequence, ..LruConfig::default() };
    let layers = LruLayers {
        b_re: mml(WIDTH, 9)?,
        b_im: mml(WIDTH, 10)?,
        c_re: mml(WIDTH, 11)?,
        c_im: mml(WIDTH, 12)?,
        d: mml(WIDTH, 13)?,
    };
    let lru = Lru::new(config.clone(), LruSpectrum::initial(&config, 1)?, layers)?;
    Ok(BTreeMap::from([
        ("gru", Module::Gru(gru)),
        ("gru dense", Module::Gru(mixed)),
        ("lru", Module::Lru(Box::new(lru))),
    ]))
}
