//! Decoders of Llama's kind: blocks of attention over the tokens before, and gated units.

use ndarray::{Array2, ArrayView2, s};

use super::kv_cache::{BlockCache, KvCache};
use super::norm::Norm;
use super::rotary::{Angles, Rotary};
use crate::error::{Error, Result};
use crate::layer::{Accuracy, Activation, SharedLayer};
use crate::linalg::{in_pool, matmul, matmul_nt, on_all_threads};

/// Queries that are scored at a time.
const TILE: usize = 128;

/// Tokens that go through all blocks at a time.
const CHUNK: usize = 512;

/// Multiply-adds of an attention below which one thread does it all.
const PARALLEL_FROM: usize = 1 << 20;

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
    /// Before the feed-forward network.
    pub feed_forward_norm: Norm,
    /// `[hidden, features]`, whose outputs go through the activation.
    pub gate: SharedLayer,
    /// `[hidden, features]`.
    pub up: SharedLayer,
    /// `[features, hidden]`.
    pub down: SharedLayer,
}

/// How the blocks of a decoder attend.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Heads of queries.
    pub heads: usize,
    /// Heads of keys and values, of which each serves as many heads of queries.
    pub kv_heads: usize,
    /// Numbers of a head.
    pub head_dim: usize,
    /// Positions.
    pub rotary: Rotary,
    /// How many tokens a token sees, itself counted; `None` for all before it.
    pub window: Option<usize>,
    /// What gates go through.
    pub activation: Activation,
}

/// A decoder with its embedding and head: from tokens to the logits of the next ones.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: DecoderConfig,
    embedding: SharedLayer,
    blocks: Vec<DecoderBlock>,
    norm: Norm,
    head: SharedLayer,
}

/// Of which tokens logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// Of the last.
    Last,
    /// Of all.
    All,
}

impl Decoder {
    /// Returns a decoder of these layers.
    ///
    /// # Errors
    /// When a layer's shape does not fit the others: the message says which.
    pub fn new(
        config: DecoderConfig,
        embedding: SharedLayer,
        blocks: Vec<DecoderBlock>,
        norm: Norm,
        head: SharedLayer,
    ) -> Result<Self> {
        let DecoderConfig { heads, kv_heads, head_dim, ref rotary, window, .. } = config;
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) || window == Some(0) {
            let found = format!("{heads} heads of queries, {kv_heads} of keys, window {window:?}");
            return Err(Error::expected(
                "heads of a decoder",
                found,
                "a multiple of those of keys, and a window above 0",
            ));
        }
        if rotary.dimensions() > head_dim {
            let found = format!("{} of {head_dim}", rotary.dimensions());
            return Err(Error::expected("numbers of a head that are turned", found, "no more than it has"));
        }
        let features = embedding.in_features();
        let check = |what: String, layer: &SharedLayer, out: usize, input: usize| {
            layer.require_linear()?;
            let found = [layer.out_features(), layer.in_features()];
            match found == [out, input] {
                true => Ok(()),
                false => {
                    Err(Error::expected(format!("shape of {what}"), format!("{found:?}"), format!("[{out}, {input}]")))
                }
            }
        };
        let norms = |what: String, norm: &Norm, features: usize| match norm.features() == features {
            true => Ok(()),
            false => Err(Error::expected(format!("features of {what}"), norm.features(), features)),
        };
        for (number, block) in blocks.iter().enumerate() {
            let of = |part: &str| format!("the {part} of block {number}");
            let hidden = block.up.out_features();
            check(of("query"), &block.query, heads * head_dim, features)?;
            check(of("key"), &block.key, kv_heads * head_dim, features)?;
            check(of("value"), &block.value, kv_heads * head_dim, features)?;
            check(of("output"), &block.output, features, heads * head_dim)?;
            check(of("gate"), &block.gate, hidden, features)?;
            check(of("up"), &block.up, hidden, features)?;
            check(of("down"), &block.down, features, hidden)?;
            norms(of("attention norm"), &block.attention_norm, features)?;
            norms(of("feed-forward norm"), &block.feed_forward_norm, features)?;
            for norm in block.query_norm.iter().chain(&block.key_norm) {
                norms(of("norm of queries and keys"), norm, head_dim)?;
            }
        }
        norms("the last norm".into(), &norm, features)?;
        check("the head".into(), &head, embedding.out_features(), features)?;
        Ok(Decoder { config, embedding, blocks, norm, head })
    }

    /// Returns the number of tokens that it knows.
    pub fn vocabulary(&self) -> usize {
        self.embedding.out_features()
    }

    /// Returns the number of features of a token.
    pub fn features(&self) -> usize {
        self.embedding.in_features()
    }

    /// Returns the table of tokens.
    pub fn embedding(&self) -> &SharedLayer {
        &self.embedding
    }

    /// Returns the norm behind the last block.
    pub fn norm(&self) -> &Norm {
        &self.norm
    }

    /// Returns the layer from features to logits.
    pub fn head(&self) -> &SharedLayer {
        &self.head
    }

    /// Returns how blocks attend.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Returns the blocks.
    pub fn blocks(&self) -> &[DecoderBlock] {
        &self.blocks
    }

    /// Returns a cache for a text that has not begun.
    pub fn cache(&self) -> KvCache {
        KvCache::new(self.blocks.len(), self.config.kv_heads, self.config.head_dim)
    }

    /// Reads tokens that follow those in the cache, and returns the logits `[tokens or 1, vocabulary]` of what comes next.
    ///
    /// # Errors
    /// When there are none, one is not known, or a number is not finite.
    pub fn forward(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        logits: Logits,
        accuracy: Accuracy,
    ) -> Result<Array2<f32>> {
        if tokens.is_empty() {
            return Err(Error::expected("tokens to read", "none", "one at least"));
        }
        let before = cache.len();
        let read = self.read(tokens, cache, logits, accuracy);
        if read.is_err() {
            cache.truncate(before);
        }
        read
    }

    fn read(&self, tokens: &[u32], cache: &mut KvCache, logits: Logits, accuracy: Accuracy) -> Result<Array2<f32>> {
        let length = cache.len() + tokens.len();
        let mut all = match logits {
            Logits::All => Array2::zeros((tokens.len(), self.vocabulary())),
            Logits::Last => Array2::zeros((1, self.vocabulary())),
        };
        let mut first = 0;
        for chunk in tokens.chunks(CHUNK) {
            let mut x = self.embedding.rows(chunk)?;
            let start = cache.len();
            let angles: Vec<Angles> =
                (start..start + chunk.len()).map(|position| self.config.rotary.at(position, length)).collect();
            for (number, block) in self.blocks.iter().enumerate() {
                self.block(block, &mut x, cache.block(number), &angles, accuracy)?;
            }
            cache.seen(chunk.len());
            match logits {
                Logits::All => {
                    let y = self.head.forward(self.norm.of(x.view()).view(), accuracy)?.y;
                    all.slice_mut(s![first..first + chunk.len(), ..]).assign(&y);
                }
                Logits::Last if first + chunk.len() == tokens.len() => {
                    let last = x.slice(s![chunk.len() - 1.., ..]);
                    all = self.head.forward(self.norm.of(last).view(), accuracy)?.y;
                }
                Logits::Last => {}
            }
            first += chunk.len();
        }
        Ok(all)
    }

    /// One block: attention and feed-forward network, each added to what came in.
    fn block(
        &self,
        block: &DecoderBlock,
        x: &mut Array2<f32>,
        cache: &mut BlockCache,
        angles: &[Angles],
        accuracy: Accuracy,
    ) -> Result<()> {
        let run = |layer: &SharedLayer, x: ArrayView2<f32>| Ok::<_, Error>(layer.forward(x, accuracy)?.y);
        let normed = block.attention_norm.of(x.view());
        let mut q = run(&block.query, normed.view())?;
        let mut k = run(&block.key, normed.view())?;
        let v = run(&block.value, normed.view())?;
        self.turn(&mut q, block.query_norm.as_ref(), angles);
        self.turn(&mut k, block.key_norm.as_ref(), angles);
        cache.extend(k.view(), v.view());
        let attended = self.attend(q.view(), cache);
        *x += &run(&block.output, attended.view())?;
        let normed = block.feed_forward_norm.of(x.view());
        let mut hidden = run(&block.gate, normed.view())?;
        let up = run(&block.up, normed.view())?;
        hidden.zip_mut_with(&up, |gate, up| *gate = self.config.activation.eval(*gate) * up);
        *x += &run(&block.down, hidden.view())?;
        Ok(())
    }

    /// Norms and turns each head of each token.
    fn turn(&self, heads: &mut Array2<f32>, norm: Option<&Norm>, angles: &[Angles]) {
        for (mut row, angles) in heads.rows_mut().into_iter().zip(angles) {
            let row = row.as_slice_mut().expect("rows of an owned array");
            for head in row.chunks_exact_mut(self.config.head_dim) {
                if let Some(norm) = norm {
                    norm.apply(head);
                }
                angles.turn(head);
            }
        }
    }

    /// Attention of the last tokens, whose queries are `[tokens, heads · head_dim]`, to those of the cache that they see.
    fn attend(&self, q: ArrayView2<f32>, cache: &BlockCache) -> Array2<f32> {
        let DecoderConfig { heads, kv_heads, head_dim, window, .. } = self.config;
        let (tokens, group) = (q.nrows(), heads / kv_heads);
        let length = cache.head(0).0.nrows();
        let scale = 1.0 / (head_dim as f32).sqrt();
        let mut output = Array2::<f32>::zeros((tokens, heads * head_dim));
        let mut parts = vec![];
        for (head, columns) in output.axis_chunks_iter_mut(ndarray::Axis(1), head_dim).enumerate() {
            parts.push((head, columns));
        }
        let work = |(head, mut out): (usize, ndarray::ArrayViewMut2<f32>)| {
            let (keys, values) = cache.head(head / group);
            for first in (0..tokens).step_by(TILE) {
                let end = tokens.min(first + TILE);
                // Positions of the tile's first and last queries among the keys.
                let (low, high) = (length - tokens + first, length - tokens + end);
                let begin = window.map_or(0, |window| (low + 1).saturating_sub(window));
                let q = q.slice(s![first..end, head * head_dim..(head + 1) * head_dim]);
                let mut scores = matmul_nt(q, keys.slice(s![begin..high, ..]));
                for (i, mut row) in scores.rows_mut().into_iter().enumerate() {
                    let position = low + i;
                    let seen = begin.max(window.map_or(0, |window| (position + 1).saturating_sub(window)));
                    let row = row.as_slice_mut().expect("rows of an owned array");
                    softmax(row, scale, seen - begin..position + 1 - begin);
                }
                out.slice_mut(s![first..end, ..]).assign(&matmul(scores.view(), values.slice(s![begin..high, ..])));
            }
        };
        if tokens * length * heads * head_dim < PARALLEL_FROM {
            parts.into_iter().for_each(work);
        } else {
            in_pool(|| on_all_threads(parts, work));
        }
        output
    }
}

/// Replaces scores by their shares, of those that are seen; others are 0.
fn softmax(row: &mut [f32], scale: f32, seen: std::ops::Range<usize>) {
    let most = row[seen.clone()].iter().fold(f32::NEG_INFINITY, |most, v| most.max(*v));
    let mut sum = 0.0;
    for score in &mut row[seen.clone()] {
        *score = ((*score - most) * scale).exp();
        sum += *score;
    }
    row[..seen.start].fill(0.0);
    row[seen.end..].fill(0.0);
    row[seen].iter_mut().for_each(|share| *share /= sum);
}
