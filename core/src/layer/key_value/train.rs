//! Training through a key–value layer: its gradients, and its keys after the weight has changed.

use ndarray::{Array2, ArrayView1, ArrayView2, Axis};

use super::build::{Components, Inputs, standardized};
use super::layer::KeyValueLayer;
use super::search::SelectLimit;
use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::layer::check::check_inputs;
use crate::layer::traits::Layer;
use crate::linalg::{matmul, matmul_f64, matmul_nt, spectral_norm_bound};

/// How [`KeyValueLayer::refit`] brought a layer up to date with its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refit {
    /// The values stayed as they were, and the keys were computed anew: one matrix product.
    Keys,
    /// The weight was factored anew.
    Factored,
}

/// The share of the weight's norm, as the inputs see it, that may lie outside the values' span before the weight is
/// factored anew.
const LOST: f64 = 1e-3;

impl KeyValueLayer {
    /// Returns the gradients with respect to the input and the weight, for checked `x` and `grad_output`.
    pub(super) fn input_and_weight_gradients(
        &self,
        x: ArrayView2<f32>,
        grad_output: ArrayView2<f32>,
    ) -> (Array2<f32>, Array2<f32>) {
        let core = &*self.core;
        let values = self.values();
        // ⟨u_i, g⟩, of every key or of each row's hits.
        let mut on_values = matmul_nt(grad_output, values.view());
        let through = self.settings.use_straight_through_estimator || !self.settings.use_approximate_inference;
        let weight = if through {
            matmul(grad_output.t(), x)
        } else {
            let centred = &x - &core.mean;
            let answers = core.answers(centred.view(), &self.settings, self.limit());
            for (answer, mut row) in answers.iter().zip(on_values.rows_mut()) {
                let mut kept = vec![0f32; row.len()];
                answer.hits.iter().for_each(|hit| kept[hit.key as usize] = row[hit.key as usize]);
                row.assign(&ArrayView1::from(&kept));
            }
            let projected = matmul(on_values.view(), values.view());
            let on_mean = matmul(
                grad_output.sum_axis(Axis(0)).view().insert_axis(Axis(1)),
                core.mean.view().insert_axis(Axis(0)),
            );
            matmul(projected.t(), centred.view()) + on_mean
        };
        on_values *= &ArrayView1::from(&core.scales);
        // As contributions are computed: from float keys where there are any, in a search those near its threshold or above.
        let floats = through || matches!(self.limit(), SelectLimit::Threshold(_));
        let keys = if floats { self.full_keys() } else { self.keys() };
        (matmul(on_values.view(), keys.view()), weight)
    }

    /// Returns the layer for another weight `[out_features, in_features]` and bias, as after a step of training. `calibration`
    /// is of inputs as they were for this one; without, mean 0 and covariance I are assumed, and thresholds are those of standard
    /// normal scores.
    ///
    /// The values stay as they are while they span the new weight to a thousandth of its norm, as the inputs see it:
    /// uᵢᵀW are the new keys then. Otherwise, and where values are not f32, the weight is factored anew.
    ///
    /// # Errors
    /// When a shape is another, a number is not finite, or a factorisation fails.
    pub fn refit(
        &self,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<&Calibration>,
    ) -> Result<(Self, Refit)> {
        let shape = (self.out_features(), self.in_features());
        if weight.dim() != shape {
            return Err(Error::expected(
                "shape of the new weight",
                format!("{:?}", weight.dim()),
                format!("{shape:?}, the layer's"),
            ));
        }
        check_inputs(weight, bias, calibration)?;
        let config = self.key_value_config();
        let Some(values) = self.core.values.floats() else {
            return Ok((Self::build(&config, weight, bias, calibration)?, Refit::Factored));
        };
        let statistics = Inputs::new(&config, shape.1, calibration)?;
        let (w, values) = (weight.mapv(f64::from), values.mapv(f64::from));
        let keys = matmul_f64(values.view(), w.view());
        let lost = &w - &matmul_f64(values.t(), keys.view());
        let size = |m: &Array2<f64>| match &statistics.factor {
            Some(l) => matmul_f64(m.view(), l.view()).iter().map(|v| v * v).sum::<f64>().sqrt(),
            None => m.iter().map(|v| v * v).sum::<f64>().sqrt(),
        };
        if size(&lost) > LOST * size(&w) {
            return Ok((Self::build(&config, weight, bias, calibration)?, Refit::Factored));
        }
        let (keys, scales) = standardized(keys, &statistics);
        let truncation = spectral_norm_bound(lost.view());
        let components = Components { keys, scales, values, truncation };
        Ok((Self::assemble(&config, weight, bias, &statistics, components, calibration)?, Refit::Keys))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{Accuracy, KeyValueConfig, compress};
    use crate::linalg::relative_error;

    fn sample(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
        let cell = |i: usize, j: usize| ((i * 7919 + j * 104_729 + seed * 31) % 1009) as f32 / 500.0 - 1.0;
        Array2::from_shape_fn((rows, columns), |(i, j)| cell(i, j))
    }

    #[test]
    fn refits_keep_the_values_while_they_span_the_weight() {
        let (w, x) = (sample(6, 9, 1), sample(50, 9, 2));
        let config = KeyValueConfig { expected_keys_per_query: Some(3.0), ..KeyValueConfig::default() };
        let calibration = Calibration::of(x.clone()).unwrap();
        let built = |w: &Array2<f32>, x: Option<&Calibration>| compress(&config, w.view(), None, x).unwrap();
        let close = |layer: &KeyValueLayer, w: &Array2<f32>| {
            let layer = layer.clone().shared();
            let exact = x.dot(&w.t());
            let full = layer.forward(x.view(), Accuracy::Full).unwrap();
            assert!(relative_error(full.y.view(), exact.view()) < 2e-3);
            let few = layer.forward(x.view(), Accuracy::Approximate).unwrap();
            for ((y, e), bound) in
                few.y.rows().into_iter().zip(exact.rows()).zip(std::iter::repeat(few.relative_error_bound))
            {
                let error = (&y - &e).mapv(|v| v * v).sum().sqrt() / e.mapv(|v| v * v).sum().sqrt();
                assert!(f64::from(error) <= bound.unwrap());
            }
        };
        for inputs in [Some(&calibration), None] {
            let layer = built(&w, inputs);
            // Fewer outputs than inputs: six orthonormal values span any weight.
            let changed = &w + &(sample(6, 9, 5) * 0.05);
            let (refitted, how) = layer.refit(changed.view(), None, inputs).unwrap();
            assert_eq!(how, Refit::Keys);
            close(&refitted, &changed);
            assert_eq!(refitted.values(), layer.values());
            assert_eq!(refitted.settings(), layer.settings());
        }
        // More outputs than inputs: a change that leaves the span is factored.
        let (w, calibration) = (sample(9, 4, 1), Calibration::of(sample(50, 4, 2)).unwrap());
        let layer = built(&w, Some(&calibration));
        let (same, how) = layer.refit((&w * 1.5).view(), None, Some(&calibration)).unwrap();
        assert_eq!(how, Refit::Keys);
        assert!((same.scales()[0] / layer.scales()[0] - 1.5).abs() < 1e-4);
        let other = sample(9, 4, 7);
        let (anew, how) = layer.refit(other.view(), None, Some(&calibration)).unwrap();
        assert_eq!(how, Refit::Factored);
        assert!(relative_error(anew.shared().weight().unwrap().view(), other.view()) < 1e-5);
        assert!(layer.refit(sample(9, 5, 7).view(), None, None).is_err());
    }
}
