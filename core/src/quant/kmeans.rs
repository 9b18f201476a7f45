//! k-means over weighted rows, started by k-means++ from a seed: the same rows give the same centres.

use ndarray::{Array2, ArrayView2};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::nearest::nearest_rows;
use crate::linalg::unit_of_f32;

const ITERATIONS: usize = 25;

/// Returns the nearest row of a codebook, and its squared distance.
pub fn nearest(codebook: &Array2<f32>, point: &[f32]) -> (usize, f32) {
    let distance = |word: &[f32]| word.iter().zip(point).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
    let words = || codebook.as_slice().expect("standard layout").chunks(point.len().max(1));
    let found = words()
        .map(distance)
        .enumerate()
        .fold((0, f32::INFINITY), |best, (i, d)| if d < best.1 { (i, d) } else { best });
    if found.1.is_normal() {
        return found;
    }
    // Equal, or apart by so much or so little that f32 does not hold the square.
    let distance =
        |word: &[f32]| word.iter().zip(point).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>();
    let best = words()
        .map(distance)
        .enumerate()
        .fold((0, f64::INFINITY), |best, (i, d)| if d < best.1 { (i, d) } else { best });
    (best.0, best.1 as f32)
}

/// Lloyd's iterations from a k-means++ start. A codeword that loses all its points moves to the point that is worst off.
pub fn kmeans(points: ArrayView2<f32>, weights: &[f32], k: usize, seed: u64) -> Array2<f32> {
    if let Some(unit) = unit_of_f32(points.iter()) {
        // In units in which f32 holds squared distances.
        return kmeans((&points * (1.0 / unit)).view(), weights, k, seed) * unit;
    }
    let mut centres = spread_out(points, weights, k, seed);
    let width = points.ncols();
    let mut previous = f64::INFINITY;
    let mut codes = vec![0; points.nrows()];
    for _ in 0..ITERATIONS {
        let mut sums = Array2::<f64>::zeros((k, width));
        let mut counted = vec![0f64; k];
        let mut error = 0f64;
        let mut worst = (0, -1f64);
        nearest_rows(centres.view(), points, &mut codes);
        for (i, point) in points.rows().into_iter().enumerate() {
            let (weight, centre) = (f64::from(weights[i]), codes[i] as usize);
            let distance: f32 = point.iter().zip(centres.row(centre)).map(|(a, b)| (a - b) * (a - b)).sum();
            let cost = f64::from(distance) * weight;
            error += cost;
            if cost > worst.1 {
                worst = (i, cost);
            }
            counted[centre] += weight;
            sums.row_mut(centre).iter_mut().zip(point).for_each(|(s, v)| *s += weight * f64::from(*v));
        }
        for (c, count) in counted.iter().enumerate() {
            if *count > 0.0 {
                centres.row_mut(c).iter_mut().zip(sums.row(c)).for_each(|(m, s)| *m = (s / count) as f32);
            } else if worst.1 > 0.0 {
                centres.row_mut(c).assign(&points.row(worst.0));
                worst.1 = 0.0;
            }
        }
        if error >= previous * (1.0 - 1e-4) {
            break;
        }
        previous = error;
    }
    centres
}

/// k-means++: each further centre is a point, chosen by how much its distance to the nearest so far costs.
fn spread_out(points: ArrayView2<f32>, weights: &[f32], k: usize, seed: u64) -> Array2<f32> {
    let count = points.nrows();
    let mut chance = ChaCha8Rng::seed_from_u64(seed);
    let mut centres = Array2::zeros((k, points.ncols()));
    let mut costs = vec![f64::INFINITY; count];
    let mut chosen = (chance.next_u64() % count.max(1) as u64) as usize;
    for c in 0..k {
        centres.row_mut(c).assign(&points.row(chosen));
        for (i, cost) in costs.iter_mut().enumerate() {
            let distance: f32 = points.row(i).iter().zip(points.row(chosen)).map(|(a, b)| (a - b) * (a - b)).sum();
            *cost = cost.min(f64::from(distance) * f64::from(weights[i]));
        }
        let mut left = costs.iter().sum::<f64>() * (chance.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let within = |cost: &f64| {
            left -= cost;
            left < 0.0
        };
        // Where every point is a centre already, the rest repeat the first.
        chosen = costs.iter().position(within).unwrap_or(0);
    }
    centres
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::normal_matrix;

    /// Points of any size fall into the same clusters.
    #[test]
    fn sizes_do_not_matter() {
        let points = normal_matrix(60, 3, 1).mapv(|v| v as f32);
        let clusters = |scale: f32| {
            let points = &points * scale;
            let centres = kmeans(points.view(), &[1.0; 60], 5, 7);
            let mut codes = vec![0; 60];
            nearest_rows(centres.view(), points.view(), &mut codes);
            let own: Vec<u32> =
                points.rows().into_iter().map(|point| nearest(&centres, &point.to_vec()).0 as u32).collect();
            assert_eq!(own, codes, "{scale}");
            (centres / scale, codes)
        };
        let plain = clusters(1.0);
        for power in [-100, -70, 70, 100] {
            assert_eq!(clusters(2f32.powi(power)), plain, "2^{power}");
        }
    }
}
