//! `export`.

use std::sync::Arc;

use super::escape;
use super::import::note_layers;
use super::output::bytes;
use super::signals::cancel_on_interrupt;
use super::{Context, Dtype, ExportArgs, To};
use crate::compress::{self, ExportDtype, ExportFormat, ExportOptions};
use crate::error::{Result, counted};

impl From<To> for ExportFormat {
    fn from(to: To) -> Self {
        match to {
            To::Safetensors => ExportFormat::Safetensors,
            To::Huggingface => ExportFormat::HuggingFace,
            To::CompressedTensors => ExportFormat::CompressedTensors,
            To::Gguf => ExportFormat::Gguf,
            To::Peft => ExportFormat::Peft,
        }
    }
}

impl From<Dtype> for ExportDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => ExportDtype::F32,
            Dtype::F16 => ExportDtype::F16,
            Dtype::Bf16 => ExportDtype::Bf16,
            Dtype::Q8_0 => ExportDtype::Q8_0,
        }
    }
}

pub async fn export(context: &Context, args: ExportArgs) -> Result<u8> {
    let ExportArgs { model, output, to, dtype, allow_dequantize, without_correction, allow_approximate, verify: _ } =
        args;
    let snapshot = context.snapshot().await?;
    let options = ExportOptions {
        format: to.map_or_else(|| ExportFormat::of_output(&output), |to| Ok(to.into()))?,
        dtype: dtype.map(ExportDtype::from),
        allow_approximate,
        allow_dequantize,
        without_correction,
        progress: Arc::new(context.output.progress()),
        cancel: cancel_on_interrupt(),
    };
    let report = compress::export(&snapshot, &model, &output, options).await?;
    let notes = report.notes.iter();
    note_layers(context, notes.flat_map(|(layer, all)| all.iter().map(move |note| (layer.as_str(), note.as_str()))));
    for remark in &report.remarks {
        context.output.note(format!("note: {remark}"));
    }
    context.output.result(&report, |r| {
        let layers = counted(r.layers, "layer", "layers");
        let added = match r.added_biases.len() {
            0 => String::new(),
            count => format!(", {} added", counted(count, "bias", "biases")),
        };
        let place = escape::name(&output.to_string_lossy()).into_owned();
        format!("{layers}, {} in {place} as {}{added}", bytes(r.bytes), r.format.as_str())
    })?;
    Ok(0)
}
