mod codes;
mod exact;
mod gradients;
mod hyper;

use ndarray::{Array3, Array4, ArrayView1, Axis, s};

use super::*;

fn sample(shape: (usize, usize, usize, usize), seed: u64) -> Array4<f32> {
    let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    Array4::from_shape_simple_fn(shape, || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

/// By the definition, in f64.
fn naive(
    q: &Array4<f32>,
    k: &Array4<f32>,
    v: &Array4<f32>,
    scale: f32,
    mask: &AttentionMask,
) -> (Array4<f64>, Array3<f64>) {
    let shared = q.dim().1 / k.dim().1;
    weighed(q, v, |b, h, i, j| {
        let sees = (!mask.causal || j + q.dim().2 <= i + k.dim().2)
            && mask.keys.is_none_or(|there| there[[b, j]])
            && mask.segments.is_none_or(|(q, k)| q[[b, i]] == k[[b, j]]);
        let (q, k) = (q.slice(s![b, h, i, ..]), k.slice(s![b, h / shared, j, ..]));
        sees.then(|| f64::from(scale) * dot(q, k))
    })
}

fn dot(a: ArrayView1<f32>, b: ArrayView1<f32>) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// The values weighed by the softmax of the scores of batch, head, query and key, where there are any.
fn weighed(
    q: &Array4<f32>,
    v: &Array4<f32>,
    score: impl Fn(usize, usize, usize, usize) -> Option<f64>,
) -> (Array4<f64>, Array3<f64>) {
    let (batch, heads, queries, _) = q.dim();
    let shared = heads / v.dim().1;
    let mut output = Array4::zeros((batch, heads, queries, v.dim().3));
    let mut lse = Array3::from_elem((batch, heads, queries), f64::NEG_INFINITY);
    for ((b, h, i), lse) in lse.indexed_iter_mut() {
        let seen: Vec<(usize, f64)> =
            (0..v.dim().2).filter_map(|j| score(b, h, i, j).map(|score| (j, score))).collect();
        let most = seen.iter().fold(f64::NEG_INFINITY, |most, (_, score)| most.max(*score));
        let sum: f64 = seen.iter().map(|(_, score)| (score - most).exp()).sum();
        if seen.is_empty() {
            continue;
        }
        *lse = most + sum.ln();
        for (j, score) in seen {
            let weight = (score - most).exp() / sum;
            let value = v.slice(s![b, h / shared, j, ..]);
            output.slice_mut(s![b, h, i, ..]).zip_mut_with(&value, |o, v| *o += weight * f64::from(*v));
        }
    }
    (output, lse)
}

fn three(shape: (usize, usize, usize), seed: u64) -> Array3<f32> {
    let all = sample((1, shape.0, shape.1, shape.2), seed);
    all.index_axis_move(Axis(0), 0)
}

/// How far the outputs and log-sum-exps are off, at most.
fn off(found: &AttentionOutput, expected: &(Array4<f64>, Array3<f64>)) -> f64 {
    let pairs = found.output.iter().zip(&expected.0).chain(found.log_sum_exp.iter().zip(&expected.1));
    pairs.map(|(f, e)| if f64::from(*f) == *e { 0.0 } else { (f64::from(*f) - e).abs() }).fold(0.0, f64::max)
}
