//! A LoRA adapter, as peft has it: the corrections of `low_rank` layers over their quantised weights.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::content::{Content, Kept, OutlinedTensor, Piece};
use super::folder::{is_embedding, write_folder};
use super::model::Model;
use super::outline::Correction;
use crate::error::{Error, Result};
use crate::layer::DType;
use crate::layer::parts::Side;

impl Model {
    /// Writes the adapter.
    pub(super) fn peft(&mut self) -> Result<u64> {
        let corrections = std::mem::take(&mut self.outline.corrections);
        if let Some(part) = corrections.iter().find(|correction| !correction.is_whole) {
            let expected = "a whole weight of the checkpoint, as an adapter is for";
            let wrong = Error::expected("correction for an adapter", "that of a part of a tensor", expected);
            return Err(wrong.in_layer(&part.handle.record().layer));
        }
        let transposed = corrections.iter().filter(|correction| correction.is_transposed).count();
        if transposed != 0 && transposed != corrections.len() {
            let found = format!("{transposed} of {} layers of Conv1D", corrections.len());
            return Err(Error::expected("layers of an adapter", found, "all or none: peft has one setting for them"));
        }
        let Some(most) = corrections.iter().map(|correction| correction.rank).max() else {
            let found = format!("none in model '{}'", self.name);
            return Err(Error::expected("low_rank layers with a correction", found, "some, of a rank above 0"));
        };
        let dtype = self.dtype.and_then(super::options::ExportDtype::plain).unwrap_or(DType::F32);
        let tensors = corrections.iter().flat_map(|correction| factors(correction, dtype)).collect();
        let config = self.adapter(&corrections, most, transposed > 0)?;
        let text = serde_json::to_string_pretty(&config).unwrap_or_default() + "\n";
        let files = BTreeMap::from([("adapter_config.json".to_owned(), text.into())]);
        self.outline.notes.clear();
        self.outline.added_biases.clear();
        self.outline.remarks = vec![
            "the adapter is for this model's quantised weights: export --to huggingface --without-correction writes them".into(),
        ];
        write_folder(&self.output, "adapter_model", tensors, files, &self.work)
    }

    fn adapter(&self, corrections: &[Correction], most: usize, transposed: bool) -> Result<Value> {
        let name = |correction: &Correction| correction.handle.record().layer.clone();
        let ranks: Map<String, Value> = corrections.iter().map(|c| (name(c), json!(c.rank))).collect();
        let config = self.configuration()?.unwrap_or_default();
        let class = config.get("architectures").and_then(|all| all[0].as_str()).unwrap_or_default();
        let task = match class {
            _ if class.ends_with("ForCausalLM") || class.ends_with("LMHeadModel") => json!("CAUSAL_LM"),
            _ => Value::Null,
        };
        Ok(json!({
            "peft_type": "LORA", "task_type": task, "base_model_name_or_path": null, "inference_mode": true, "bias": "none",
            "r": most, "lora_alpha": most, "lora_dropout": 0.0, "use_rslora": false, "use_dora": false,
            "fan_in_fan_out": transposed, "init_lora_weights": true, "modules_to_save": null,
            "target_modules": corrections.iter().map(name).collect::<Vec<_>>(),
            // A layer's factors are as they are: α is its rank.
            "rank_pattern": ranks, "alpha_pattern": ranks,
        }))
    }
}

/// Returns the two factors of a layer: of a linear one B as `lora_A`, which meets the inputs, and A as `lora_B`.
fn factors(correction: &Correction, dtype: DType) -> [OutlinedTensor; 2] {
    let Correction { handle, rank, shape: [rows, columns], .. } = correction;
    let layer = &handle.record().layer;
    let factor = |part: &str, shape: [usize; 2], side: Side, transposed: bool| {
        let content = Content::Factor { side, transposed };
        let piece = Piece { handle: handle.clone(), content, dtype, stored_as: None };
        let name = format!("base_model.model.{layer}.{part}");
        OutlinedTensor { name, dtype, shape: shape.to_vec(), pieces: vec![piece], kept: Kept::Numbers }
    };
    match is_embedding(layer) {
        false => [
            factor("lora_A.weight", [*rank, *columns], Side::B, false),
            factor("lora_B.weight", [*rows, *rank], Side::A, true),
        ],
        // peft looks up columns of what it calls A.
        true => [
            factor("lora_embedding_A", [*rank, *rows], Side::A, false),
            factor("lora_embedding_B", [*columns, *rank], Side::B, true),
        ],
    }
}
