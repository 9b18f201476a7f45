//! The standard normal distribution, accurate in both tails, and numbers drawn from it.

use std::f64::consts::{PI, SQRT_2};

use ndarray::Array2;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Returns the density at `x`.
pub fn normal_pdf(x: f64) -> f64 {
    (-0.5 * x * x).exp() / (2.0 * PI).sqrt()
}

/// Returns P(X ≤ x).
pub fn normal_cdf(x: f64) -> f64 {
    0.5 * libm::erfc(-x / SQRT_2)
}

/// Returns P(X > x), which keeps its relative accuracy where `1 − cdf` would lose it.
pub fn normal_survival(x: f64) -> f64 {
    0.5 * libm::erfc(x / SQRT_2)
}

/// Returns the x with P(X ≤ x) = `p`: −∞ at 0, +∞ at 1, NaN outside `[0, 1]`.
///
/// A rational start (Abramowitz and Stegun 26.2.23, error below 4.5e-4) polished by Halley steps on the tail's own
/// probability, so that the relative accuracy of the tail is kept.
pub fn normal_quantile(p: f64) -> f64 {
    if !(0.0..=1.0).contains(&p) {
        return f64::NAN;
    }
    if p == 0.5 {
        return 0.0;
    }
    let (tail, sign) = if p < 0.5 { (p, -1.0) } else { (1.0 - p, 1.0) };
    if tail == 0.0 {
        return sign * f64::INFINITY;
    }
    let t = (-2.0 * tail.ln()).sqrt();
    let mut x =
        t - (2.515_517 + t * (0.802_853 + t * 0.010_328)) / (1.0 + t * (1.432_788 + t * (0.189_269 + t * 0.001_308)));
    for _ in 0..4 {
        let density = normal_pdf(x);
        if density == 0.0 {
            break;
        }
        let step = (normal_survival(x) - tail) / density;
        // Halley: f = Q(x) − tail, f' = −φ, f'' = x φ.
        x += step / (1.0 + 0.5 * x * step);
    }
    sign * x
}

/// Draws independent standard normal numbers, always the same for a seed.
pub fn normal_matrix(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    // Above 0, for the logarithm.
    let mut uniform = || ((random.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64;
    let mut numbers = vec![0f64; rows * columns];
    for pair in numbers.chunks_mut(2) {
        // Box and Muller's pairs.
        let (length, angle) = ((-2.0 * uniform().ln()).sqrt(), std::f64::consts::TAU * uniform());
        pair.iter_mut().zip([angle.cos(), angle.sin()]).for_each(|(number, part)| *number = length * part);
    }
    Array2::from_shape_vec((rows, columns), numbers).expect("as many as the shape has")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_values() {
        for (p, x) in
            [(0.975, 1.959_963_984_540_054), (0.5, 0.0), (1e-12, -7.034_483_825_301_1), (0.841_344_746_068_542_9, 1.0)]
        {
            assert!((normal_quantile(p) - x).abs() < 1e-9, "{p}: {}", normal_quantile(p));
        }
        assert_eq!(normal_quantile(0.0), f64::NEG_INFINITY);
        assert_eq!(normal_quantile(1.0), f64::INFINITY);
        assert!(normal_quantile(1.5).is_nan() && normal_quantile(f64::NAN).is_nan());
        assert!((normal_pdf(0.0) - 0.398_942_280_401_432_7).abs() < 1e-15);
    }

    proptest! {
        #[test]
        fn quantile_inverts_the_distribution(x in -8.0f64..8.0) {
            let p = normal_cdf(x);
            // Near 1 the probability itself has no more digits to give.
            let tolerance = 1e-9 + 4.0 * f64::EPSILON * p / normal_pdf(x);
            prop_assert!((normal_quantile(p) - x).abs() < tolerance);
            prop_assert!((normal_cdf(x) + normal_survival(x) - 1.0).abs() < 1e-15);
        }
    }
}
