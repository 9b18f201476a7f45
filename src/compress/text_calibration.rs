//! Statistics of layers' inputs from a text that the model reads, block by block.

use std::collections::BTreeMap;
use std::sync::Arc;

use layerstore_core::transformer::BlockInput;
use ndarray::{Array2, ArrayView2};
use serde_json::Value;

use super::calibration::CalibrationFile;
use super::in_memory::Promise;
use super::inputs::AttentionInputs;
use super::readable::{CheckpointModel, ReadableModel, not_there};
use crate::architectures::{Block, Blockwise, TextTokenizer};
use crate::error::{Error, Result};
use crate::formats::TensorSource;
use crate::layer::{Accuracy, SharedLayer};
use crate::work::Cancel;
use crate::{Calibration, CalibrationBuilder};

/// Tokens of a window, unless the model's context is shorter.
const WINDOW: usize = 512;

/// Inputs of a layer that are kept as they are: enough to measure errors on and to choose thresholds by.
const SAMPLE: usize = 4096;

/// A text that a model reads to be calibrated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CalibrationText {
    /// The text.
    pub text: String,
    /// Tokens of it that are read at most.
    pub tokens: usize,
    /// Whose outputs the next block's inputs are.
    pub inputs: CalibrationInputs,
}

/// Whose outputs the next block's inputs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CalibrationInputs {
    /// Those of the compressed blocks before, as the model will run: errors are made up for where they can be.
    #[default]
    Compressed,
    /// Those of the model as it is.
    Dense,
}

/// What a block's layers have for inputs.
pub(super) struct Observed {
    /// Statistics, with the names of the layers that share them.
    pub layers: Vec<(Vec<String>, Calibration)>,
    /// What its attention has.
    pub heads: AttentionInputs,
}

/// A model that reads a text.
pub(super) struct TextCalibration {
    model: Blockwise,
    layers: Arc<dyn ReadableModel>,
    inputs: CalibrationInputs,
    /// What each window's tokens are before the next block.
    windows: Vec<Array2<f32>>,
    tokens: usize,
    /// Rows of a sample, at most.
    sample: usize,
    cancel: Cancel,
}

impl TextCalibration {
    /// Reads a model's configuration and tokenizer, and divides the text into windows.
    ///
    /// # Errors
    /// When the model has no configuration or tokenizer beside it, or its family is not run here; when the text has fewer than two
    /// tokens.
    pub fn new(layers: Arc<dyn ReadableModel>, text: &CalibrationText, cancel: &Cancel) -> Result<Self> {
        let required = |name: &str| {
            let expected = "one beside the model, which is run on the text";
            let missing = || Error::expected(format!("{name} of the {}", layers.kind()), "none", expected);
            layers.file(name)?.ok_or_else(missing)
        };
        let config = required("config.json")?;
        let config: Value = serde_json::from_slice(&config).map_err(|e| Error::expected("config.json", e, "JSON"))?;
        let tokenizer = TextTokenizer::new(&required("tokenizer.json")?, None, None)?;
        let model = Blockwise::new(&config, |name| layers.has(name))?;
        // The number of blocks is the configuration's: it is not believed before there are layers for all of them.
        for name in (0..model.blocks()).flat_map(|block| model.names(block).into_values().flatten()) {
            if !layers.has(&name) {
                return Err(not_there(&*layers, &name));
            }
        }
        let windows = windows(&model, tokenizer, text)?;
        let tokens = windows.iter().map(Vec::len).sum();
        if tokens < 2 {
            return Err(Error::expected("tokens to calibrate with", tokens, "2 at least"));
        }
        let mut calibration = TextCalibration {
            model,
            layers,
            inputs: text.inputs,
            windows: vec![],
            tokens,
            sample: SAMPLE,
            cancel: cancel.clone(),
        };
        let embedding = calibration.model.embedding(&|name| calibration.layers.layer(name))?;
        for window in &windows {
            let x = embedding.of(window)?;
            calibration.windows.push(x);
        }
        Ok(calibration)
    }

    /// Returns what will be known of which layers.
    pub fn promise(&self) -> CalibrationFile {
        let names = (0..self.model.blocks()).flat_map(|block| self.model.names(block).into_values().flatten());
        CalibrationFile::promised(Promise { layers: names.collect(), tokens: self.tokens })
    }

    /// Returns the number of blocks.
    pub fn blocks(&self) -> usize {
        self.model.blocks()
    }

    /// Returns the names of the linear layers of a block.
    pub fn names(&self, block: usize) -> Vec<String> {
        self.model.names(block).into_values().flatten().collect()
    }

    /// Keeps samples of at most so many inputs.
    pub fn with_sample(self, rows: usize) -> Self {
        TextCalibration { sample: rows, ..self }
    }

    /// Returns the number of tokens that are read.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    fn features(&self) -> usize {
        self.windows.first().map_or(0, Array2::ncols)
    }

    /// Runs a block as it is, and returns what its layers' inputs are.
    ///
    /// # Errors
    /// When a layer is missing, a number is not finite, or the work is cancelled.
    pub fn observe(&mut self, number: usize) -> Result<Observed> {
        let has = |_: &str| false;
        let block = self.model.block(number, self.features(), &has, &|name| self.layers.layer(name))?;
        let mut builders: BTreeMap<BlockInput, CalibrationBuilder> = BTreeMap::new();
        let mut heads = AttentionInputs::new(!self.model.is_encoder());
        let rows = self.sample;
        let mut see = |input: BlockInput, x: ArrayView2<f32>| {
            if heads.add(input, x) {
                return Ok(());
            }
            let new = || CalibrationBuilder::new(x.ncols(), number as u64).with_sample(rows);
            builders.entry(input).or_insert_with(new).update(x)
        };
        for place in 0..self.windows.len() {
            if self.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let mut x = self.windows[place].clone();
            block.run(&mut x, Accuracy::Full, Some(&mut see))?;
            if self.inputs == CalibrationInputs::Dense {
                self.windows[place] = x;
            }
        }
        let mut names = self.model.names(number);
        let found = |(input, builder): (BlockInput, CalibrationBuilder)| {
            Ok((names.remove(&input).unwrap_or_default(), builder.finish()?))
        };
        Ok(Observed { layers: builders.into_iter().map(found).collect::<Result<_>>()?, heads })
    }

    /// Goes on to the next block: `layers` are those that were made of this one's.
    ///
    /// # Errors
    /// As [`TextCalibration::observe`].
    pub fn go_on(&mut self, number: usize, layers: &BTreeMap<String, SharedLayer>) -> Result<()> {
        if self.inputs == CalibrationInputs::Dense {
            return Ok(());
        }
        let get = |name: &str| layers.get(name).map_or_else(|| self.layers.layer(name), |layer| Ok(layer.clone()));
        let block: Block = self.model.block(number, self.features(), &|name| layers.contains_key(name), &get)?;
        for x in &mut self.windows {
            if self.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            block.run(x, Accuracy::Approximate, None)?;
        }
        Ok(())
    }
}

/// Divides a text into what the model reads at once: a decoder some hundred tokens at a time, an encoder each line.
fn windows(model: &Blockwise, tokenizer: TextTokenizer, text: &CalibrationText) -> Result<Vec<Vec<u32>>> {
    let window = WINDOW.min(model.context().unwrap_or(WINDOW)).max(1);
    if !model.is_encoder() {
        let tokens = tokenizer.encode(&text.text, false)?;
        let tokens = &tokens[..tokens.len().min(text.tokens)];
        return Ok(tokens.chunks(window).map(<[u32]>::to_vec).collect());
    }
    let tokenizer = tokenizer.cut_at(window)?;
    let (mut found, mut all) = (vec![], 0);
    for line in text.text.lines().filter(|line| !line.trim().is_empty()) {
        let tokens = tokenizer.encode(line, true)?;
        if all + tokens.len() > text.tokens {
            break;
        }
        all += tokens.len();
        found.push(tokens);
    }
    Ok(found)
}

/// Returns what will be known of a source's layers once it has read a text: what a plan is held against.
///
/// # Errors
/// As [`TextCalibration::new`].
pub(crate) fn promised(source: Arc<dyn TensorSource>, text: &CalibrationText) -> Result<CalibrationFile> {
    let model = Arc::new(CheckpointModel::new(source));
    Ok(TextCalibration::new(model, text, &Cancel::new())?.promise())
}
