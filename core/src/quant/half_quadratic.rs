//! Scales and zero points that leave few large errors rather than a small sum of squares (HQQ: half-quadratic
//! quantisation, Badri and Shaji 2023), without calibration.
//!
//! Σ|w − ŵ|^p, p < 1, is made smaller in turns: an error e that is taken to be there anyway, by shrinkage of w − ŵ; then
//! the zero point and the scale that are best for w − e, codes as they are. HQQ keeps zero points as floats and the scale
//! as it is; here zero points are whole numbers, as they are stored, and the scale is fitted, too.

use super::format::WeightFormat;
use super::quantizer::{QuantParams, Quantizer};

/// The p of the norm.
const NORM: f32 = 0.7;

/// Turns at most.
const TURNS: usize = 20;

/// How much an error has to gain to be taken as one, in steps of the scale, and how that grows with each turn.
const SHARPNESS: (f32, f32) = (1.0, 1.1);

/// Returns the parameters that leave the least Σ|w − ŵ|^p of those that the turns come by, from this one on.
pub fn half_quadratic(
    format: &WeightFormat,
    quantizer: &dyn Quantizer,
    weights: &[f32],
    start: QuantParams,
) -> QuantParams {
    let top = f32::from(((1u16 << format.weight_type.bits()) - 1) as u8);
    let mut rounded = vec![0f32; weights.len()];
    let (mut params, mut best, mut least) = (start, start, f32::INFINITY);
    let mut sharpness = SHARPNESS.0;
    for _ in 0..TURNS {
        quantizer.round(params, weights, &mut rounded);
        let norm: f32 = weights.iter().zip(&rounded).map(|(w, r)| (w - r).abs().powf(NORM)).sum();
        if norm >= least || norm.is_nan() {
            break;
        }
        (best, least) = (params, norm);
        let anyway = |error: f32| {
            let steps = (error / params.scale).abs();
            // Infinite, and so 0 in the end, for no error at all.
            let shrunk = (steps - steps.powf(NORM - 1.0) / sharpness).max(0.0);
            (shrunk * params.scale).copysign(error)
        };
        let (mut shift, mut across, mut square) = (0f32, 0f32, 0f32);
        for (&w, &r) in weights.iter().zip(&rounded) {
            let wanted = w - anyway(w - r);
            shift += (r - wanted) / params.scale;
        }
        let mut zero = params.zero;
        if format.has_zeros() {
            zero = (f32::from(zero) + shift / weights.len().max(1) as f32).round_ties_even().clamp(0.0, top) as u8;
        }
        quantizer.round(QuantParams { zero, ..params }, weights, &mut rounded);
        for (&w, &r) in weights.iter().zip(&rounded) {
            across += (w - anyway(w - r)) * r;
            square += r * r;
        }
        let scale = format.stored_scale(params.scale * across / square);
        if !(scale.is_finite() && scale > 0.0) {
            break;
        }
        params = QuantParams { scale, zero };
        sharpness *= SHARPNESS.1;
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Clipping, Group, ScaleType, WeightType};
    use proptest::prelude::*;

    proptest! {
        /// Never worse than where it starts from, by its own measure; and it comes to an end.
        #[test]
        fn no_worse_than_the_start(
            values in proptest::collection::vec(-3f32..3.0, 1..80),
            bits in 2u8..9,
            symmetric in any::<bool>(),
            nf4 in any::<bool>(),
        ) {
            let weight_type = if nf4 { WeightType::Nf4 } else { WeightType::Int(bits) };
            let format = WeightFormat { weight_type, group: Group::Channel, symmetric, minimum: false, scales: ScaleType::F16 };
            let quantizer = format.quantizer().unwrap();
            let ones = vec![1.0; values.len()];
            let norm = |params: QuantParams| {
                let mut rounded = vec![0.0; values.len()];
                quantizer.round(params, &values, &mut rounded);
                values.iter().zip(&rounded).map(|(w, r)| (w - r).abs().powf(NORM)).sum::<f32>()
            };
            let plain = format.fit(&*quantizer, &values, &ones, Clipping::Absmax);
            let found = format.fit(&*quantizer, &values, &ones, Clipping::Hqq);
            prop_assert!(norm(found) <= norm(plain) * 1.0001);
            prop_assert_eq!(found.scale, format.stored_scale(found.scale));
        }
    }

    /// One weight far out does not widen everybody's steps.
    #[test]
    fn an_outlier_is_given_up() {
        let mut weights: Vec<f32> = (0..63).map(|i| (i as f32 * 0.7).sin()).collect();
        weights.push(9.0);
        let format = WeightFormat { weight_type: WeightType::Int(3), ..WeightFormat::default() };
        let quantizer = format.quantizer().unwrap();
        let ones = vec![1.0; 64];
        let scale = |clipping| format.fit(&*quantizer, &weights, &ones, clipping).scale;
        assert!(scale(Clipping::Hqq) < scale(Clipping::Absmax), "{} {}", scale(Clipping::Hqq), scale(Clipping::Absmax));
    }
}
