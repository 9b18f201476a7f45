//! Scales of columns beside those of groups, so that what is rounded has rows and columns of like spread (SINQ).

use half::f16;
use ndarray::{Array2, ArrayView2, Axis};

/// Rounds of dividing by the spreads of columns and rows.
const ROUNDS: usize = 16;

/// A round divides by no less and by no more than this.
const STEP: (f32, f32) = (0.7, 2.0);

/// Scales `[columns]` for a weight `[rows, columns]`: the quotients by them are what is to be rounded.
///
/// Columns and rows are divided in turn by their standard deviations, relative to the least of all at first, until the
/// largest is no closer to the least (Sinkhorn's iteration, as in SINQ, algorithm 1). What rows are divided by is left to
/// their groups' scales. The scales are f16 numbers, and around 1.
pub fn column_scales(weight: ArrayView2<f32>) -> Vec<f32> {
    let mut rest = weight.to_owned();
    let mut scales = vec![1f32; weight.ncols()];
    let mut best = (f32::INFINITY, scales.clone());
    let least = |spreads: &[f32]| spreads.iter().copied().filter(|s| *s > 0.0).fold(f32::INFINITY, f32::min);
    let most = |spreads: &[f32]| spreads.iter().copied().fold(0f32, f32::max);
    let mut target = None;
    for _ in 0..ROUNDS {
        let (columns, rows) = (spreads(&rest, Axis(0)), spreads(&rest, Axis(1)));
        let (low, high) = (least(&columns).min(least(&rows)), most(&columns).max(most(&rows)));
        if !(low.is_finite() && high / low < best.0) {
            break;
        }
        best = (high / low, scales.clone());
        let target = *target.get_or_insert(low);
        // A row or a column of nothing stays as it is.
        let step = |spread: f32| if spread > 0.0 { (spread / target).clamp(STEP.0, STEP.1) } else { 1.0 };
        for (mut column, (scale, &spread)) in rest.columns_mut().into_iter().zip(scales.iter_mut().zip(&columns)) {
            *scale *= step(spread);
            column /= step(spread);
        }
        rest.rows_mut().into_iter().zip(&rows).for_each(|(mut row, &spread)| row /= step(spread));
    }
    let scales = best.1;
    let mean = scales.iter().map(|s| s.ln()).sum::<f32>() / scales.len().max(1) as f32;
    let even = |scale: &f32| f16::from_f32(scale / mean.exp()).clamp(f16::from_f32(1e-3), f16::from_f32(1e3)).to_f32();
    scales.iter().map(even).collect()
}

/// Standard deviations along an axis: of each column for rows, and the other way round.
fn spreads(matrix: &Array2<f32>, axis: Axis) -> Vec<f32> {
    if matrix.is_empty() { vec![] } else { matrix.std_axis(axis, 0.0).to_vec() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::relative_error;
    use crate::quant::{Clipping, PackedMatrix, WeightFormat};

    fn uneven(rows: usize, columns: usize) -> Array2<f32> {
        let mut state = 9u64;
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let wide = if j % 7 == 0 { 6.0 } else { 1.0 } * if i % 5 == 0 { 3.0 } else { 1.0 };
            ((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0) * wide
        })
    }

    #[test]
    fn wide_columns_get_larger_scales() {
        let weight = uneven(60, 128);
        let scales = column_scales(weight.view());
        let mean = |wide: bool| {
            let some: Vec<f32> =
                scales.iter().enumerate().filter(|(j, _)| (j % 7 == 0) == wide).map(|(_, s)| *s).collect();
            some.iter().sum::<f32>() / some.len() as f32
        };
        assert!(mean(true) > 4.0 * mean(false), "{} {}", mean(true), mean(false));
        // And so less is lost.
        let format = WeightFormat::default();
        let plain = PackedMatrix::quantize(weight.view(), format, Clipping::Mse, None).unwrap();
        let dual = PackedMatrix::quantize_dual(weight.view(), format, Clipping::Mse, None).unwrap();
        let error = |packed: &PackedMatrix| relative_error(packed.dequantize().view(), weight.view());
        assert!(error(&dual) < 0.8 * error(&plain), "{} {}", error(&dual), error(&plain));
    }

    #[test]
    fn nothing_is_left_as_it_is() {
        assert_eq!(column_scales(Array2::zeros((3, 4)).view()), vec![1.0; 4]);
        assert!(column_scales(Array2::zeros((0, 4)).view()).iter().all(|s| *s == 1.0));
        let mut one = Array2::zeros((3, 4));
        one[[1, 2]] = 5.0;
        assert!(column_scales(one.view()).iter().all(|s| s.is_finite() && *s > 0.0));
    }
}
