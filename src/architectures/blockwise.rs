//! A model run block by block on texts, from whatever has its layers: what its layers' inputs are, for calibration.

use std::collections::BTreeMap;

use layerstore_core::transformer::{
    BlockInput, DecoderConfig, EncoderConfig, EncoderEmbedding, Observe, RunningBlock, RunningEncoderBlock,
};
use ndarray::Array2;
use serde_json::Value;

use super::bert::{BertConfig, bert};
use super::config::{LlamaConfig, llama};
use super::open::{GetLayer, attention_of};
use super::{bert, llama_blocks};
use crate::error::Result;
use crate::layer::{Accuracy, SharedLayer};

/// What a model's configuration says of its blocks.
#[derive(Debug, Clone)]
pub enum Blockwise {
    /// A decoder.
    Decoder(LlamaConfig),
    /// An encoder, and what its layers' names begin with.
    Encoder(BertConfig, &'static str),
}

/// A block with its layers.
#[derive(Debug)]
pub enum Block {
    /// Of a decoder.
    Decoder(DecoderConfig, Box<RunningBlock>),
    /// Of an encoder.
    Encoder(EncoderConfig, Box<RunningEncoderBlock>),
}

impl Blockwise {
    /// Reads a model's configuration; `has` says which layers there are.
    ///
    /// # Errors
    /// When its family is not run here, or a setting is not.
    pub fn new(config: &Value, has: impl Fn(&str) -> bool) -> Result<Self> {
        match bert::is_family(config["model_type"].as_str().unwrap_or_default()) {
            true => Ok(Blockwise::Encoder(bert(config)?, bert::prefix(has))),
            false => llama(config).map(Blockwise::Decoder),
        }
    }

    /// Returns whether texts are read one by one, each whole.
    pub fn is_encoder(&self) -> bool {
        matches!(self, Blockwise::Encoder(..))
    }

    /// Returns the number of blocks.
    pub fn blocks(&self) -> usize {
        match self {
            Blockwise::Decoder(config) => config.blocks,
            Blockwise::Encoder(config, _) => config.blocks,
        }
    }

    /// Returns the longest text, in tokens, where the configuration says it.
    pub fn context(&self) -> Option<usize> {
        match self {
            Blockwise::Decoder(config) => config.context,
            Blockwise::Encoder(config, _) => config.context,
        }
    }

    /// Returns the names of a block's linear layers, by what they have for inputs.
    pub fn names(&self, block: usize) -> BTreeMap<BlockInput, Vec<String>> {
        match self {
            Blockwise::Decoder(_) => llama_blocks::names(block),
            Blockwise::Encoder(_, prefix) => bert::names(prefix, block),
        }
    }

    /// Returns what stands before the first block.
    ///
    /// # Errors
    /// When a layer is missing.
    pub fn embedding(&self, layer: GetLayer) -> Result<Embedding> {
        match self {
            Blockwise::Decoder(_) => Ok(Embedding::Decoder(layer(llama_blocks::EMBEDDING)?)),
            Blockwise::Encoder(config, prefix) => {
                Ok(Embedding::Encoder(config.encoder, Box::new(bert::embedding(prefix, config, layer)?)))
            }
        }
    }

    /// Returns the names that the attention of a block may have, where it is stored.
    pub fn attentions(&self, block: usize) -> Vec<String> {
        match self {
            Blockwise::Decoder(_) => vec![llama_blocks::attention(block)],
            Blockwise::Encoder(_, prefix) => bert::attentions(prefix, block).into(),
        }
    }

    /// Puts a block together, its attention stored where `has` says so, else exact.
    ///
    /// # Errors
    /// When a layer is missing, or does not fit.
    pub fn block(&self, number: usize, features: usize, has: &dyn Fn(&str) -> bool, layer: GetLayer) -> Result<Block> {
        let attention = attention_of(&self.attentions(number), has, layer)?;
        match self {
            Blockwise::Decoder(config) => {
                let block = llama_blocks::block(config, number, attention, layer)?;
                let running = RunningBlock::new(&config.decoder, number, features, block)?;
                Ok(Block::Decoder(config.decoder.clone(), Box::new(running)))
            }
            Blockwise::Encoder(config, prefix) => {
                let block = bert::block(prefix, config, number, attention, layer)?;
                let running = RunningEncoderBlock::new(&config.encoder, number, features, block)?;
                Ok(Block::Encoder(config.encoder, Box::new(running)))
            }
        }
    }
}

/// What stands before the first block.
#[derive(Debug)]
pub enum Embedding {
    /// The table of tokens.
    Decoder(SharedLayer),
    /// Tables of tokens, positions and kinds.
    Encoder(EncoderConfig, Box<EncoderEmbedding>),
}

impl Embedding {
    /// Returns what a text's tokens become, `[tokens, features]`.
    ///
    /// # Errors
    /// When a token is not known, or there are too many.
    pub fn of(&self, tokens: &[u32]) -> Result<Array2<f32>> {
        match self {
            Embedding::Decoder(table) => table.rows(tokens),
            Embedding::Encoder(config, embedding) => embedding.of(config, tokens),
        }
    }
}

impl Block {
    /// Runs the block on a text `[tokens, features]`, and shows inputs to `observe`.
    ///
    /// # Errors
    /// When a number is not finite, or `observe` fails.
    pub fn run(&self, x: &mut Array2<f32>, accuracy: Accuracy, observe: Option<Observe>) -> Result<()> {
        match self {
            Block::Decoder(config, block) => block.run(config, x, accuracy, observe),
            Block::Encoder(config, block) => block.run(config, x, accuracy, observe),
        }
    }
}
