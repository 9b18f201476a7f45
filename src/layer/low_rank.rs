//! Quantised weights, and a low-rank correction of what quantising lost: `y = Ŵ x + A (B x) + b`.
//!
//! E = W − Ŵ. With TᵀT = R, SVD(E Tᵀ) = U S Vᵀ, A = U_k S_k and B = V_kᵀ T⁻ᵀ minimise the output error for inputs whose
//! second moment is R. `identity` takes T = I (LQER); `exact` takes R = E[x xᵀ] with a ridge, and its Cholesky factor
//! (QERA-exact); it also weighs rounding errors by E[x_j²] where a group looks for its scale.

use std::sync::Arc;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::parts::{Factor, Parts, Side, Tensor, WeightRows, bytes_f32, f32_bytes};
use super::{Method, read_config, require_finite};
use crate::error::{Error, Result};
use crate::linalg::{Moments, Ridge, cholesky, leading_svd, matmul, matmul_f64, matmul_nt, solve_lower_transposed};
use crate::quant::{IntegerFormat, PackedMatrix};

/// Rows dequantised at a time in a forward pass: a few hundred KiB, so that the weight is never whole in memory.
const BLOCK_ROWS: usize = 64;

/// Which inputs the correction is the best one for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scaling {
    /// All directions alike: the weight's own error (LQER).
    #[default]
    Identity,
    /// The calibration inputs' second moment (QERA-exact).
    Exact,
}

/// Settings that a rule gives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LowRankConfig {
    #[serde(default)]
    pub weight: IntegerFormat,
    /// Components of the correction; 0 for none.
    #[serde(default = "default_rank")]
    pub rank: usize,
    #[serde(default)]
    pub scaling: Scaling,
    /// Added to the second moment's diagonal as it is.
    #[serde(default)]
    pub ridge_regularization: f64,
    /// Added to the second moment's diagonal, times the diagonal's mean.
    #[serde(default = "default_ridge_relative")]
    pub ridge_relative: f64,
}

impl Default for LowRankConfig {
    fn default() -> Self {
        LowRankConfig {
            weight: IntegerFormat::default(),
            rank: default_rank(),
            scaling: Scaling::default(),
            ridge_regularization: 0.0,
            ridge_relative: default_ridge_relative(),
        }
    }
}

impl LowRankConfig {
    /// What is added to the second moment.
    pub fn ridge(&self) -> Ridge {
        Ridge { absolute: self.ridge_regularization, relative: self.ridge_relative }
    }

    /// Checks the settings by themselves.
    ///
    /// # Errors
    /// When a number is out of its range.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in
            [("ridge_regularization", self.ridge_regularization), ("ridge_relative", self.ridge_relative)]
        {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::expected(name, value, "a number of at least 0"));
            }
        }
        Ok(())
    }

    pub(super) fn check(&self, out_features: usize, in_features: usize, calibrated: bool) -> Result<()> {
        let largest = out_features.min(in_features);
        if largest == 0 {
            return Err(Error::expected(
                "shape of a low-rank layer",
                format!("{out_features} × {in_features}"),
                "at least 1 × 1",
            ));
        }
        self.weight.group_size(in_features)?;
        if self.rank > largest {
            return Err(Error::expected(
                "rank",
                self.rank,
                format!("at most {largest} for a {out_features} × {in_features} layer"),
            ));
        }
        if self.scaling == Scaling::Exact && !calibrated {
            return Err(Error::expected(
                "calibration inputs for scaling = \"exact\"",
                "none",
                format!("[tokens, {in_features}] for this layer"),
            ));
        }
        Ok(())
    }
}

/// A low-rank layer.
#[derive(Debug, Clone)]
pub struct LowRankLayer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: StoredConfig,
    weight: PackedMatrix,
    /// Columns of A as rows, `[rank, out]`.
    a: Array2<f32>,
    /// `[rank, in]`.
    b: Array2<f32>,
    singular_values: Vec<f32>,
    bias: Option<Array1<f32>>,
}

/// The settings that the arrays depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct StoredConfig {
    #[serde(flatten)]
    settings: Settings,
    in_features: usize,
    out_features: usize,
}

/// [`LowRankConfig`] without its refusal of unknown names, which cannot be flattened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Settings {
    weight: IntegerFormat,
    rank: usize,
    scaling: Scaling,
    ridge_regularization: f64,
    ridge_relative: f64,
}

impl LowRankLayer {
    /// Quantises `weight` `[out, in]` and corrects it. Settings and shapes have been checked.
    pub(super) fn build(
        config: &LowRankConfig,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<ArrayView2<f32>>,
    ) -> Result<Self> {
        let (out_features, in_features) = weight.dim();
        let second = match (config.scaling, calibration) {
            (Scaling::Exact, Some(inputs)) => Some(config.ridge().added_to(Moments::of(inputs)?.second)),
            _ => None,
        };
        let importance = second.as_ref().map(|r| r.diag().to_vec());
        let packed = PackedMatrix::quantize_for(weight, config.weight, importance.as_deref())?;
        let error = weight.mapv(f64::from) - packed.dequantize().mapv(f64::from);
        let (a, b, singular) = correction(&error, config.rank, second.as_ref())?;
        let settings = Settings {
            weight: config.weight,
            rank: config.rank,
            scaling: config.scaling,
            ridge_regularization: config.ridge_regularization,
            ridge_relative: config.ridge_relative,
        };
        Self::new(
            StoredConfig { settings, in_features, out_features },
            packed,
            a,
            b,
            singular,
            bias.map(|b| b.to_owned()),
        )
    }

    fn new(
        config: StoredConfig,
        weight: PackedMatrix,
        a: Array2<f32>,
        b: Array2<f32>,
        singular_values: Vec<f32>,
        bias: Option<Array1<f32>>,
    ) -> Result<Self> {
        let (rank, outputs, inputs) = (config.settings.rank, config.out_features, config.in_features);
        let found = [
            weight.rows,
            weight.columns,
            a.nrows(),
            a.ncols(),
            b.nrows(),
            b.ncols(),
            singular_values.len(),
            bias.as_ref().map_or(outputs, |b| b.len()),
        ];
        let expected = [outputs, inputs, rank, outputs, rank, inputs, rank, outputs];
        if found != expected {
            return Err(Error::expected(
                "lengths of weight, factors and bias",
                format!("{found:?}"),
                format!("{expected:?}"),
            ));
        }
        require_finite("the factors", a.iter().chain(b.iter()))?;
        Ok(LowRankLayer { inner: Arc::new(Inner { config, weight, a, b, singular_values, bias }) })
    }

    /// Length of an output row.
    pub fn out_features(&self) -> usize {
        self.inner.config.out_features
    }

    /// Length of an input row.
    pub fn in_features(&self) -> usize {
        self.inner.config.in_features
    }

    /// The quantised weight, without its correction.
    pub fn quantized(&self) -> &PackedMatrix {
        &self.inner.weight
    }

    /// The correction: columns of A as rows `[rank, out]`, and B `[rank, in]`.
    pub fn factors(&self) -> (ArrayView2<'_, f32>, ArrayView2<'_, f32>) {
        (self.inner.a.view(), self.inner.b.view())
    }

    pub(super) fn config(&self) -> Value {
        json!(self.inner.config)
    }

    pub(super) fn bias(&self) -> Option<&Array1<f32>> {
        self.inner.bias.as_ref()
    }

    /// `x · (Ŵ + A B)ᵀ` for a checked `x`, a block of rows dequantised at a time.
    pub(super) fn linear(&self, x: ArrayView2<f32>) -> Array2<f32> {
        let inner = &*self.inner;
        let mut y = matmul(matmul_nt(x, inner.b.view()).view(), inner.a.view());
        let mut block = Array2::zeros((BLOCK_ROWS, inner.weight.columns));
        for start in (0..inner.weight.rows).step_by(BLOCK_ROWS) {
            let end = (start + BLOCK_ROWS).min(inner.weight.rows);
            for row in start..end {
                let mut target = block.row_mut(row - start);
                inner.weight.dequantize_row(row, target.as_slice_mut().expect("rows of an owned array are contiguous"));
            }
            let part = matmul_nt(x, block.slice(s![..end - start, ..]));
            let mut target = y.slice_mut(s![.., start..end]);
            target += &part;
        }
        y
    }

    /// `grad_output · Ŵ`, a block of rows dequantised at a time.
    pub(super) fn quantized_backward(&self, grad_output: ArrayView2<f32>) -> Array2<f32> {
        let weight = &self.inner.weight;
        let mut input = Array2::zeros((grad_output.nrows(), weight.columns));
        let mut block = Array2::zeros((BLOCK_ROWS, weight.columns));
        for start in (0..weight.rows).step_by(BLOCK_ROWS) {
            let end = (start + BLOCK_ROWS).min(weight.rows);
            for row in start..end {
                let mut target = block.row_mut(row - start);
                weight.dequantize_row(row, target.as_slice_mut().expect("rows of an owned array are contiguous"));
            }
            input += &matmul(grad_output.slice(s![.., start..end]), block.slice(s![..end - start, ..]));
        }
        input
    }

    /// Ŵ + A B, `[out, in]`.
    pub(super) fn weight(&self) -> Array2<f32> {
        self.inner.weight.dequantize() + matmul(self.inner.a.t(), self.inner.b.view())
    }

    pub(super) fn to_parts(&self) -> Parts {
        let inner = &*self.inner;
        let mut parts = Parts::new(Method::LowRank, json!(inner.config));
        parts.weights = Some(WeightRows {
            rows: inner.weight.rows,
            packed: inner.weight.packed.clone(),
            scales: f32_bytes(&inner.weight.scales),
            zeros: inner.weight.zeros.clone().into(),
        });
        if inner.config.settings.rank > 0 {
            for (side, vectors) in [(Side::A, &inner.a), (Side::B, &inner.b)] {
                parts.factors.push(Factor {
                    side,
                    singular_values: inner.singular_values.clone(),
                    vectors: vectors.clone(),
                });
            }
        }
        if let Some(bias) = &inner.bias {
            parts.tensors.push(Tensor::vector("bias", &bias.to_vec()));
        }
        parts
    }

    pub(super) fn from_parts(mut parts: Parts) -> Result<Self> {
        let config: StoredConfig = read_config(parts.method, &parts.config)?;
        let (outputs, inputs) = (config.out_features, config.in_features);
        let rows = parts
            .weights
            .as_ref()
            .ok_or_else(|| Error::expected("parts of a low-rank layer", "no weight rows", "weight rows"))?;
        let weight = PackedMatrix::from_fields(
            config.settings.weight,
            (outputs, inputs),
            rows.packed.clone(),
            bytes_f32(&rows.scales),
            rows.zeros.to_vec(),
        )?;
        let mut factor = |side: Side, length: usize| match parts.factors.iter().position(|f| f.side == side) {
            Some(place) => {
                let factor = parts.factors.swap_remove(place);
                (factor.vectors, factor.singular_values)
            }
            None => (Array2::zeros((0, length)), vec![]),
        };
        let (a, singular) = factor(Side::A, outputs);
        let (b, _) = factor(Side::B, inputs);
        let bias = parts.tensor("bias").map(Tensor::to_vector).transpose()?;
        Self::new(config, weight, a, b, singular, bias)
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.inner.weight.stored_bytes() + 4 * (self.inner.a.len() + self.inner.b.len() + self.out_features())
    }
}

type Factors = (Array2<f32>, Array2<f32>, Vec<f32>);

/// A (columns as rows, `[rank, out]`), B `[rank, in]` and the singular values, for the error `[out, in]` and inputs of
/// this second moment `[in, in]`, or any.
fn correction(error: &Array2<f64>, rank: usize, second: Option<&Array2<f64>>) -> Result<Factors> {
    let factor = second.filter(|_| rank > 0).map(|r| cholesky(r.view())).transpose()?;
    // T = Lᵀ for R = L Lᵀ, so E Tᵀ = E L and T⁻ᵀ = L⁻¹.
    let (leading, b) = match &factor {
        None => {
            let leading = leading_svd(error.view(), rank)?;
            let b = leading.vt.clone();
            (leading, b)
        }
        Some(l) => {
            let leading = leading_svd(matmul_f64(error.view(), l.view()).view(), rank)?;
            // Vᵀ L⁻¹ = (L⁻ᵀ V)ᵀ.
            let b = solve_lower_transposed(l.view(), leading.vt.t()).reversed_axes();
            (leading, b)
        }
    };
    let a = (&leading.u * &leading.s.view().insert_axis(Axis(0))).reversed_axes();
    let narrow = |m: Array2<f64>| m.mapv(|v| v as f32).as_standard_layout().to_owned();
    Ok((narrow(a), narrow(b), leading.s.iter().map(|&v| v as f32).collect()))
}

fn default_rank() -> usize {
    32
}

fn default_ridge_relative() -> f64 {
    1e-2
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::{Accuracy, Layer, MethodConfig};
    use crate::linalg::relative_error;
    use crate::quant::{Group, WeightType};
    use proptest::prelude::*;

    fn sample(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
        let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        Array2::from_shape_fn((rows, columns), |(_, j)| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as f32 / (1u32 << 31) as f32 * 2.0 - 1.0) * (1.0 + 3.0 * (j % 4) as f32)
        })
    }

    fn built(config: &LowRankConfig, w: &Array2<f32>, x: &Array2<f32>) -> Layer {
        MethodConfig::LowRank(config.clone())
            .compress(w.view(), Some(Array1::ones(w.nrows()).view()), Some(x.view()))
            .unwrap()
    }

    proptest! {
        /// The blocked forward is the reference product with the weight the layer stands for, and parts bring it back.
        #[test]
        fn forward_is_the_stored_weight(out in 2usize..150, symmetric in any::<bool>(), int8 in any::<bool>(), exact in any::<bool>(), rank in 0usize..3, seed in 0u64..100) {
            let config = LowRankConfig {
                weight: IntegerFormat { weight_type: if int8 { WeightType::Int8 } else { WeightType::Int4 }, group: Group::Size(4), symmetric },
                rank: rank.min(out),
                scaling: if exact { Scaling::Exact } else { Scaling::Identity },
                ..LowRankConfig::default()
            };
            let (w, x) = (sample(out, 12, seed), sample(30, 12, seed + 1));
            let layer = built(&config, &w, &x);
            let y = layer.forward(x.view(), Accuracy::Approximate).unwrap().y;
            let reference = x.dot(&layer.weight().unwrap().t()) + 1.0;
            prop_assert!(relative_error(y.view(), reference.view()) < 1e-5);
            let back = Layer::from_parts(layer.to_parts()).unwrap();
            prop_assert_eq!(back.to_parts(), layer.to_parts());
            prop_assert_eq!(back.forward(x.view(), Accuracy::Full).unwrap().y, y);
        }

        /// Each component helps, all of them make up the whole error, and `exact` beats `identity` on its inputs.
        #[test]
        fn correction_is_the_best_of_its_rank(seed in 0u64..60) {
            let (w, x) = (sample(10, 16, seed), sample(200, 16, seed + 1));
            let exact_output = x.dot(&w.t());
            let error = |scaling, rank| {
                let config = LowRankConfig { rank, scaling, ridge_relative: 1e-6, weight: // Symmetric, which rounds alike for both scalings.
                    IntegerFormat { group: Group::Size(16), symmetric: true, ..IntegerFormat::default() }, ..LowRankConfig::default() };
                let layer = built(&config, &w, &x);
                relative_error(layer.linear(x.view(), Accuracy::Approximate).unwrap().y.view(), exact_output.view())
            };
            for rank in [1, 3, 6] {
                prop_assert!(error(Scaling::Exact, rank) <= error(Scaling::Identity, rank) * 1.001);
                prop_assert!(error(Scaling::Exact, rank) <= error(Scaling::Exact, rank - 1) * 1.001);
            }
            prop_assert!(error(Scaling::Exact, 10) < 1e-5 && error(Scaling::Identity, 10) < 1e-5);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let w = sample(6, 8, 1);
        let refuse = |config: LowRankConfig, expected: &str| {
            let message = MethodConfig::LowRank(config).compress(w.view(), None, None).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        };
        let fits = LowRankConfig {
            weight: IntegerFormat { group: Group::Size(8), ..IntegerFormat::default() },
            rank: 2,
            ..LowRankConfig::default()
        };
        refuse(LowRankConfig { rank: 7, ..fits.clone() }, "at most 6");
        refuse(LowRankConfig { scaling: Scaling::Exact, ..fits.clone() }, "calibration");
        refuse(
            LowRankConfig { weight: IntegerFormat { group: Group::Size(3), ..fits.weight }, ..fits.clone() },
            "divisor",
        );
        refuse(LowRankConfig { ridge_relative: -1.0, ..fits }, "at least 0");
    }
}
