//! The encoder of all-MiniLM-L6-v2 in plain ndarray. Every weight comes from a snapshot of the store; the linear layers
//! run as what they were compressed to.

use layerstore::layer::{Accuracy, Activation, Mechanism, SharedLayer, VqAttentionConfig, VqAttentionLayer};
use layerstore::nn::AttentionBlock;
use layerstore::{ErrorKind, LayerHandle, Snapshot};
use ndarray::{Array1, Array2, ArrayView2, Axis};

use crate::Result;

pub const HIDDEN: usize = 384;
const INTERMEDIATE: usize = 1536;
const BLOCKS: usize = 6;
const HEADS: usize = 12;
const NORM_EPSILON: f32 = 1e-12;

/// Called with each linear layer's name and input, before the layer runs.
pub type Watch<'a> = dyn FnMut(&str, ArrayView2<f32>) + 'a;

/// A sentence as the tokenizer gives it.
pub struct Tokens {
    pub ids: Vec<usize>,
    pub types: Vec<usize>,
}

/// One model of a snapshot, ready to run.
pub struct Bert {
    words: Table,
    positions: Table,
    types: Table,
    norm: Norm,
    blocks: Vec<Block>,
}

impl Bert {
    /// Finds the model's layers by their names in the checkpoint. The linear ones are read when they are first used.
    pub async fn open(snapshot: &Snapshot, model: &str) -> Result<Self> {
        let mut blocks = Vec::with_capacity(BLOCKS);
        for number in 0..BLOCKS {
            blocks.push(Block::open(snapshot, model, number).await?);
        }
        Ok(Bert {
            words: Table::open(snapshot, model, "embeddings.word_embeddings").await?,
            positions: Table::open(snapshot, model, "embeddings.position_embeddings").await?,
            types: Table::open(snapshot, model, "embeddings.token_type_embeddings").await?,
            norm: Norm::open(snapshot, model, "embeddings.LayerNorm").await?,
            blocks,
        })
    }

    /// Handles of the linear layers, in the order they run.
    pub fn linears(&self) -> Vec<LayerHandle> {
        self.blocks
            .iter()
            .flat_map(|b| [&b.query, &b.key, &b.value, &b.attention_output, &b.intermediate, &b.output])
            .cloned()
            .collect()
    }

    /// The sentence's embedding, `[HIDDEN]`, of length 1.
    pub async fn embed(&self, tokens: &Tokens, watch: &mut Watch<'_>) -> Result<Array1<f32>> {
        let positions: Vec<usize> = (0..tokens.ids.len()).collect();
        let words = self.words.rows(&tokens.ids)?;
        let mut hidden = self.norm.apply(words + self.positions.rows(&positions)? + self.types.rows(&tokens.types)?);
        for block in &self.blocks {
            hidden = block.forward(hidden, watch).await?;
        }
        // A sentence runs by itself, so that there is no padding to leave out of the mean, or of the attention.
        let mean = hidden.mean_axis(Axis(0)).ok_or("the tokenizer gave no token for a sentence")?;
        let length = mean.dot(&mean).sqrt();
        Ok(mean / length.max(f32::MIN_POSITIVE))
    }
}

/// One encoder block.
struct Block {
    query: LayerHandle,
    key: LayerHandle,
    value: LayerHandle,
    attention: AttentionBlock,
    attention_output: LayerHandle,
    attention_norm: Norm,
    intermediate: LayerHandle,
    output: LayerHandle,
    output_norm: Norm,
}

impl Block {
    async fn open(snapshot: &Snapshot, model: &str, number: usize) -> Result<Self> {
        let name = |part: &str| format!("encoder.layer.{number}.{part}");
        let square = (HIDDEN, HIDDEN);
        let attention = attention(snapshot, model, &name("attention")).await?;
        Ok(Block {
            attention,
            query: linear(snapshot, model, &name("attention.self.query"), square).await?,
            key: linear(snapshot, model, &name("attention.self.key"), square).await?,
            value: linear(snapshot, model, &name("attention.self.value"), square).await?,
            attention_output: linear(snapshot, model, &name("attention.output.dense"), square).await?,
            attention_norm: Norm::open(snapshot, model, &name("attention.output.LayerNorm")).await?,
            intermediate: linear(snapshot, model, &name("intermediate.dense"), (INTERMEDIATE, HIDDEN)).await?,
            output: linear(snapshot, model, &name("output.dense"), (HIDDEN, INTERMEDIATE)).await?,
            output_norm: Norm::open(snapshot, model, &name("output.LayerNorm")).await?,
        })
    }

    /// `[tokens, HIDDEN]` to the same. BERT normalises after each sum, not before each layer.
    async fn forward(&self, x: Array2<f32>, watch: &mut Watch<'_>) -> Result<Array2<f32>> {
        let query = run(&self.query, &x, watch).await?;
        let key = run(&self.key, &x, watch).await?;
        let value = run(&self.value, &x, watch).await?;
        let [query, key, value] = [query, key, value].map(|x| x.insert_axis(Axis(0)));
        let attended =
            self.attention.attend(query.view(), key.view(), value.view(), None, None, Accuracy::Approximate)?;
        let attended = run(&self.attention_output, &attended.index_axis_move(Axis(0), 0), watch).await?;
        let x = self.attention_norm.apply(x + attended);
        let mut inner = run(&self.intermediate, &x, watch).await?;
        // With the exact error function, as the model was trained.
        Activation::Gelu.apply(inner.view_mut());
        let inner = run(&self.output, &inner, watch).await?;
        Ok(self.output_norm.apply(x + inner))
    }
}

/// A linear layer by name, refused here if the model is another than this code knows.
async fn linear(snapshot: &Snapshot, model: &str, name: &str, shape: (usize, usize)) -> Result<LayerHandle> {
    let handle = snapshot.layer(model, name).await?;
    let record = handle.record();
    check_shape(name, (record.out_features as usize, record.in_features as usize), shape)?;
    Ok(handle)
}

async fn run(handle: &LayerHandle, x: &Array2<f32>, watch: &mut Watch<'_>) -> Result<Array2<f32>> {
    watch(&handle.record().layer, x.view());
    Ok(handle.forward(x.view(), Accuracy::Approximate).await?.y)
}

fn check_shape(name: &str, found: (usize, usize), expected: (usize, usize)) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(format!("layer '{name}' is {found:?}; in all-MiniLM-L6-v2 it is {expected:?} (out_features, in_features)")
        .into())
}

/// What is between a block's projections: what the model stores for it, or the exact attention that it was trained with.
async fn attention(snapshot: &Snapshot, model: &str, name: &str) -> Result<AttentionBlock> {
    let attention = match snapshot.attention(model, name).await {
        Ok(handle) => handle.load_attention().await?,
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let width = Some(HIDDEN / HEADS);
            let config = VqAttentionConfig {
                mechanism: Mechanism::Exact,
                n_head: HEADS,
                d_model: Some(HIDDEN),
                d_k: width,
                d_v: width,
                causal: false,
                ..VqAttentionConfig::default()
            };
            VqAttentionLayer::new(config, None, None, None)?
        }
        Err(e) => return Err(e.into()),
    };
    Ok(AttentionBlock::new(attention, None, None)?)
}

/// A table of embeddings, one a row.
struct Table {
    name: &'static str,
    layer: SharedLayer,
}

impl Table {
    async fn open(snapshot: &Snapshot, model: &str, name: &'static str) -> Result<Self> {
        let layer = snapshot.layer(model, name).await?.load().await?;
        check_shape(name, (layer.out_features(), layer.in_features()), (layer.out_features(), HIDDEN))?;
        Ok(Table { name, layer })
    }

    fn rows(&self, places: &[usize]) -> Result<Array2<f32>> {
        let rows: Vec<u32> = places.iter().map(|&place| u32::try_from(place).unwrap_or(u32::MAX)).collect();
        self.layer
            .rows(&rows)
            .map_err(|e| format!("embedding '{}': {e}: use the model's own tokenizer.json", self.name).into())
    }
}

/// Layer normalisation.
struct Norm {
    gain: Array1<f32>,
    shift: Array1<f32>,
}

impl Norm {
    async fn open(snapshot: &Snapshot, model: &str, name: &str) -> Result<Self> {
        let layer = snapshot.layer(model, name).await?.load().await?;
        // A vector comes as one column.
        let gain = layer.weight()?;
        check_shape(name, gain.dim(), (HIDDEN, 1))?;
        let shift = layer.bias()?.ok_or_else(|| format!("layer '{name}' of model '{model}' has no bias"))?;
        Ok(Norm { gain: gain.column(0).to_owned(), shift })
    }

    fn apply(&self, mut x: Array2<f32>) -> Array2<f32> {
        for mut row in x.rows_mut() {
            let mean = row.sum() / HIDDEN as f32;
            row -= mean;
            let variance = row.iter().map(|v| v * v).sum::<f32>() / HIDDEN as f32;
            row /= (variance + NORM_EPSILON).sqrt();
            row *= &self.gain;
            row += &self.shift;
        }
        x
    }
}
