//! The scale and zero point of a group of weights.

use super::format::WeightFormat;
use super::half_quadratic::half_quadratic;
use super::quantizer::{Clipping, QuantParams, Quantizer};

/// Numbers that are added up as f32 before they are f64: there are many where a tensor has one scale.
const PART: usize = 256;

/// Times that a scale is then fitted to its codes.
const FITS: usize = 3;

impl WeightFormat {
    /// Returns the parameters for a group of weights, with a scale as it is stored.
    pub(super) fn fit(
        &self,
        quantizer: &dyn Quantizer,
        weights: &[f32],
        importance: &[f32],
        clipping: Clipping,
    ) -> QuantParams {
        let stored = |params: QuantParams| QuantParams { scale: self.stored_scale(params.scale), ..params };
        let candidates = quantizer.candidates(weights, clipping);
        let mut best = stored(candidates[0]);
        match clipping {
            Clipping::Mse => {}
            Clipping::Hqq => return half_quadratic(self, quantizer, weights, best),
            Clipping::Absmax | Clipping::Absmean | Clipping::Percentile(_) => return best,
        }
        let mut rounded = vec![0f32; weights.len()];
        let mut error = |params: QuantParams| {
            quantizer.round(params, weights, &mut rounded);
            let parts = weights.chunks(PART).zip(rounded.chunks(PART)).zip(importance.chunks(PART));
            let sums = parts.map(|((weights, rounded), importance)| {
                let (mut error, mut across, mut square) = (0f32, 0f32, 0f32);
                for ((&w, &r), &i) in weights.iter().zip(rounded).zip(importance) {
                    error += i * (r - w) * (r - w);
                    across += i * r * w;
                    square += i * r * r;
                }
                [error, across, square].map(f64::from)
            });
            let [error, across, square] = sums.fold([0f64; 3], |a, b| std::array::from_fn(|i| a[i] + b[i]));
            (error, (across / square) as f32)
        };
        let (mut least, mut factor) = (f64::INFINITY, 1.0);
        for params in candidates {
            let params = stored(params);
            let (found, fitting) = error(params);
            if found < least {
                (best, least, factor) = (params, found, fitting);
            }
        }
        // The scale that is best for the codes, then the codes for that scale, while it gains.
        for _ in 0..FITS {
            let params = stored(QuantParams { scale: best.scale * factor, ..best });
            if !(factor > 0.0 && params.scale.is_finite()) {
                break;
            }
            let (found, fitting) = error(params);
            if found >= least || found.is_nan() {
                break;
            }
            (best, least, factor) = (params, found, fitting);
        }
        best
    }
}
