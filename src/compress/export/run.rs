//! A model of the store written in one of the formats.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use super::model::Model;
use super::options::{ExportDtype, ExportFormat, ExportOptions, ExportReport};
use super::outline::{Asked, Outline, outline};
use super::tensor::Work;
use crate::error::{Error, Result};
use crate::staged;
use crate::store::{LayerHandle, Snapshot};
use crate::tasks::unwrap_join;

/// Writes `model` as another program has it.
///
/// With [`ExportFormat::Safetensors`], every tensor is written under its name and dtype in the checkpoint it came from: dense ones bit
/// for bit, the others decompressed. One layer at a time is in memory; a file appears whole or not at all, in place of one that is
/// there: where that is a symbolic link, of the file that it leads to, whose mode stays. A folder appears whole, too, where none is, or
/// an empty one.
///
/// A layer's weight and bias in the file give the outputs of [`Layer::forward`](crate::layer::Layer::forward) with
/// [`Accuracy::Full`](crate::layer::Accuracy::Full), but for the rounding of their dtypes: with every key, and inputs as they are.
/// A constant that the layer adds to its outputs is part of the bias, which is added where the checkpoint had none. See
/// [`ExportOptions::allow_approximate`] for layers that compute something else, and [`ExportOptions::allow_dequantize`] for those that
/// a format does not hold as they are.
///
/// # Errors
/// When there is no such model, a layer cannot be read, or computes more than a weight and a bias say, the format cannot hold one, the
/// output cannot be written, or the work is cancelled. What the format cannot hold is said of all layers in one error, before any is
/// written.
pub async fn export(snapshot: &Snapshot, model: &str, output: &Path, options: ExportOptions) -> Result<ExportReport> {
    let ExportOptions { format, dtype, allow_approximate, allow_dequantize, without_correction, progress, cancel } =
        options;
    if let Some(ending) = format.ending().filter(|ending| output.extension().is_none_or(|found| found != *ending)) {
        let found = format!("'{}'", output.display());
        return Err(Error::expected("output of an export", found, format!("a name ending in .{ending}")));
    }
    if dtype == Some(ExportDtype::Q8_0) && format != ExportFormat::Gguf {
        let found = format!("q8_0 with {}", format.as_str());
        return Err(Error::expected("dtype of an export", found, "f32, f16 or bf16; q8_0 is of gguf alone"));
    }
    match format.ending() {
        Some(_) => staged::probe(output)?,
        None => staged::probe_folder(output)?,
    }
    let records = snapshot.layers(model).await?;
    let layers = records.len();
    let mut files = BTreeMap::new();
    if format != ExportFormat::Safetensors {
        for file in snapshot.files(model).await? {
            files.insert(file.name.clone(), cancel.unless(snapshot.file(model, &file.name)).await?);
        }
    }
    let metadata: HashMap<String, String> = records.iter().flat_map(|r| r.source.metadata.clone()).collect();
    let handles: Vec<LayerHandle> = records.into_iter().map(|record| snapshot.handle(record)).collect();
    let work = Arc::new(Work::new(tokio::runtime::Handle::current(), progress, cancel));
    let (name, output) = (model.to_owned(), output.to_owned());
    let done = tokio::task::spawn_blocking(move || {
        // Of an adapter's layers the factors alone are written.
        let asked = Asked {
            // GGUF has its own rules for which.
            dtype: dtype.and_then(ExportDtype::plain).filter(|_| format != ExportFormat::Gguf),
            allow_approximate: allow_approximate || format == ExportFormat::Peft,
            without_correction,
        };
        let outline = outline(handles, |handle| work.load(handle), asked, &output)?;
        let rounds_scales = allow_approximate;
        let model = Model { name, outline, files, metadata, dtype, allow_dequantize, rounds_scales, output, work };
        write(model, format, layers)
    });
    unwrap_join(done.await)?
}

/// Writes the model.
fn write(mut model: Model, format: ExportFormat, layers: usize) -> Result<ExportReport> {
    let written = match format {
        ExportFormat::Safetensors => model.safetensors(),
        ExportFormat::HuggingFace => model.hugging_face(),
        ExportFormat::CompressedTensors => model.compressed_tensors(),
        ExportFormat::Gguf => model.gguf(),
        ExportFormat::Peft => model.peft(),
    };
    model.work.finished();
    let bytes = written?;
    let Outline { added_biases, notes, remarks, .. } = model.outline;
    Ok(ExportReport { format, layers, bytes, added_biases, notes, remarks })
}
