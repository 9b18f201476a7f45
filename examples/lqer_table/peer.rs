//! The models that LQER-Qwix comes with, run on a store's layers.

use std::collections::BTreeMap;

use layerstore::Snapshot;
use layerstore::layer::{Accuracy, SharedLayer};
use ndarray::{Array1, Array2, Array3, Axis, s};

type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// A model of the peer's: its layers by name.
pub struct Peer {
    name: String,
    layers: BTreeMap<String, SharedLayer>,
}

#[allow(dead_code, reason = "the example and the tests each use some of it")]
impl Peer {
    pub async fn open(snapshot: &Snapshot, name: &str) -> Result<Self> {
        let mut layers = BTreeMap::new();
        for handle in snapshot.handles(name).await? {
            layers.insert(handle.record().layer.clone(), handle.load().await?);
        }
        Ok(Peer { name: name.to_owned(), layers })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn layers(&self) -> &BTreeMap<String, SharedLayer> {
        &self.layers
    }

    fn layer(&self, name: &str) -> Result<&SharedLayer> {
        Ok(self.layers.get(name).ok_or_else(|| format!("model '{}' has no layer '{name}'", self.name))?)
    }

    fn linear(&self, layer: &str, x: &Array2<f32>) -> Result<Array2<f32>> {
        Ok(self.layer(layer)?.forward(x.view(), Accuracy::Approximate)?.y)
    }

    /// A tensor that no rule took.
    fn plain(&self, name: &str) -> Result<Vec<f32>> {
        let layer = self.layer(name)?;
        let raw = layer.raw_weight().ok_or_else(|| format!("layer '{name}' is {}, not dense", layer.method()))?;
        Ok(raw.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    fn norm(&self, name: &str, x: &Array2<f32>) -> Result<Array2<f32>> {
        let (scale, bias) = (self.plain(&format!("{name}.scale"))?, self.plain(&format!("{name}.bias"))?);
        let mut y = x.clone();
        for mut row in y.rows_mut() {
            let mean = row.sum() / row.len() as f32;
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / row.len() as f32;
            let unit = (variance + 1e-6).sqrt();
            row.iter_mut().zip(scale.iter().zip(&bias)).for_each(|(v, (s, b))| *v = (*v - mean) / unit * s + b);
        }
        Ok(y)
    }

    pub fn perceptron(&self, x: &Array2<f32>) -> Result<Array2<f32>> {
        self.linear("Dense_1", &self.linear("Dense_0", x)?.mapv(|v| v.max(0.0)))
    }

    /// Logits `[batch, tokens, vocabulary]` of tokens `[batch, tokens]`.
    pub fn transformer(&self, tokens: &Array2<f64>) -> Result<Array3<f32>> {
        self.transformer_with(tokens, |_, _| ())
    }

    /// [`Peer::transformer`], which shows each layer's inputs `[tokens, in_features]`.
    pub fn transformer_with(
        &self,
        tokens: &Array2<f64>,
        mut seen: impl FnMut(&str, &Array2<f32>),
    ) -> Result<Array3<f32>> {
        let positions = self.plain("pos_embed")?;
        let embedding = self.plain("embed.embedding")?;
        let width = self.layer("block_0.attention.query")?.in_features();
        let blocks = (0..).take_while(|i| self.layers.contains_key(&format!("block_{i}.ffn.fc1"))).count();
        let mut linear = |layer: &str, x: &Array2<f32>| {
            seen(layer, x);
            self.linear(layer, x)
        };
        let mut sequences = vec![];
        for tokens in tokens.rows() {
            let row = |(place, &token): (usize, &f64)| {
                let word = &embedding[token as usize * width..][..width];
                word.iter().zip(&positions[place * width..]).map(|(a, b)| a + b).collect::<Array1<f32>>()
            };
            let rows: Vec<Array1<f32>> = tokens.iter().enumerate().map(row).collect();
            let views: Vec<_> = rows.iter().map(|r| r.view()).collect();
            let mut x = ndarray::stack(Axis(0), &views)?;
            for i in 0..blocks {
                let of = |part: &str| format!("block_{i}.{part}");
                let q = linear(&of("attention.query"), &x)?;
                let k = linear(&of("attention.key"), &x)?;
                let v = linear(&of("attention.value"), &x)?;
                let mut scores = q.dot(&k.t()) / (width as f32).sqrt();
                for (place, mut row) in scores.rows_mut().into_iter().enumerate() {
                    row.slice_mut(s![place + 1..]).fill(-1e10);
                    let most = row.iter().fold(f32::NEG_INFINITY, |m, v| m.max(*v));
                    row.mapv_inplace(|v| (v - most).exp());
                    let sum = row.sum();
                    row /= sum;
                }
                let attended = linear(&of("attention.out"), &scores.dot(&v))?;
                x = self.norm(&of("ln1"), &(x + attended))?;
                let gelu = |v: f32| {
                    0.5 * v * (1.0 + ((2.0 / std::f32::consts::PI).sqrt() * (v + 0.044715 * v.powi(3))).tanh())
                };
                let hidden = linear(&of("ffn.fc1"), &x)?.mapv(gelu);
                let fed = linear(&of("ffn.fc2"), &hidden)?;
                x = self.norm(&of("ln2"), &(x + fed))?;
            }
            sequences.push(linear("output", &self.norm("ln_final", &x)?)?);
        }
        let views: Vec<_> = sequences.iter().map(|s| s.view()).collect();
        Ok(ndarray::stack(Axis(0), &views)?)
    }
}
