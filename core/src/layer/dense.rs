//! A tensor of the checkpoint as it was, in its own dtype, bit for bit.

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use half::{bf16, f16};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::method::{Method, read_config};
use super::name::MethodName;
use super::parts::{Parts, Tensor, WeightRows, f32_bytes};
use super::shape::LayerShape;
use super::traits::{Accuracy, Gradients, Layer, Output, check_rows};
use crate::calibration::Calibration;
use crate::error::{Error, Result};
use crate::linalg::{Loss, matmul, matmul_nt};
use crate::quant::{F8_E4M3, F8_E5M2};

/// An element type, by its safetensors name.
pub use safetensors::Dtype as DType;

/// The method that compresses nothing: weights stay the checkpoint's own numbers. It has no settings.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dense {}

impl Method for Dense {
    const NAME: &'static str = "dense";
    type Layer = DenseLayer;

    fn check(&self, _shape: LayerShape, _calibrated: bool) -> Result<()> {
        Ok(())
    }

    fn compress(
        &self,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        _calibration: Option<&Calibration>,
    ) -> Result<DenseLayer> {
        Ok(DenseLayer::from_f32(weight, bias))
    }

    fn from_parts(parts: Parts) -> Result<DenseLayer> {
        DenseLayer::from_parts(parts)
    }
}

/// A dense layer `[out, in]`, or any other tensor that a checkpoint holds.
#[derive(Debug, Clone)]
pub struct DenseLayer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    config: DenseConfig,
    raw: Bytes,
    bias: Option<Tensor>,
    /// Made at the first forward pass.
    floats: OnceLock<Array2<f32>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct DenseConfig {
    dtype: DType,
    shape: Vec<usize>,
}

impl DenseConfig {
    /// The bytes that dtype and shape call for; nothing where that overflows or is no whole number.
    fn byte_len(&self) -> Option<usize> {
        // Lengths beside a 0 are multiplied as well, where rows are counted.
        let most = self.shape.iter().try_fold(self.dtype.bitsize(), |n, &d| n.checked_mul(d.max(1)))?;
        let bits = if self.shape.contains(&0) { 0 } else { most };
        (most <= isize::MAX as usize && bits.is_multiple_of(8)).then_some(bits / 8)
    }

    /// Stored row by row, or as one small tensor.
    fn in_rows(&self) -> bool {
        let row_bits: usize = self.shape.iter().skip(1).product::<usize>() * self.dtype.bitsize();
        self.shape.len() >= 2 && self.shape[0] > 0 && row_bits > 0 && row_bits.is_multiple_of(8)
    }
}

impl DenseLayer {
    /// Returns a layer of `raw` little-endian elements, row-major, with an optional bias kept in its own dtype.
    ///
    /// # Errors
    /// When the number of bytes does not follow from dtype and shape, or the bias is no vector of one number an output.
    pub fn new(dtype: DType, shape: Vec<usize>, raw: Bytes, bias: Option<Tensor>) -> Result<Self> {
        let config = DenseConfig { dtype, shape };
        if let Some(bias) = &bias {
            let own = DenseConfig { dtype: dtype_named(&bias.dtype)?, shape: bias.shape.clone() };
            let expected = config.shape.first().copied().unwrap_or(1);
            if bias.shape != [expected] || own.byte_len() != Some(bias.data.len()) {
                return Err(Error::expected(
                    "bias of a dense layer",
                    format!("{} {:?} in {} bytes", bias.dtype, bias.shape, bias.data.len()),
                    format!("a vector of {expected}"),
                ));
            }
        }
        match config.byte_len() {
            Some(expected) if expected == raw.len() => {}
            Some(expected) => {
                return Err(Error::expected(
                    format!("bytes of a {dtype:?} tensor of shape {:?}", config.shape),
                    raw.len(),
                    expected,
                ));
            }
            None => {
                return Err(Error::expected(
                    "shape of a tensor",
                    format!("{:?} of {dtype:?}", config.shape),
                    "one whose bytes can be counted",
                ));
            }
        }
        Ok(DenseLayer { inner: Arc::new(Inner { config, raw, bias, floats: OnceLock::new() }) })
    }

    /// Returns an F32 layer from arrays: weight `[out, in]`, bias `[out]`.
    pub fn from_f32(weight: ArrayView2<f32>, bias: Option<ArrayView1<f32>>) -> Self {
        let raw = f32_bytes(weight.as_standard_layout().as_slice().expect("standard layout"));
        let bias = bias.map(|b| Tensor::vector("bias", &b.to_vec()));
        let config = DenseConfig { dtype: DType::F32, shape: vec![weight.nrows(), weight.ncols()] };
        DenseLayer { inner: Arc::new(Inner { config, raw, bias, floats: OnceLock::new() }) }
    }

    /// Returns the element type of the tensor.
    pub fn dtype(&self) -> DType {
        self.inner.config.dtype
    }

    /// Returns the shape of the tensor.
    pub fn shape(&self) -> &[usize] {
        &self.inner.config.shape
    }

    /// Returns the elements, little-endian and row-major, as the checkpoint had them.
    pub fn raw(&self) -> &Bytes {
        &self.inner.raw
    }

    fn require_matrix(&self) -> Result<()> {
        if self.shape().len() == 2 {
            return Ok(());
        }
        Err(Error::expected(
            "a layer to run",
            format!("a tensor of shape {:?}", self.shape()),
            "a matrix [out_features, in_features]",
        ))
    }

    /// Returns the elements as f32, `[out_features, in_features]`; a vector is one column.
    ///
    /// # Errors
    /// When the dtype is not F32, F16, BF16 or F64.
    pub fn floats(&self) -> Result<&Array2<f32>> {
        if let Some(floats) = self.inner.floats.get() {
            return Ok(floats);
        }
        let values = to_f32(self.dtype(), &self.inner.raw)?;
        let array = Array2::from_shape_vec((self.out_features(), self.in_features()), values)
            .map_err(|e| Error::expected("elements of a dense tensor", e, format!("{:?}", self.shape())))?;
        Ok(self.inner.floats.get_or_init(|| array))
    }

    fn from_parts(parts: Parts) -> Result<Self> {
        let config: DenseConfig = read_config(Dense::NAME, &parts.config)?;
        let raw = match (&parts.weights, parts.tensor("weight")) {
            (Some(rows), _) => rows.packed.clone(),
            (None, Some(tensor)) => tensor.data.clone(),
            (None, None) => {
                return Err(Error::expected(
                    "parts of a dense layer",
                    "neither weight rows nor a weight tensor",
                    "one of them",
                ));
            }
        };
        DenseLayer::new(config.dtype, config.shape, raw, parts.tensor("bias").cloned())
    }
}

impl Layer for DenseLayer {
    fn method(&self) -> MethodName {
        MethodName::new(Dense::NAME)
    }

    fn out_features(&self) -> usize {
        self.shape().first().copied().unwrap_or(1)
    }

    fn in_features(&self) -> usize {
        self.shape().iter().skip(1).product()
    }

    fn config(&self) -> Value {
        json!(self.inner.config)
    }

    fn bias(&self) -> Result<Option<Array1<f32>>> {
        let Some(bias) = &self.inner.bias else { return Ok(None) };
        Ok(Some(Array1::from(to_f32(dtype_named(&bias.dtype)?, &bias.data)?)))
    }

    fn product(&self, x: ArrayView2<f32>, _accuracy: Accuracy) -> Result<Output> {
        Ok(Output { y: matmul_nt(x, self.floats()?.view()), relative_error_bound: None })
    }

    fn to_parts(&self) -> Parts {
        let mut parts = Parts::new(Dense::NAME, self.config());
        let config = &self.inner.config;
        if config.in_rows() {
            parts.weights =
                Some(WeightRows { rows: config.shape[0], packed: self.inner.raw.clone(), ..WeightRows::default() });
        } else {
            parts.tensors.push(Tensor {
                name: "weight".into(),
                dtype: dtype_name(config.dtype),
                shape: config.shape.clone(),
                data: self.inner.raw.clone(),
            });
        }
        parts.tensors.extend(self.inner.bias.clone());
        parts
    }

    fn require_linear(&self) -> Result<()> {
        self.require_matrix()
    }

    fn weight(&self) -> Result<Array2<f32>> {
        Ok(self.floats()?.clone())
    }

    fn rows(&self, indices: &[u32]) -> Result<Array2<f32>> {
        check_rows(indices, self.out_features())?;
        let (columns, dtype) = (self.in_features(), self.dtype());
        if dtype.bitsize() < 8 {
            return Err(Error::expected("dtype to compute with", format!("{dtype:?}"), COMPUTED));
        }
        let bytes = columns * dtype.bitsize() / 8;
        let mut rows = Array2::zeros((indices.len(), columns));
        for (mut row, &index) in rows.rows_mut().into_iter().zip(indices) {
            let start = index as usize * bytes;
            row.assign(&Array1::from(to_f32(dtype, &self.inner.raw[start..start + bytes])?));
        }
        Ok(rows)
    }

    fn gradients(&self, x: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<Gradients> {
        Ok(Gradients {
            input: matmul(grad_output, self.floats()?.view()),
            weight: matmul(grad_output.t(), x),
            bias: grad_output.sum_axis(Axis(0)),
        })
    }

    fn input_gradients(&self, _: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<Array2<f32>> {
        Ok(matmul(grad_output, self.floats()?.view()))
    }

    fn raw_weight(&self) -> Option<Bytes> {
        Some(self.inner.raw.clone())
    }

    fn raw_bias(&self) -> Option<Bytes> {
        self.inner.bias.as_ref().map(|bias| bias.data.clone())
    }

    fn memory_bytes(&self) -> usize {
        // The floats are counted from the start: a cache has to know what a layer may grow to.
        let elements: usize = self.shape().iter().product();
        self.inner.raw.len() + 4 * elements
    }
}

/// The dtypes of elements that can be computed with.
const COMPUTED: &str = "F32, F16, BF16, F64, F8_E4M3 or F8_E5M2";

/// Little-endian elements as f32.
///
/// # Errors
/// When the dtype is none of F32, F16, BF16, F64, F8_E4M3 and F8_E5M2, or an F64 element is beyond what f32 holds.
pub fn to_f32(dtype: DType, raw: &[u8]) -> Result<Vec<f32>> {
    Ok(match dtype {
        DType::F32 => super::parts::bytes_f32(raw),
        DType::F16 => raw.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        DType::BF16 => raw.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        DType::F64 => narrowed(raw.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)))?,
        DType::F8_E4M3 => raw.iter().map(|&code| F8_E4M3[usize::from(code)]).collect(),
        DType::F8_E5M2 => raw.iter().map(|&code| F8_E5M2[usize::from(code)]).collect(),
        other => return Err(Error::expected("dtype to compute with", format!("{other:?}"), COMPUTED)),
    })
}

/// F64 numbers as f32.
///
/// # Errors
/// When one is finite and beyond f32, or they are so small that f32 loses more than a millionth of them.
fn narrowed(values: impl Iterator<Item = f64>) -> Result<Vec<f32>> {
    let mut loss = Loss::default();
    let mut narrow = Vec::with_capacity(values.size_hint().0);
    for (index, value) in values.enumerate() {
        let kept = value as f32;
        if value.is_finite() {
            if kept.is_infinite() {
                return Err(Error::expected(
                    format!("element {index} of an F64 tensor to compute with"),
                    format!("{value:e}"),
                    format!("at most {:e} in size", f32::MAX),
                ));
            }
            loss.add(value, kept.into());
        }
        narrow.push(kept);
    }
    // Squares of the smallest are beyond f64 itself.
    let vanishes = loss.whole == 0.0 && loss.lost == 0.0;
    if !vanishes && !loss.within(1e-6) {
        return Err(Error::expected(
            "F64 tensor to compute with",
            format!("numbers of {:e} on average", (loss.whole / narrow.len() as f64).sqrt()),
            format!("few below {:e} in size", f32::MIN_POSITIVE),
        ));
    }
    Ok(narrow)
}

/// What a weight that is brought back from few bits may be beyond the largest number of its checkpoint's dtype, in its sizes: the
/// weight that it stands for was not.
const OVERSHOOT: f32 = 2.0;

/// Returns f32 values as little-endian elements of `dtype`. One a little beyond the largest number of `dtype`, as rounding
/// leaves it, becomes that number.
///
/// # Errors
/// When the dtype is not F32, F16, BF16 or F64, or a finite value is more than twice its largest number.
pub fn from_f32(dtype: DType, values: &[f32]) -> Result<Bytes> {
    let within = |most: f32| {
        let beyond = |(_, v): &(usize, &f32)| v.is_finite() && v.abs() / OVERSHOOT > most;
        match values.iter().enumerate().find(beyond) {
            Some((index, value)) => Err(Error::expected(
                format!("value {index} to write as {dtype:?}"),
                format!("{value:e}"),
                format!("at most {most:e} in size"),
            )),
            None => Ok(values.iter().map(move |v| if v.is_finite() { v.clamp(-most, most) } else { *v })),
        }
    };
    Ok(match dtype {
        DType::F32 => f32_bytes(values),
        DType::F16 => within(f16::MAX.to_f32())?.flat_map(|v| f16::from_f32(v).to_le_bytes()).collect(),
        DType::BF16 => within(bf16::MAX.to_f32())?.flat_map(|v| bf16::from_f32(v).to_le_bytes()).collect(),
        DType::F64 => values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect(),
        other => return Err(Error::expected("dtype to compute with", format!("{other:?}"), "F32, F16, BF16 or F64")),
    })
}

/// The share of f32 values that a dtype may lose and still hold them: twice what rounding to bfloat16 loses.
const LOST_BY_DTYPE: f64 = 1.0 / 256.0;

/// Returns whether elements of `dtype`, as [`from_f32`] makes them, hold f32 values but for rounding: none is beyond its range, and
/// not too many are near 0 in it.
pub fn holds(dtype: DType, values: &[f32]) -> bool {
    let Ok(kept) = from_f32(dtype, values).and_then(|raw| to_f32(dtype, &raw)) else { return false };
    let mut loss = Loss::default();
    values.iter().zip(kept).for_each(|(&v, kept)| loss.add(v.into(), kept.into()));
    loss.within(LOST_BY_DTYPE)
}

/// Returns the safetensors name of a dtype, such as `BF16`.
pub fn dtype_name(dtype: DType) -> String {
    // serde is the crate's own table of names.
    match serde_json::to_value(dtype) {
        Ok(Value::String(name)) => name,
        _ => format!("{dtype:?}"),
    }
}

/// Returns the dtype of a safetensors name.
///
/// # Errors
/// When safetensors has no dtype of that name.
pub fn dtype_named(name: &str) -> Result<DType> {
    serde_json::from_value(Value::String(name.to_owned()))
        .map_err(|_| Error::expected("dtype", name, "a safetensors dtype"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn every_dtype_comes_back_bit_exact() {
        for (dtype, raw) in [
            (DType::F32, f32::NAN.to_le_bytes().to_vec()),
            (DType::F16, vec![1, 2, 3, 4]),
            (DType::I64, vec![7; 16]),
            (DType::BOOL, vec![1, 0, 1]),
        ] {
            let elements = raw.len() * 8 / dtype.bitsize();
            for shape in [vec![elements], vec![1, elements], vec![elements, 1, 1], vec![elements, 0]] {
                let raw = if shape.contains(&0) { Bytes::new() } else { Bytes::from(raw.clone()) };
                let layer = DenseLayer::new(dtype, shape.clone(), raw.clone(), None).unwrap();
                let back = DenseLayer::from_parts(layer.to_parts()).unwrap();
                assert_eq!((back.dtype(), back.shape(), back.raw()), (dtype, shape.as_slice(), &raw));
            }
        }
    }

    #[test]
    fn narrowing_looks_at_both_ends() {
        let halves = |values: &[f32]| from_f32(DType::F16, values).map(|raw| to_f32(DType::F16, &raw).unwrap());
        assert_eq!(halves(&[-65_520.0, 70_000.0, 1.0]).unwrap(), [-65_504.0, 65_504.0, 1.0]);
        assert!(halves(&[1.0, 2e5]).unwrap_err().to_string().contains("value 1 to write as F16"));
        assert!(from_f32(DType::BF16, &[f32::MAX]).is_ok_and(|raw| to_f32(DType::BF16, &raw).unwrap()[0].is_finite()));
        assert_eq!(halves(&[f32::INFINITY]).unwrap(), [f32::INFINITY]);
        assert!(
            holds(DType::F16, &[65_000.0, 1e-7, 0.0]) && holds(DType::F16, &[0.0]) && holds(DType::BF16, &[1e-9, 3e38])
        );
        assert!(!holds(DType::F16, &[70_000.0]) && !holds(DType::F16, &[1e-8, 2e-8]) && !holds(DType::I64, &[1.0]));
        let doubles =
            |values: &[f64]| to_f32(DType::F64, &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<_>>());
        assert_eq!(doubles(&[1.0, 1e-60, f64::INFINITY]).unwrap(), [1.0, 0.0, f32::INFINITY]);
        assert!(doubles(&[1.0, 1e39]).unwrap_err().to_string().contains("element 1"));
        assert!(doubles(&[1e-45, 1e-46]).unwrap_err().to_string().contains("F64"));
    }

    #[test]
    fn lengths_are_checked() {
        assert!(DenseLayer::new(DType::F32, vec![2, 2], Bytes::from_static(&[0; 15]), None).is_err());
        assert!(DenseLayer::new(DType::F32, vec![usize::MAX, 2], Bytes::new(), None).is_err());
        // Rows without a number, or none of any length: still counted.
        for shape in [vec![0, usize::MAX, 2], vec![0, usize::MAX], vec![1 << 62, 0]] {
            let message = DenseLayer::new(DType::F32, shape, Bytes::new(), None).unwrap_err().to_string();
            assert!(message.contains("bytes can be counted"), "{message}");
        }
        let two = || Bytes::from_static(&[0; 8]);
        for (bias, found) in [
            (Tensor::vector("bias", &[1.0]), "F32 [1] in 4 bytes"),
            (Tensor { shape: vec![2, 1], ..Tensor::vector("bias", &[1.0, 2.0]) }, "F32 [2, 1] in 8 bytes"),
            (Tensor { dtype: "F16".into(), ..Tensor::vector("bias", &[1.0, 2.0]) }, "F16 [2] in 8 bytes"),
            (Tensor { dtype: "F17".into(), ..Tensor::vector("bias", &[1.0, 2.0]) }, "F17"),
        ] {
            let message = DenseLayer::new(DType::F32, vec![2, 1], two(), Some(bias)).unwrap_err().to_string();
            assert!(message.contains(found), "{message}");
        }
    }

    #[test]
    fn runs_and_refuses() {
        let layer = DenseLayer::from_f32(array![[1.0, 2.0], [0.0, -1.0]].view(), Some(array![10.0, 0.0].view()));
        let y = layer.forward(array![[1.0, 1.0]].view(), Accuracy::Approximate).unwrap().y;
        assert_eq!(y, array![[13.0, -1.0]]);
        assert_eq!(layer.rows(&[1, 0, 1]).unwrap(), array![[0.0, -1.0], [1.0, 2.0], [0.0, -1.0]]);
        assert!(layer.rows(&[2]).unwrap_err().to_string().contains("below 2"));
        assert!(layer.forward(array![[1.0]].view(), Accuracy::Full).is_err());
        assert!(layer.forward(array![[1.0, f32::INFINITY]].view(), Accuracy::Full).is_err());
        let vector = DenseLayer::new(DType::F32, vec![1], f32_bytes(&[1.0]), None).unwrap();
        assert!(vector.forward(array![[1.0]].view(), Accuracy::Full).unwrap_err().to_string().contains("matrix"));
    }
}
