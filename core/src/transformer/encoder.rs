//! Encoders of BERT's kind: blocks of attention over a whole text, each followed by a norm.

use std::sync::{Mutex, PoisonError};

use ndarray::{Array2, ArrayView2};

use super::attention::{attend_all, attend_by_layer, check_attention};
use super::decoder_block::{BlockInput, Observe, check_norm, check_shape};
use super::linears::Linears;
use super::norm::Norm;
use crate::error::{Error, Result};
use crate::layer::{Accuracy, Activation, Layer, SharedLayer, VqAttentionLayer};
use crate::linalg::require_finite;
use crate::quant::SharedInputs;

/// Tokens that go through a block at a time, more where one text is longer.
const CHUNK: usize = 512;

/// The layers of a block, of any method.
#[derive(Debug, Clone)]
pub struct EncoderBlock {
    /// `[features, features]`.
    pub query: SharedLayer,
    /// `[features, features]`.
    pub key: SharedLayer,
    /// `[features, features]`.
    pub value: SharedLayer,
    /// Attention of another kind; `None` for exact attention.
    pub attention: Option<VqAttentionLayer>,
    /// `[features, features]`, behind the attention.
    pub attention_output: SharedLayer,
    /// Of what the attention was added to.
    pub attention_norm: Norm,
    /// `[hidden, features]`, whose outputs go through the activation.
    pub intermediate: SharedLayer,
    /// `[features, hidden]`.
    pub output: SharedLayer,
    /// Of what the feed-forward network was added to.
    pub output_norm: Norm,
}

/// What an encoder is, beside its layers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EncoderConfig {
    /// Heads, each of `features / heads` numbers.
    pub heads: usize,
    /// The position of a text's first token.
    pub first_position: usize,
    /// Behind the first layer of the feed-forward network.
    pub activation: Activation,
}

/// What tokens become before the first block.
#[derive(Debug, Clone)]
pub struct EncoderEmbedding {
    /// A row for each token.
    pub tokens: SharedLayer,
    /// A row for each position.
    pub positions: SharedLayer,
    /// A row for each kind of text, of which the first is used; `None` where there are none.
    pub kinds: Option<SharedLayer>,
    /// Of their sum.
    pub norm: Norm,
}

/// A block that is ready to run: layers that share inputs are run at once.
#[derive(Debug)]
pub struct RunningEncoderBlock {
    block: EncoderBlock,
    attention: Linears,
    attention_output: Linears,
    intermediate: Linears,
    output: Linears,
}

/// An encoder: from the tokens of texts to the features of each token.
#[derive(Debug)]
pub struct Encoder {
    config: EncoderConfig,
    embedding: EncoderEmbedding,
    blocks: Vec<RunningEncoderBlock>,
    workspaces: Mutex<Vec<Workspace>>,
}

/// Memory for what is between layers, used again and again.
#[derive(Debug, Default)]
struct Workspace {
    x: Vec<f32>,
    inputs: SharedInputs,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    hidden: Vec<f32>,
    added: Vec<f32>,
    normed: Vec<f32>,
}

impl RunningEncoderBlock {
    /// Prepares a block, whose number messages name.
    ///
    /// # Errors
    /// When a layer's shape does not fit the others: the message says which.
    pub fn new(config: &EncoderConfig, number: usize, features: usize, block: EncoderBlock) -> Result<Self> {
        if config.heads == 0 || !features.is_multiple_of(config.heads) {
            let expected = "a divisor of the features";
            return Err(Error::expected("heads of an encoder", format!("{} of {features}", config.heads), expected));
        }
        let of = |part: &str| format!("the {part} of block {number}");
        let hidden = block.intermediate.out_features();
        for (part, layer) in [
            ("query", &block.query),
            ("key", &block.key),
            ("value", &block.value),
            ("attention output", &block.attention_output),
        ] {
            check_shape(of(part), layer, features, features)?;
        }
        check_shape(of("intermediate layer"), &block.intermediate, hidden, features)?;
        check_shape(of("output"), &block.output, features, hidden)?;
        check_norm(of("attention norm"), &block.attention_norm, features)?;
        check_norm(of("output norm"), &block.output_norm, features)?;
        if let Some(attention) = &block.attention {
            let heads = (config.heads, config.heads, features / config.heads);
            check_attention(of("attention"), attention, heads, false)?;
        }
        Ok(RunningEncoderBlock {
            attention: Linears::new(&[&block.query, &block.key, &block.value]),
            attention_output: Linears::new(&[&block.attention_output]),
            intermediate: Linears::new(&[&block.intermediate]),
            output: Linears::new(&[&block.output]),
            block,
        })
    }

    /// Returns the layers.
    pub fn layers(&self) -> &EncoderBlock {
        &self.block
    }

    /// Runs the block on a text `[tokens, features]`, and shows inputs to `observe`.
    ///
    /// # Errors
    /// When a number is not finite, or `observe` fails.
    pub fn run(
        &self,
        config: &EncoderConfig,
        x: &mut Array2<f32>,
        accuracy: Accuracy,
        observe: Option<Observe>,
    ) -> Result<()> {
        let mut workspace = Workspace::default();
        workspace.x.extend(x.iter());
        self.forward(config, &mut workspace, &[x.nrows()], accuracy, observe)?;
        x.iter_mut().zip(&workspace.x).for_each(|(x, found)| *x = *found);
        Ok(())
    }

    /// Replaces `workspace.x`, whose rows are tokens of several texts, so many of each, by what the block gives.
    fn forward(
        &self,
        config: &EncoderConfig,
        workspace: &mut Workspace,
        texts: &[usize],
        accuracy: Accuracy,
        mut observe: Option<Observe>,
    ) -> Result<()> {
        let Workspace { x, inputs, q, k, v, attended, hidden, added, normed } = workspace;
        let block = &self.block;
        let features = block.query.in_features();
        let mut see = |input: BlockInput, x: &[f32], width: usize| match &mut observe {
            Some(observe) => {
                observe(input, ArrayView2::from_shape((x.len() / width, width), x).expect("rows of a matrix"))
            }
            None => Ok(()),
        };
        see(BlockInput::Attention, x, features)?;
        self.attention.forward(x, accuracy, &mut [q, k, v], inputs)?;
        for (input, all) in [(BlockInput::Queries, &*q), (BlockInput::Keys, &*k), (BlockInput::Values, &*v)] {
            see(input, all, features)?;
        }
        attended.resize(x.len(), 0.0);
        let mut first = 0;
        for tokens in texts {
            let own = first * features..(first + tokens) * features;
            let qkv = [&q[own.clone()], &k[own.clone()], &v[own.clone()]];
            match &block.attention {
                Some(layer) if accuracy == Accuracy::Approximate => {
                    attend_by_layer(layer, qkv, None, &mut attended[own])?;
                }
                _ => attend_all(config.heads, qkv, features, &mut attended[own]),
            }
            first += tokens;
        }
        see(BlockInput::AttentionOutput, attended, features)?;
        self.attention_output.forward(attended, accuracy, &mut [added], inputs)?;
        x.iter_mut().zip(&*added).for_each(|(x, more)| *x += more);
        block.attention_norm.write(x, normed);
        see(BlockInput::FeedForward, normed, features)?;
        self.intermediate.forward(normed, accuracy, &mut [hidden], inputs)?;
        let width = block.output.in_features();
        let rows = ndarray::ArrayViewMut2::from_shape((hidden.len() / width.max(1), width), hidden);
        config.activation.apply(rows.expect("rows of a matrix"));
        see(BlockInput::FeedForwardOutput, hidden, width)?;
        self.output.forward(hidden, accuracy, &mut [added], inputs)?;
        normed.iter_mut().zip(&*added).for_each(|(x, more)| *x += more);
        block.output_norm.write(normed, x);
        Ok(())
    }
}

impl EncoderEmbedding {
    /// Returns what tokens become, `[tokens, features]`.
    ///
    /// # Errors
    /// When a token is not known, or there are more than there are positions for.
    pub fn of(&self, config: &EncoderConfig, tokens: &[u32]) -> Result<Array2<f32>> {
        let room = self.positions.out_features().saturating_sub(config.first_position);
        if tokens.is_empty() || tokens.len() > room {
            return Err(Error::expected(
                "tokens of a text",
                tokens.len(),
                format!("1 to {room}, the model's positions"),
            ));
        }
        let positions: Vec<u32> = (0..tokens.len()).map(|place| (config.first_position + place) as u32).collect();
        let mut x = self.tokens.rows(tokens)? + self.positions.rows(&positions)?;
        if let Some(kinds) = &self.kinds {
            x += &kinds.rows(&[0])?;
        }
        Ok(self.norm.of(x.view()))
    }
}

impl Encoder {
    /// Returns an encoder of these layers.
    ///
    /// # Errors
    /// When a layer's shape does not fit the others: the message says which.
    pub fn new(config: EncoderConfig, embedding: EncoderEmbedding, blocks: Vec<EncoderBlock>) -> Result<Self> {
        let features = embedding.tokens.in_features();
        for (what, layer) in [("positions", Some(&embedding.positions)), ("kinds of text", embedding.kinds.as_ref())] {
            let Some(layer) = layer else { continue };
            check_shape(format!("the table of {what}"), layer, layer.out_features().max(1), features)?;
        }
        check_norm("the embedding's norm".into(), &embedding.norm, features)?;
        let running = |(number, block)| RunningEncoderBlock::new(&config, number, features, block);
        let blocks = blocks.into_iter().enumerate().map(running).collect::<Result<Vec<_>>>()?;
        Ok(Encoder { config, embedding, blocks, workspaces: Mutex::default() })
    }

    /// Returns the same encoder with other layers in place of its linear ones, those that `change` gives for each.
    ///
    /// # Errors
    /// When `change` fails, or a layer does not fit.
    pub fn with_layers(&self, mut change: impl FnMut(&SharedLayer) -> Result<SharedLayer>) -> Result<Self> {
        let mut blocks = vec![];
        for RunningEncoderBlock { block, .. } in &self.blocks {
            blocks.push(EncoderBlock {
                query: change(&block.query)?,
                key: change(&block.key)?,
                value: change(&block.value)?,
                attention_output: change(&block.attention_output)?,
                intermediate: change(&block.intermediate)?,
                output: change(&block.output)?,
                ..block.clone()
            });
        }
        Encoder::new(self.config, self.embedding.clone(), blocks)
    }

    /// Returns the memory that the layers take, in bytes.
    pub fn memory_bytes(&self) -> usize {
        let EncoderEmbedding { tokens, positions, kinds, .. } = &self.embedding;
        let of_embedding =
            [tokens, positions].into_iter().chain(kinds).map(|layer| layer.memory_bytes()).sum::<usize>();
        let of_block = |RunningEncoderBlock { block, .. }: &RunningEncoderBlock| {
            let EncoderBlock { query, key, value, attention_output, intermediate, output, .. } = block;
            [query, key, value, attention_output, intermediate, output]
                .map(|layer| layer.memory_bytes())
                .iter()
                .sum::<usize>()
                + block.attention.as_ref().map_or(0, |attention| attention.memory_bytes())
        };
        of_embedding + self.blocks.iter().map(of_block).sum::<usize>()
    }

    /// Returns the number of features of a token.
    pub fn features(&self) -> usize {
        self.embedding.tokens.in_features()
    }

    /// Returns the longest text, in tokens.
    pub fn context(&self) -> usize {
        self.embedding.positions.out_features().saturating_sub(self.config.first_position)
    }

    /// Returns the features `[tokens, features]` of each text's tokens. Texts are not filled up: one's features do not depend on which
    /// others there are.
    ///
    /// # Errors
    /// When a text is empty or too long, a token is not known, or a number is not finite.
    pub fn forward(&self, texts: &[&[u32]], accuracy: Accuracy) -> Result<Vec<Array2<f32>>> {
        let lock = || self.workspaces.lock().unwrap_or_else(PoisonError::into_inner);
        let mut workspace = lock().pop().unwrap_or_default();
        let (mut found, mut first) = (vec![], 0);
        while first < texts.len() {
            let (mut end, mut tokens) = (first, 0);
            while end < texts.len() && (end == first || tokens + texts[end].len() <= CHUNK) {
                tokens += texts[end].len();
                end += 1;
            }
            found.extend(self.some(&texts[first..end], &mut workspace, accuracy)?);
            first = end;
        }
        lock().push(workspace);
        Ok(found)
    }

    fn some(&self, texts: &[&[u32]], workspace: &mut Workspace, accuracy: Accuracy) -> Result<Vec<Array2<f32>>> {
        workspace.x.clear();
        for text in texts {
            workspace.x.extend(self.embedding.of(&self.config, text)?.iter());
        }
        let lengths: Vec<usize> = texts.iter().map(|text| text.len()).collect();
        for block in &self.blocks {
            block.forward(&self.config, workspace, &lengths, accuracy, None)?;
        }
        require_finite("the features behind the last block", workspace.x.iter())?;
        let (features, mut first) = (self.features(), 0);
        let of = |tokens: usize| {
            let own = workspace.x[first * features..(first + tokens) * features].to_vec();
            first += tokens;
            Array2::from_shape_vec((tokens, features), own).expect("rows of features")
        };
        Ok(lengths.into_iter().map(of).collect())
    }
}
