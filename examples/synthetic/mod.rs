//! A small made-up model, with what makes real ones compressible: weights whose spectra fall off, and inputs whose
//! features go together.

use std::f64::consts::TAU;
use std::path::Path;

use ndarray::Array2;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::Result;

/// The name under `block.N`, out_features and in_features of each linear layer.
const LINEARS: [(&str, usize, usize); 4] =
    [("attention.query", 128, 128), ("attention.output", 128, 128), ("mlp.up", 256, 128), ("mlp.down", 128, 256)];
const BLOCKS: usize = 2;
const TOKENS: usize = 512;

/// Name, shape and elements.
type Tensor = (String, Vec<usize>, Vec<f32>);

/// Writes the checkpoint: the linear layers with their biases, and an embedding and a norm beside them.
pub fn write_checkpoint(path: &Path) -> Result<()> {
    let mut random = Random(1);
    let mut tensors: Vec<Tensor> = vec![
        ("embedding.weight".to_owned(), vec![500, 128], random.values(500 * 128)),
        ("norm.weight".to_owned(), vec![128], vec![1.0; 128]),
    ];
    for (layer, rows, columns) in linears() {
        let weight = random.decaying(rows, columns, 0.8);
        tensors.push((format!("{layer}.weight"), vec![rows, columns], weight.iter().copied().collect()));
        tensors.push((format!("{layer}.bias"), vec![rows], random.values(rows)));
    }
    write(path, &tensors)
}

/// Writes inputs of every linear layer, as a run of the model over sample data would give: tensors `[tokens,
/// in_features]` that are named after the layers.
pub fn write_calibration(path: &Path) -> Result<()> {
    let mut random = Random(2);
    let mut tensors: Vec<Tensor> = Vec::new();
    for (layer, _, columns) in linears() {
        let inputs = random.values(TOKENS * columns);
        let inputs = Array2::from_shape_vec((TOKENS, columns), inputs)?.dot(&random.decaying(columns, columns, 0.6));
        tensors.push((layer, vec![TOKENS, columns], inputs.iter().copied().collect()));
    }
    write(path, &tensors)
}

fn linears() -> Vec<(String, usize, usize)> {
    let mut layers = Vec::new();
    for block in 0..BLOCKS {
        for (name, rows, columns) in LINEARS {
            layers.push((format!("block.{block}.{name}"), rows, columns));
        }
    }
    layers
}

fn write(path: &Path, tensors: &[Tensor]) -> Result<()> {
    let bytes: Vec<Vec<u8>> =
        tensors.iter().map(|(_, _, values)| values.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let mut views = Vec::with_capacity(tensors.len());
    for ((name, shape, _), bytes) in tensors.iter().zip(&bytes) {
        views.push((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?));
    }
    Ok(safetensors::serialize_to_file(views, None, path)?)
}

/// SplitMix64: the same numbers on every machine.
struct Random(u64);

impl Random {
    /// Above 0 and below 1.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (((z ^ (z >> 31)) >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }

    /// Standard normal, by Box and Muller.
    fn normal(&mut self) -> f32 {
        ((-2.0 * self.uniform().ln()).sqrt() * (TAU * self.uniform()).cos()) as f32
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal()).collect()
    }

    /// A matrix whose k-th component shrinks as `k^-power`.
    fn decaying(&mut self, rows: usize, columns: usize, power: f32) -> Array2<f32> {
        let rank = rows.min(columns);
        let mut left = Array2::from_shape_fn((rows, rank), |_| self.normal());
        for (k, mut component) in left.columns_mut().into_iter().enumerate() {
            component *= ((k + 1) as f32).powf(-power) / (columns as f32).sqrt();
        }
        left.dot(&Array2::from_shape_fn((rank, columns), |_| self.normal()))
    }
}
