//! What a model's `config.json` and the checkpoint's metadata say of how tensors are to be understood: weights that are stored
//! transposed, experts that are one tensor, and heads that are the embedding once more.

use serde_json::Value;

use super::arranged::{ArrangedSource, Arrangement, Split};
use super::source::{SourceContent, SourceLayer, TensorSource};
use crate::error::Result;

/// Families whose linear layers are Conv1D: `[in_features, out_features]`.
const CONV1D: [&str; 4] = ["gpt2", "openai-gpt", "decision_transformer", "imagegpt"];

/// The names of Conv1D layers.
const CONV1D_LAYERS: [&str; 4] = ["c_attn", "c_proj", "c_fc", "q_attn"];

/// Families whose experts are `[experts, in_features, out_features]`.
const TRANSPOSED_EXPERTS: [&str; 4] = ["llama4", "llama4_text", "gpt_oss", "qwen3_vl_moe"];

/// Keys of a configuration that say how many experts a layer has.
const EXPERTS: [&str; 4] = ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"];

/// Families that tie the head to the embedding where their configuration does not say.
const TIED: [&str; 9] =
    ["gpt2", "openai-gpt", "gemma", "gemma2", "gemma3", "gemma3_text", "opt", "bloom", "gpt_bigcode"];

/// Embeddings, and the heads that are tied to them.
const HEADS: [(&str, &str); 6] = [
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("transformer.word_embeddings.weight", "lm_head.weight"),
    ("wte.weight", "lm_head.weight"),
];

/// Sees tensors as the configuration and the metadata of the checkpoint say.
///
/// # Errors
/// When a name that follows from them is taken.
pub fn understand(source: &mut ArrangedSource, config: Option<&Value>) -> Result<()> {
    let layers = source.layers();
    let by_biases = has_conv1d_biases(&layers, source);
    for layer in &layers {
        let is_conv1d = by_biases || config.is_some_and(|config| is_family(config, &CONV1D));
        let arrangement = match config {
            _ if is_conv1d && is_conv1d_matrix(layer) => Some(Arrangement { transpose: true, split: None }),
            Some(config) => of_experts(layer, config),
            None => None,
        };
        if let Some(arrangement) = arrangement {
            source.arrange(layer, &arrangement)?;
        }
    }
    if config.is_some_and(ties) {
        let there = |name: &str| source.tensors().contains_key(name);
        let tied = HEADS.iter().find(|(embedding, head)| there(embedding) && !there(head));
        if let Some((embedding, head)) = tied {
            source.tie(head, embedding)?;
        }
    }
    for (name, to) in source.metadata() {
        let tensors = source.tensors();
        if tensors.contains_key(&to) && !tensors.contains_key(&name) && source.stored_as(&to).is_none() {
            source.tie(&name, &to)?;
        }
    }
    Ok(())
}

/// Returns the part of a configuration that is the language model's, and its family.
fn families(config: &Value) -> impl Iterator<Item = &Value> {
    [config, &config["text_config"], &config["llm_config"]].into_iter().filter(|config| config.is_object())
}

fn is_family(config: &Value, of: &[&str]) -> bool {
    families(config).any(|config| config["model_type"].as_str().is_some_and(|found| of.contains(&found)))
}

fn ties(config: &Value) -> bool {
    let says = families(config).find_map(|config| config["tie_word_embeddings"].as_bool());
    // An encoder, or a model without its head, ties nothing.
    let mut named = config["architectures"].as_array().into_iter().flatten().filter_map(Value::as_str).peekable();
    let has_head = named.peek().is_none()
        || named.any(|name| {
            ["ForCausalLM", "LMHeadModel", "ForConditionalGeneration"].iter().any(|end| name.ends_with(end))
        });
    has_head && says.unwrap_or_else(|| is_family(config, &TIED))
}

/// Whether a layer is a matrix that has the name of one of Conv1D's.
fn is_conv1d_matrix(layer: &SourceLayer) -> bool {
    let last = layer.name.rsplit('.').next().unwrap_or(&layer.name);
    let SourceContent::Tensors { weight, .. } = &layer.content else { return false };
    weight.shape.len() == 2 && CONV1D_LAYERS.contains(&last)
}

/// Whether the biases of layers of such names are as long as the weights' columns, wherever rows and columns are not as many: nothing
/// else tells GPT-2 from models that have linear layers of these names.
fn has_conv1d_biases(layers: &[SourceLayer], source: &ArrangedSource) -> bool {
    let mut found = false;
    for layer in layers.iter().filter(|layer| is_conv1d_matrix(layer)) {
        let SourceContent::Tensors { weight, .. } = &layer.content else { continue };
        let bias = source.tensors().get(&format!("{}.bias", layer.name)).map(|bias| &bias.shape[..]);
        match (&weight.shape[..], bias) {
            ([rows, columns], Some([n])) if rows != columns && n == columns => found = true,
            ([rows, columns], Some([n])) if rows != columns && n == rows => return false,
            _ => {}
        }
    }
    found
}

fn of_experts(layer: &SourceLayer, config: &Value) -> Option<Arrangement> {
    let SourceContent::Tensors { weight, .. } = &layer.content else { return None };
    let last = layer.name.rsplit('.').next().unwrap_or(&layer.name);
    match weight.shape[..] {
        [experts, rows, columns] if layer.name.contains("expert") => {
            let count = |config: &Value| EXPERTS.iter().find_map(|key| config[*key].as_u64());
            let known = families(config).find_map(count)?;
            if known != experts as u64 {
                return None;
            }
            let hidden = families(config).find_map(|config| config["hidden_size"].as_u64()).unwrap_or_default();
            // Gates take the hidden states in, and the projection down gives them out.
            let out = ["down", "w2", "output"].iter().any(|part| last.contains(part));
            let (inputs, outputs) = if out { (rows as u64, columns as u64) } else { (columns as u64, rows as u64) };
            let transpose = match (inputs == hidden, outputs == hidden) {
                (true, false) => false,
                (false, true) => true,
                _ => is_family(config, &TRANSPOSED_EXPERTS),
            };
            Some(Arrangement { transpose, split: Some(Split::Experts) })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::formats::SafetensorsSource;
    use crate::layer::DType;
    use safetensors::tensor::TensorView;
    use serde_json::json;

    /// Names and shapes of the weights of a checkpoint of zeros.
    fn understood(config: Value, metadata: &[(&str, &str)], tensors: &[(&str, &[usize])]) -> Vec<(String, Vec<usize>)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, s)| vec![0; 4 * s.iter().product::<usize>()]).collect();
        let views = tensors.iter().zip(&bytes);
        let views = views.map(|((n, s), b)| (*n, TensorView::new(DType::F32, s.to_vec(), b).unwrap()));
        let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        safetensors::serialize_to_file(views, Some(metadata), &path).unwrap();
        let mut source = ArrangedSource::new(Arc::new(SafetensorsSource::open(&path).unwrap()));
        understand(&mut source, Some(&config)).unwrap();
        let shape = |layer: SourceLayer| match layer.content {
            SourceContent::Tensors { weight, .. } => (layer.name, weight.shape),
            SourceContent::Ready { .. } => (layer.name, vec![]),
        };
        source.layers().into_iter().map(shape).collect()
    }

    fn owned(all: &[(&str, &[usize])]) -> Vec<(String, Vec<usize>)> {
        all.iter().map(|(name, shape)| ((*name).to_owned(), shape.to_vec())).collect()
    }

    #[test]
    fn conv1d_is_transposed_and_its_head_tied() {
        let gpt2: [(&str, &[usize]); 4] = [
            ("transformer.h.0.attn.c_attn.weight", &[4, 12]),
            ("transformer.h.0.attn.c_attn.bias", &[12]),
            ("transformer.h.0.attn.c_proj.weight", &[4, 4]),
            ("transformer.wte.weight", &[9, 4]),
        ];
        let config = json!({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]});
        let expected = owned(&[
            ("lm_head", &[9, 4]),
            ("transformer.h.0.attn.c_attn", &[12, 4]),
            ("transformer.h.0.attn.c_proj", &[4, 4]),
            ("transformer.wte", &[9, 4]),
        ]);
        assert_eq!(understood(config, &[], &gpt2), expected);
        // Without the family, by the biases; but not without either.
        let other = understood(json!({"model_type": "other"}), &[], &gpt2);
        assert_eq!(other, expected[1..]);
        let other = understood(json!({"model_type": "other"}), &[], &gpt2[2..]);
        assert_eq!(other[0].1, [4, 4]);
        let linear = [gpt2[0], gpt2[1], ("h.c_fc.weight", &[16, 4][..]), ("h.c_fc.bias", &[16])];
        assert!(understood(json!({}), &[], &linear).contains(&("h.c_fc".into(), vec![16, 4])));
        let untied = json!({"model_type": "gpt2", "tie_word_embeddings": false});
        assert_eq!(understood(untied, &[], &gpt2).len(), 3);
    }

    #[test]
    fn experts_are_layers() {
        let up = "model.layers.0.mlp.experts.gate_up_proj";
        let down = "model.layers.0.mlp.experts.down_proj";
        let of = |config: Value, tensors: &[(&str, &[usize])]| understood(config, &[], tensors);
        let config = |family: &str| json!({"model_type": family, "num_local_experts": 2, "hidden_size": 4});
        let names = [format!("{down}.0"), format!("{down}.1"), format!("{up}.0"), format!("{up}.1")];
        let expected = |shapes: [&[usize]; 4]| -> Vec<(String, Vec<usize>)> {
            names.iter().cloned().zip(shapes.map(<[usize]>::to_vec)).collect()
        };
        let plain = of(config("mixtral"), &[(up, &[2, 6, 4]), (down, &[2, 4, 3])]);
        assert_eq!(plain, expected([&[4, 3], &[4, 3], &[6, 4], &[6, 4]]));
        let transposed = of(config("llama4"), &[(up, &[2, 4, 6]), (down, &[2, 3, 4])]);
        assert_eq!(transposed, plain);
        // Where the lengths do not tell, the family does.
        assert_eq!(of(config("gpt_oss"), &[(up, &[2, 4, 4])]).len(), 2);
        assert_eq!(of(config("mixtral"), &[(up, &[3, 6, 4])]).len(), 1);
    }

    #[test]
    fn heads_are_tied_by_configuration_or_metadata() {
        let model: [(&str, &[usize]); 2] = [("model.embed_tokens.weight", &[5, 2]), ("model.norm.weight", &[2])];
        let names = |config: Value, metadata: &[(&str, &str)]| -> Vec<String> {
            understood(config, metadata, &model).into_iter().map(|(name, _)| name).collect()
        };
        let tied = ["lm_head", "model.embed_tokens", "model.norm"];
        let llama = json!({"model_type": "llama", "tie_word_embeddings": true, "architectures": ["LlamaForCausalLM"]});
        assert_eq!(names(llama, &[]), tied);
        let nested = json!({"model_type": "x", "text_config": {"tie_word_embeddings": true}});
        assert_eq!(names(nested, &[]), tied);
        assert_eq!(names(json!({"model_type": "llama"}), &[]), tied[1..]);
        let encoder = json!({"tie_word_embeddings": true, "architectures": ["LlamaModel"]});
        assert_eq!(names(encoder, &[]), tied[1..]);
        let named = [("lm_head.weight", "model.embed_tokens.weight"), ("format", "pt")];
        assert_eq!(names(json!({}), &named), tied);
    }
}
