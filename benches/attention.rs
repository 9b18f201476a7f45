//! Attention: exact, and by codes, over lengths. `make bench`, or `cargo bench --bench attention`; arguments are lengths
//! (`cargo bench --bench attention -- 4096 65536`).
//!
//! One sequence of clustered queries and keys, as trained attention has them; scores of codes are found in the times. The
//! rate is of multiply-adds of visible pairs, beside that of a matrix product of faer's (2048 × 2048 × 2048) in the same
//! run; errors are relative, against exact attention. Times are medians of three, or single ones above a second.

mod dense;

use std::hint::black_box;
use std::time::Instant;

use layerstore::attention::{Codebook, Past, Quantized, Visible, exact};
use layerstore::linalg::matmul;
use ndarray::{Array2, Array4, ArrayView4, s};

use dense::matrix;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const CODES: usize = 512;

const BLOCK: usize = 128;

/// Beyond this exact attention is not run.
const EXACT_UP_TO: usize = 16_384;

fn main() -> Result<()> {
    // `cargo test` also runs bench targets: measuring is for `cargo bench` alone.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    let named: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    let lengths = if named.is_empty() { (10..=18).step_by(2).map(|p| 1 << p).collect() } else { named };
    let (a, b) = (matrix(2048, 2048, 1), matrix(2048, 2048, 2));
    let rate = 2048f64.powi(3) / seconds(|| black_box(matmul(black_box(a.view()), b.view())));
    println!("matrix product: {:.1} GFLOP/s", 2e-9 * rate);
    println!(
        "heads dim causal   tokens | exact ms   of product | by codes ms  ns/token   error | K only ms  ns/token   error"
    );
    for (heads, dim) in [(1, 64), (8, 64), (1, 128)] {
        for causal in [false, true] {
            for &tokens in &lengths {
                row(heads, dim, causal, tokens, rate)?;
            }
        }
    }
    Ok(())
}

fn seconds<T>(mut run: impl FnMut() -> T) -> f64 {
    let mut times = vec![];
    while times.len() < 3 && times.first().is_none_or(|first| *first < 1.0) {
        let started = Instant::now();
        black_box(run());
        times.push(started.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// 64 clusters for all heads, noise of 0.3 around them.
fn clustered(heads: usize, tokens: usize, dim: usize, seed: u64) -> Array4<f32> {
    let centres = matrix(64, dim, 99) * 1.7;
    let noise = matrix(heads * tokens, dim, seed) * 0.5;
    Array4::from_shape_fn((1, heads, tokens, dim), |(_, h, t, d)| {
        let cluster = (h * tokens + t).wrapping_mul(2_654_435_761 + seed as usize) >> 7;
        centres[[cluster % 64, d]] + noise[[h * tokens + t, d]]
    })
}

fn book(x: ArrayView4<f32>) -> Result<Codebook> {
    let step = (x.dim().2 / 4096).max(1);
    let some = x.slice(s![0, .., ..;step, ..]);
    Ok(Codebook::by_kmeans(some, CODES.min(some.dim().1), 0)?)
}

fn row(heads: usize, dim: usize, causal: bool, tokens: usize, rate: f64) -> Result<()> {
    let (q, k) = (clustered(heads, tokens, dim, 1), clustered(heads, tokens, dim, 2));
    let v =
        Array4::from_shape_vec((1, heads, tokens, dim), matrix(heads * tokens, dim, 3).into_raw_vec_and_offset().0)?;
    let scale = 1.0 / (dim as f32).sqrt();
    let (of_queries, of_keys) = (book(q.view())?, book(k.view())?);
    let visible = Visible { causal, ..Visible::default() };
    let (mut reference, mut line) = (None, format!("{heads:>5} {dim:>3} {causal:>6} {tokens:>8} |"));
    if tokens <= EXACT_UP_TO {
        let time = seconds(|| exact(q.view(), k.view(), v.view(), scale, &visible));
        let pairs = (tokens * tokens) as f64 / if causal { 2.0 } else { 1.0 };
        line += &format!("{:>9.1} {:>11.2}× |", 1e3 * time, heads as f64 * pairs * 2.0 * dim as f64 / time / rate);
        reference = Some(exact(q.view(), k.view(), v.view(), scale, &visible)?.output);
    } else {
        line += &format!("{:>9} {:>12} |", "-", "-");
    }
    for queries in [Some(&of_queries), None] {
        let attention = Quantized::new(&of_keys, queries, scale, BLOCK);
        let run = || {
            if causal {
                let mut past = Past::new(1, heads, of_keys.codes(), dim);
                attention.causal(q.view(), k.view(), v.view(), &mut past)
            } else {
                attention.all(q.view(), k.view(), v.view(), &visible)
            }
        };
        let time = seconds(run);
        let error = match &reference {
            Some(exact) => {
                let flat = |x: &Array4<f32>| x.to_shape((heads * tokens, dim)).map(|x| x.to_owned());
                let (found, exact): (Array2<f32>, Array2<f32>) = (flat(&run()?.output)?, flat(exact)?);
                format!("{:.3}", layerstore::linalg::relative_error(found.view(), exact.view()))
            }
            None => "-".into(),
        };
        line += &format!("{:>12.1} {:>9.0} {error:>7} |", 1e3 * time, 1e9 * time / (heads * tokens) as f64);
    }
    println!("{}", line.trim_end_matches(" |"));
    Ok(())
}
