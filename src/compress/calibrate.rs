//! Statistics of a stored model's inputs, from a text that it reads.

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use super::readable::StoredModel;
use super::statistics_file::StatisticsWriter;
use super::text_calibration::{CalibrationInputs, CalibrationText, TextCalibration};
use crate::error::{Error, Result};
use crate::staged;
use crate::store::Snapshot;
use crate::tasks::unless_cancelled;
use crate::work::{Cancel, Progress, Silent};

/// How statistics are taken.
pub struct CalibrateOptions {
    /// Tokens of the text that are read at most.
    pub tokens: usize,
    /// Inputs of each layer that are kept as they are, at most, in windows of 128: what `key_value` layers choose thresholds by, and
    /// errors are measured on. A file is larger by 4 bytes for each number of them.
    pub sample: usize,
    /// What is told how far the work is.
    pub progress: Arc<dyn Progress>,
    /// Stops the work when the caller asks: there is no file then.
    pub cancel: Cancel,
}

impl Default for CalibrateOptions {
    fn default() -> Self {
        CalibrateOptions { tokens: 32_768, sample: 1024, progress: Arc::new(Silent), cancel: Cancel::new() }
    }
}

/// What was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CalibrateReport {
    /// Tokens that the model read.
    pub tokens: usize,
    /// Layers that there are statistics of.
    pub layers: usize,
    /// Statistics that the layers share among them.
    pub statistics: usize,
    /// Bytes of the file.
    pub bytes: u64,
}

/// Has a stored model read a text, and writes the statistics of its linear layers' inputs to a file that an import of the same model
/// takes in place of activations. One block's statistics are in memory at a time; the file appears whole or not at all.
///
/// # Errors
/// When there is no such model, it has no configuration or tokenizer, its family is not run here, or a layer is missing; when the
/// text has fewer than two tokens, the file cannot be written, or the work is cancelled.
pub async fn calibrate(
    snapshot: &Snapshot,
    model: &str,
    text: &str,
    output: &Path,
    options: CalibrateOptions,
) -> Result<CalibrateReport> {
    let CalibrateOptions { tokens, sample, progress, cancel } = options;
    if output.extension().is_none_or(|ending| ending != "safetensors") {
        let found = format!("'{}'", output.display());
        return Err(Error::expected("output of statistics", found, "a name ending in .safetensors"));
    }
    staged::probe(output)?;
    let model = Arc::new(cancel.unless(StoredModel::new(snapshot, model)).await?);
    let text = CalibrationText { text: text.to_owned(), tokens, inputs: CalibrationInputs::Dense };
    let (told, cancelled, output) = (progress.clone(), cancel.clone(), output.to_owned());
    let work = move || {
        let reading = TextCalibration::new(model, &text, &cancelled)?.with_sample(sample);
        write(reading, &output, &*told, &cancelled)
    };
    let done = unless_cancelled(&cancel, work).await;
    progress.finished();
    done
}

fn write(
    mut reading: TextCalibration,
    output: &Path,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<CalibrateReport> {
    let blocks: Vec<Vec<String>> = (0..reading.blocks()).map(|block| reading.names(block)).collect();
    let layers = blocks.iter().map(Vec::len).sum();
    progress.started(blocks.len(), blocks.len() as u64);
    let (mut bytes, mut statistics) = (0, 0);
    staged::write(output, |staged| {
        let mut file = StatisticsWriter::new(staged, output, blocks.iter().flatten().map(String::as_str))?;
        for number in 0..blocks.len() {
            progress.layer(&format!("block {number}"));
            for (names, calibration) in reading.observe(number)?.layers {
                file.add(&names, &calibration)?;
                statistics += 1;
            }
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            progress.layer_done(1, false);
        }
        bytes = file.finish()?;
        Ok(())
    })?;
    Ok(CalibrateReport { tokens: reading.tokens(), layers, statistics, bytes })
}
