//! Decoders of Llama's kind: blocks of attention over the tokens before, and gated units.

use std::sync::{Mutex, PoisonError};

use ndarray::Array2;

use super::config::DecoderConfig;
use super::decoder_block::{DecoderBlock, RunningBlock, Workspace, check_norm, check_shape};
use super::kv_cache::{BlockCache, CacheType, KvCache};
use super::linears::Linears;
use super::norm::Norm;
use crate::error::{Error, Result};
use crate::layer::{Accuracy, Layer, SharedLayer};
use crate::linalg::require_finite;

/// Tokens that go through all blocks at a time, at most.
const CHUNK: usize = 512;

/// Tokens from which on weights that are read for all of them take little time.
const LEAST_CHUNK: usize = 128;

/// Bytes of what is between layers that more than [`LEAST_CHUNK`] tokens may take.
const WORKSPACE_BYTES: usize = 32 << 20;

/// A decoder with its embedding and head: from tokens to the logits of the next ones.
#[derive(Debug)]
pub struct Decoder {
    config: DecoderConfig,
    embedding: SharedLayer,
    blocks: Vec<RunningBlock>,
    norm: Norm,
    head: SharedLayer,
    running_head: Linears,
    /// Tokens that go through all blocks at a time.
    chunk: usize,
    /// The sizes of an exact block's cache.
    empty_block: BlockCache,
    /// Of passes that have ended, for those to come.
    workspaces: Mutex<Vec<Workspace>>,
}

/// Of which tokens logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logits {
    /// Of the last.
    Last,
    /// Of all.
    All,
}

/// Tokens that follow those in the cache of a text.
#[derive(Debug)]
pub struct Continuation<'a> {
    /// The tokens, one at least.
    pub tokens: &'a [u32],
    /// What came before them; afterwards, they are in it.
    pub cache: &'a mut KvCache,
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
        config.check()?;
        let features = embedding.in_features();
        let running = |(number, block)| RunningBlock::new(&config, number, features, block);
        let blocks = blocks.into_iter().enumerate().map(running).collect::<Result<Vec<_>>>()?;
        check_norm("the last norm".into(), &norm, features)?;
        check_shape("the head".into(), &head, embedding.out_features(), features)?;
        let running_head = Linears::new(&[&head]);
        let empty_block = KvCache::new(CacheType::F32, 1, config.kv_heads, config.head_dim).blocks.remove(0);
        let hidden = blocks.iter().map(|block| block.layers().up.out_features()).max().unwrap_or(0);
        // Features, queries, keys, values and what attention gives; gates and what they are for, and inputs as they are laid out.
        let bytes = size_of::<f32>() * (8 * features + 4 * hidden);
        let chunk = (WORKSPACE_BYTES / bytes.max(1) / LEAST_CHUNK * LEAST_CHUNK).clamp(LEAST_CHUNK, CHUNK);
        Ok(Decoder {
            config,
            embedding,
            blocks,
            norm,
            head,
            running_head,
            chunk,
            empty_block,
            workspaces: Mutex::default(),
        })
    }

    /// Returns the same decoder with other layers in place of its own, those that `change` gives for each.
    ///
    /// # Errors
    /// When `change` fails, or a layer does not fit.
    pub fn with_layers(&self, mut change: impl FnMut(&SharedLayer) -> Result<SharedLayer>) -> Result<Self> {
        let is_tied = std::ptr::addr_eq(&*self.head, &*self.embedding);
        let embedding = change(&self.embedding)?;
        let head = if is_tied { embedding.clone() } else { change(&self.head)? };
        let mut blocks = vec![];
        for block in self.blocks() {
            blocks.push(DecoderBlock {
                query: change(&block.query)?,
                key: change(&block.key)?,
                value: change(&block.value)?,
                output: change(&block.output)?,
                gate: change(&block.gate)?,
                up: change(&block.up)?,
                down: change(&block.down)?,
                ..block.clone()
            });
        }
        Decoder::new(self.config.clone(), embedding, blocks, self.norm.clone(), head)
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
    pub fn blocks(&self) -> impl ExactSizeIterator<Item = &DecoderBlock> {
        self.blocks.iter().map(RunningBlock::layers)
    }

    /// Returns the memory that the layers take, in bytes; a head that is the embedding counts once.
    pub fn memory_bytes(&self) -> usize {
        let of_block = |block: &DecoderBlock| {
            let attention = block.attention.as_ref().map_or(0, |attention| attention.memory_bytes());
            block.linears().map(|layer| layer.memory_bytes()).sum::<usize>() + attention
        };
        let is_tied = std::ptr::addr_eq(&*self.head, &*self.embedding);
        let head = if is_tied { 0 } else { self.head.memory_bytes() };
        self.embedding.memory_bytes() + head + self.blocks().map(of_block).sum::<usize>()
    }

    /// Returns a cache for a text that has not begun.
    pub fn cache(&self, kind: CacheType) -> KvCache {
        let mut cache = KvCache::new(kind, 0, self.config.kv_heads, self.config.head_dim);
        cache.blocks.extend(self.blocks.iter().map(|block| block.cache(&self.config, kind)));
        cache
    }

    /// Returns whether a cache is of this decoder's sizes.
    fn owns(&self, cache: &KvCache) -> bool {
        let fits = |(cache, block): (&BlockCache, &RunningBlock)| match (cache, &block.layers().attention) {
            (BlockCache::Exact(_), None) => cache.is_like(&self.empty_block),
            (BlockCache::Codes(own), Some(attention)) => {
                let settings = attention.settings();
                let sizes = (1, settings.kv_heads(), settings.key_codes().unwrap_or(0), settings.d_v.unwrap_or(0));
                own.means.dim() == sizes
            }
            _ => false,
        };
        cache.blocks.len() == self.blocks.len() && cache.blocks.iter().zip(&self.blocks).all(fits)
    }

    /// Reads tokens that follow those in the cache, and returns the logits `[tokens or 1, vocabulary]` of what comes next.
    ///
    /// # Errors
    /// When there are none, one is not known, the cache is another decoder's, or a number is not finite. The cache is then as it was; or,
    /// where blocks attend by codes and had seen some of the tokens, empty.
    pub fn forward(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        logits: Logits,
        accuracy: Accuracy,
    ) -> Result<Array2<f32>> {
        let mut found = vec![];
        self.forward_into(&mut [Continuation { tokens, cache }], logits, accuracy, &mut found)?;
        let rows = found.len() / self.vocabulary().max(1);
        Ok(Array2::from_shape_vec((rows, self.vocabulary()), found).expect("rows of logits"))
    }

    /// Does what [`Decoder::forward`] does for several texts at once: each weight is read once for all of them. The logits, row after
    /// row and text after text, replace what is in `logits`.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn forward_into(
        &self,
        texts: &mut [Continuation],
        wanted: Logits,
        accuracy: Accuracy,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        logits.clear();
        for text in texts.iter() {
            if text.tokens.is_empty() {
                return Err(Error::expected("tokens to read", "none", "one at least"));
            }
            if !self.owns(text.cache) {
                return Err(Error::expected("cache of keys and values", "another decoder's", "one of this decoder"));
            }
        }
        let lock = || self.workspaces.lock().unwrap_or_else(PoisonError::into_inner);
        let mut workspace = lock().pop().unwrap_or_default();
        let read = self.read(texts, wanted, accuracy, &mut workspace, logits);
        lock().push(workspace);
        read
    }

    fn read(
        &self,
        texts: &mut [Continuation],
        wanted: Logits,
        accuracy: Accuracy,
        workspace: &mut Workspace,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let all: usize = texts.iter().map(|text| text.tokens.len()).sum();
        if all <= self.chunk {
            let read = self.read_at_once(texts, wanted, accuracy, workspace, logits);
            if read.is_err() {
                // Tokens that have not gone through all of it are not counted.
                texts.iter_mut().for_each(|text| text.cache.undo(text.cache.len()));
            }
            return read;
        }
        let befores: Vec<usize> = texts.iter().map(|text| text.cache.len()).collect();
        let mut some = vec![];
        let mut read = || {
            let mut first = 0;
            while first < texts.len() {
                // As many as fit in one pass; what is longer than that goes by itself.
                let (mut end, mut tokens) = (first, 0);
                while end < texts.len() && tokens + texts[end].tokens.len() <= self.chunk {
                    tokens += texts[end].tokens.len();
                    end += 1;
                }
                if end > first {
                    self.read_at_once(&mut texts[first..end], wanted, accuracy, workspace, &mut some)?;
                    logits.extend_from_slice(&some);
                    first = end;
                    continue;
                }
                let text = &mut texts[first];
                text.cache.expect(text.cache.length_of(text.cache.len() + text.tokens.len()));
                let mut left = text.tokens.len();
                for tokens in text.tokens.chunks(self.chunk) {
                    left -= tokens.len();
                    let part = &mut [Continuation { tokens, cache: &mut *text.cache }];
                    self.read_at_once(part, wanted, accuracy, workspace, &mut some)?;
                    if wanted == Logits::All || left == 0 {
                        logits.extend_from_slice(&some);
                    }
                }
                first += 1;
            }
            Ok(())
        };
        let read = read();
        if read.is_err() {
            texts.iter_mut().zip(befores).for_each(|(text, before)| text.cache.undo(before));
        }
        read
    }

    /// Reads all tokens in one pass.
    fn read_at_once(
        &self,
        texts: &mut [Continuation],
        wanted: Logits,
        accuracy: Accuracy,
        workspace: &mut Workspace,
        logits: &mut Vec<f32>,
    ) -> Result<()> {
        let features = self.features();
        workspace.x.clear();
        workspace.begin_angles();
        for text in texts.iter() {
            workspace.x.extend(self.embedding.rows(text.tokens)?.iter());
            let (start, tokens) = (text.cache.len(), text.tokens.len());
            workspace.turn_from(&self.config, start, tokens, text.cache.length_of(start + tokens));
        }
        for (number, block) in self.blocks.iter().enumerate() {
            let caches = texts.iter_mut().map(|text| (text.tokens.len(), &mut text.cache.blocks[number]));
            block.forward(&self.config, workspace, caches, accuracy, None)?;
        }
        if wanted == Logits::Last {
            // The last token of each text, one after another.
            let (mut end, mut place) = (0, 0);
            for text in texts.iter() {
                end += text.tokens.len();
                workspace.x.copy_within((end - 1) * features..end * features, place * features);
                place += 1;
            }
            workspace.x.truncate(place * features);
        }
        require_finite("the features behind the last block", workspace.x.iter())?;
        self.norm.write(&workspace.x, &mut workspace.normed);
        self.running_head.forward(&workspace.normed, accuracy, &mut [logits], &mut workspace.inputs)?;
        texts.iter_mut().for_each(|text| text.cache.seen(text.tokens.len()));
        Ok(())
    }
}
