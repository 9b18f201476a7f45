//! A block of a decoder: attention and a gated feed-forward network.

use ndarray::{Array2, ArrayView2};

use super::attention::{Scores, attend, attend_by_layer, check_attention};
use super::config::DecoderConfig;
use super::kv_cache::{BlockCache, CacheType, HeadCache, KvCache};
use super::linears::Linears;
use super::norm::Norm;
use super::rotary::Angles;
use crate::error::{Error, Result};
use crate::layer::{Accuracy, SharedLayer, VqAttentionLayer};
use crate::linalg::share_rows;
use crate::quant::SharedInputs;

/// The layers of a block, of any method.
#[derive(Debug, Clone)]
pub struct DecoderBlock {
    /// Before the attention.
    pub attention_norm: Norm,
    /// `[heads · head_dim, features]`.
    pub query: SharedLayer,
    /// `[kv heads · head_dim, features]`.
    pub key: SharedLayer,
    /// `[kv heads · head_dim, features]`.
    pub value: SharedLayer,
    /// `[features, heads · head_dim]`.
    pub output: SharedLayer,
    /// Of each head's queries, before they are turned.
    pub query_norm: Option<Norm>,
    /// Of each head's keys.
    pub key_norm: Option<Norm>,
    /// Attention by codes, whose cache does not grow with the text; `None` for exact attention.
    pub attention: Option<VqAttentionLayer>,
    /// Before the feed-forward network.
    pub feed_forward_norm: Norm,
    /// `[hidden, features]`, whose outputs go through the activation.
    pub gate: SharedLayer,
    /// `[hidden, features]`.
    pub up: SharedLayer,
    /// `[features, hidden]`.
    pub down: SharedLayer,
}

impl DecoderBlock {
    /// Returns the linear layers.
    pub fn linears(&self) -> impl Iterator<Item = &SharedLayer> {
        let DecoderBlock { query, key, value, output, gate, up, down, .. } = self;
        [query, key, value, output, gate, up, down].into_iter()
    }
}

/// Which of a block's layers have the same inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockInput {
    /// Queries, keys and values.
    Attention,
    /// The layer behind the attention.
    AttentionOutput,
    /// The first layers of the feed-forward network.
    FeedForward,
    /// Its last layer.
    FeedForwardOutput,
    /// No layer, but the attention itself: its queries, turned and by heads, as `[tokens, heads · head_dim]`.
    Queries,
    /// Its keys, likewise.
    Keys,
    /// Its values, likewise.
    Values,
}

/// Sees inputs `[rows, features]` before the layers do.
pub type Observe<'a> = &'a mut dyn FnMut(BlockInput, ArrayView2<f32>) -> Result<()>;

/// A block that is ready to run: layers that share inputs are run at once.
#[derive(Debug)]
pub struct RunningBlock {
    block: DecoderBlock,
    attention: Linears,
    output: Linears,
    gates: Linears,
    down: Linears,
}

/// Memory for what is between layers, used again and again.
#[derive(Debug, Default)]
pub(super) struct Workspace {
    pub(super) x: Vec<f32>,
    pub(super) normed: Vec<f32>,
    angles: Vec<Angles>,
    /// Angles of this pass.
    turned: usize,
    pub(super) inputs: SharedInputs,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    added: Vec<f32>,
    scores: Scores,
}

impl RunningBlock {
    /// Prepares a block, whose number messages name.
    ///
    /// # Errors
    /// When a layer's shape does not fit the others: the message says which.
    pub fn new(config: &DecoderConfig, number: usize, features: usize, block: DecoderBlock) -> Result<Self> {
        config.check()?;
        let DecoderConfig { heads, kv_heads, head_dim, .. } = *config;
        let of = |part: &str| format!("the {part} of block {number}");
        let hidden = block.up.out_features();
        check_shape(of("query"), &block.query, heads * head_dim, features)?;
        check_shape(of("key"), &block.key, kv_heads * head_dim, features)?;
        check_shape(of("value"), &block.value, kv_heads * head_dim, features)?;
        check_shape(of("output"), &block.output, features, heads * head_dim)?;
        check_shape(of("gate"), &block.gate, hidden, features)?;
        check_shape(of("up"), &block.up, hidden, features)?;
        check_shape(of("down"), &block.down, features, hidden)?;
        check_norm(of("attention norm"), &block.attention_norm, features)?;
        check_norm(of("feed-forward norm"), &block.feed_forward_norm, features)?;
        for norm in block.query_norm.iter().chain(&block.key_norm) {
            check_norm(of("norm of queries and keys"), norm, head_dim)?;
        }
        if let Some(attention) = &block.attention {
            check_attention(of("attention"), attention, (heads, kv_heads, head_dim), true)?;
            if let Some(window) = config.window {
                let expected = "none: attention by codes has no sliding window";
                return Err(Error::expected(of("attention"), format!("a window of {window} tokens"), expected));
            }
        }
        Ok(RunningBlock {
            attention: Linears::new(&[&block.query, &block.key, &block.value]),
            output: Linears::new(&[&block.output]),
            gates: Linears::new(&[&block.gate, &block.up]),
            down: Linears::new(&[&block.down]),
            block,
        })
    }

    /// Returns the layers.
    pub fn layers(&self) -> &DecoderBlock {
        &self.block
    }

    /// Runs the block on a text `[tokens, features]` from its beginning, and shows inputs to `observe`.
    ///
    /// # Errors
    /// When a number is not finite, or `observe` fails.
    pub fn run(
        &self,
        config: &DecoderConfig,
        x: &mut Array2<f32>,
        accuracy: Accuracy,
        observe: Option<Observe>,
    ) -> Result<()> {
        let length = x.nrows();
        let mut workspace = Workspace::default();
        workspace.x.extend(x.iter());
        workspace.turn_from(config, 0, length, length);
        let mut cache = self.cache(config, CacheType::F32);
        self.forward(config, &mut workspace, std::iter::once((length, &mut cache)), accuracy, observe)?;
        x.iter_mut().zip(&workspace.x).for_each(|(x, found)| *x = *found);
        Ok(())
    }

    /// Returns an empty cache for the block.
    pub(super) fn cache(&self, config: &DecoderConfig, kind: CacheType) -> BlockCache {
        match self.block.attention.as_ref().and_then(|attention| attention.empty_cache(1)) {
            Some(cache) => BlockCache::Codes(Box::new(cache)),
            None => KvCache::new(kind, 1, config.kv_heads, config.head_dim).blocks.remove(0),
        }
    }

    /// Adds what the block gives to `workspace.x`, whose rows are tokens of several texts, one after another, so many of each.
    pub(super) fn forward<'a>(
        &self,
        config: &DecoderConfig,
        workspace: &mut Workspace,
        texts: impl Iterator<Item = (usize, &'a mut BlockCache)>,
        accuracy: Accuracy,
        mut observe: Option<Observe>,
    ) -> Result<()> {
        let Workspace { x, normed, angles, turned: _, inputs, q, k, v, attended, gate, up, added, scores } = workspace;
        let block = &self.block;
        let mut see = |input: BlockInput, x: &[f32], width: usize| match &mut observe {
            Some(observe) => {
                observe(input, ArrayView2::from_shape((x.len() / width, width), x).expect("rows of a matrix"))
            }
            None => Ok(()),
        };
        block.attention_norm.write(x, normed);
        see(BlockInput::Attention, normed, block.query.in_features())?;
        self.attention.forward(normed, accuracy, &mut [q, k, v], inputs)?;
        turn(config, q, config.heads, block.query_norm.as_ref(), angles);
        turn(config, k, config.kv_heads, block.key_norm.as_ref(), angles);
        let (q_width, kv_width) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        for (input, all, width) in [
            (BlockInput::Queries, &*q, q_width),
            (BlockInput::Keys, &*k, kv_width),
            (BlockInput::Values, &*v, kv_width),
        ] {
            see(input, all, width)?;
        }
        attended.resize(q.len(), 0.0);
        let mut first = 0;
        for (tokens, cache) in texts {
            let rows = first..first + tokens;
            let own = rows.start * kv_width..rows.end * kv_width;
            let (k, v) = (&k[own.clone()], &v[own]);
            let own = rows.start * q_width..rows.end * q_width;
            let (q, attended) = (&q[own.clone()], &mut attended[own]);
            match (cache, &block.attention) {
                (BlockCache::Exact(heads), _) => {
                    HeadCache::extend(heads, k, v);
                    attend(config, q, heads, scores, attended);
                }
                (BlockCache::Codes(cache), Some(layer)) => {
                    attend_by_layer(layer, [q, k, v], Some(&mut **cache), attended)?
                }
                (BlockCache::Codes(_), None) => {
                    return Err(Error::expected("cache of a block", "one of codes", "one of keys and values"));
                }
            }
            first = rows.end;
        }
        see(BlockInput::AttentionOutput, attended, q_width)?;
        self.output.forward(attended, accuracy, &mut [added], inputs)?;
        add(x, added);
        block.feed_forward_norm.write(x, normed);
        see(BlockInput::FeedForward, normed, block.up.in_features())?;
        self.gates.forward(normed, accuracy, &mut [gate, up], inputs)?;
        share_rows(gate, 1, |first, some| config.activation.gate(some, &up[first..first + some.len()]));
        see(BlockInput::FeedForwardOutput, gate, block.down.in_features())?;
        self.down.forward(gate, accuracy, &mut [added], inputs)?;
        add(x, added);
        Ok(())
    }
}

impl Workspace {
    /// Adds the angles of the positions from `start` on of a text that will be so long.
    pub(super) fn turn_from(&mut self, config: &DecoderConfig, start: usize, tokens: usize, length: usize) {
        for position in start..start + tokens {
            if self.turned == self.angles.len() {
                self.angles.push(Angles::default());
            }
            config.rotary.write(position, length, &mut self.angles[self.turned]);
            self.turned += 1;
        }
    }

    /// Forgets the angles of an earlier pass; their memory serves the next one's.
    pub(super) fn begin_angles(&mut self) {
        self.turned = 0;
    }
}

/// Norms and turns each head of each token.
fn turn(config: &DecoderConfig, all: &mut [f32], heads: usize, norm: Option<&Norm>, angles: &[Angles]) {
    let width = heads * config.head_dim;
    share_rows(all, width, |first, rows| {
        for (row, angles) in rows.chunks_exact_mut(width).zip(&angles[first..]) {
            for head in row.chunks_exact_mut(config.head_dim) {
                if let Some(norm) = norm {
                    norm.apply(head);
                }
                angles.turn(head);
            }
        }
    });
}

/// Adds numbers to others.
fn add(x: &mut [f32], more: &[f32]) {
    share_rows(x, 1, |first, some| some.iter_mut().zip(&more[first..]).for_each(|(x, more)| *x += more));
}

/// Checks that a layer is linear and of this shape.
pub(super) fn check_shape(what: String, layer: &SharedLayer, out: usize, input: usize) -> Result<()> {
    layer.require_linear()?;
    let found = [layer.out_features(), layer.in_features()];
    if found.contains(&0) {
        return Err(Error::expected(format!("shape of {what}"), format!("{found:?}"), "rows and columns"));
    }
    match found == [out, input] {
        true => Ok(()),
        false => Err(Error::expected(format!("shape of {what}"), format!("{found:?}"), format!("[{out}, {input}]"))),
    }
}

/// Checks that a norm is of so many features.
pub(super) fn check_norm(what: String, norm: &Norm, features: usize) -> Result<()> {
    match norm.features() == features {
        true => Ok(()),
        false => Err(Error::expected(format!("features of {what}"), norm.features(), features)),
    }
}
