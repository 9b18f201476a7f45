//! What a checkpoint says that an import does not do: it is named, so that nobody takes the model for what it is not.

use std::collections::BTreeMap;

use super::attention::PlannedBlock;
use super::rules::Rules;
use crate::formats::{SourceContent, SourceLayer, TensorInfo, TensorSource};

/// What names end with that say how weights are made of several tensors.
const MADE_OF_SEVERAL: [(&[&str], &str); 3] = [
    (
        &[
            ".weight_scale",
            ".weight_scale_inv",
            ".scale_weight",
            ".input_scale",
            ".SCB",
            ".absmax",
            ".quant_map",
            ".qweight",
            ".qzeros",
            ".scales",
            ".g_idx",
        ],
        "belong to quantised weights: they are stored as they are, and no weight is decoded with them",
    ),
    (
        &[".lora_A", ".lora_B", ".lora_magnitude_vector", ".lora_embedding_A", ".lora_embedding_B"],
        "are a low-rank adapter: it is not added to a weight",
    ),
    (
        &[
            ".weight_g",
            ".weight_v",
            ".weight_orig",
            ".weight_mask",
            ".weight_u",
            ".parametrizations.weight.original0",
            ".parametrizations.weight.original1",
        ],
        "make up a weight together (weight or spectral norm, pruning): the weight itself is not computed",
    ),
];

/// The names of GPT-2's Conv1D layers, whose weights are `[in_features, out_features]`.
const CONV1D: [&str; 4] = ["c_attn", "c_proj", "c_fc", "q_attn"];

/// The dtypes of what can be compressed.
const FLOATS: &str = "F32, F16, BF16, F64, F8_E4M3 or F8_E5M2";

/// Returns a note for each thing.
pub(super) fn unapplied(
    source: &dyn TensorSource,
    layers: &[SourceLayer],
    blocks: &[PlannedBlock],
    rules: &Rules,
) -> Vec<String> {
    let mut notes = source.notes();
    notes.extend(tied(source));
    notes.extend(transposed(source, layers));
    notes.extend(empty(source));
    notes.extend(made_of_several(layers));
    notes.extend(beside_attention(layers, blocks));
    notes.extend(no_matrices(layers, rules));
    notes
}

/// Names as text: the first, and how many others there are.
pub(super) fn such_as<T: AsRef<str>>(names: &[T]) -> String {
    match names {
        [] => String::new(),
        [one] => format!("'{}'", one.as_ref()),
        [first, others @ ..] => format!("'{}' and {} more", first.as_ref(), others.len()),
    }
}

/// Names that the metadata gives to tensors of other names.
fn tied(source: &dyn TensorSource) -> Option<String> {
    let metadata = source.metadata();
    let tied: Vec<String> = metadata
        .iter()
        .filter(|(name, of)| source.tensor(of).is_some() && source.tensor(name).is_none())
        .map(|(name, of)| format!("{name}' as '{of}"))
        .collect();
    (!tied.is_empty())
        .then(|| format!("the metadata has {}: a second name of one tensor makes no layer of its own", such_as(&tied)))
}

fn weights(layers: &[SourceLayer]) -> impl Iterator<Item = (&str, &TensorInfo, Option<&TensorInfo>)> {
    layers.iter().filter_map(|layer| match &layer.content {
        SourceContent::Tensors { weight, bias } => Some((layer.name.as_str(), weight, bias.as_ref())),
        SourceContent::Ready { .. } => None,
    })
}

/// Layers whose weights are `[in_features, out_features]`, as the lengths of their biases show, or their names.
fn transposed(source: &dyn TensorSource, layers: &[SourceLayer]) -> Option<String> {
    let named = |name: &str| CONV1D.contains(&name.rsplit('.').next().unwrap_or(name));
    let (mut certain, mut square, mut linear) = (vec![], vec![], false);
    for (name, weight, _) in weights(layers) {
        if source.stored_as(&weight.name).is_some_and(|stored| stored.transposed) {
            continue;
        }
        let bias = source.tensor(&format!("{name}.bias")).map(|bias| &bias.shape[..]);
        match (&weight.shape[..], bias) {
            ([rows, columns], Some([n])) if rows == columns && n == rows && named(name) => square.push(name),
            ([rows, columns], Some([n])) if n == columns && n != rows => certain.push(name),
            // As torch.nn.Linear has it.
            ([rows, columns], Some([n])) if n == rows && n != columns && named(name) => linear = true,
            _ => {}
        }
    }
    if !linear || !certain.is_empty() {
        certain.extend(square);
    }
    (!certain.is_empty()).then(|| {
        format!(
            "the weights of {} are [in_features, out_features], as GPT-2's Conv1D has them, by their biases or names: they \
             are taken as [out_features, in_features], and not transposed; a rule with transpose = true does that",
            such_as(&certain)
        )
    })
}

/// Tensors of no elements.
fn empty(source: &dyn TensorSource) -> Option<String> {
    let empty: Vec<&String> = source.tensors().values().filter(|t| t.shape.contains(&0)).map(|t| &t.name).collect();
    (!empty.is_empty()).then(|| {
        format!("{} without elements, as ZeRO-3 leaves in the place of a tensor that is elsewhere", such_as(&empty))
    })
}

fn made_of_several(layers: &[SourceLayer]) -> Vec<String> {
    let found = |ends: &[&str]| -> Vec<&str> {
        let is = |name: &str| {
            let name = name.strip_suffix(".default").unwrap_or(name);
            ends.iter().any(|end| name.ends_with(end) || name == &end[1..])
        };
        layers.iter().map(|layer| layer.name.as_str()).filter(|name| is(name)).collect()
    };
    let notes = MADE_OF_SEVERAL.iter().map(|(ends, what)| (found(ends), what));
    notes.filter(|(names, _)| !names.is_empty()).map(|(names, what)| format!("{} {what}", such_as(&names))).collect()
}

/// What lies behind the names of attention blocks, and is none of their projections.
fn beside_attention(layers: &[SourceLayer], blocks: &[PlannedBlock]) -> Vec<String> {
    let mut by_parts: BTreeMap<Vec<&str>, Vec<&str>> = BTreeMap::new();
    for block in blocks {
        let within = layers.iter().filter_map(|l| l.name.strip_prefix(&block.name)?.strip_prefix('.'));
        let beside: Vec<&str> = within
            .filter(|part| {
                let projections = block.projections.iter().map(|p| &p.source.name[block.name.len() + 1..]);
                projections.chain(block.config.output.as_deref()).all(|known| known != *part)
            })
            .collect();
        if !beside.is_empty() {
            by_parts.entry(beside).or_default().push(&block.name);
        }
    }
    let note = |(parts, blocks): (Vec<&str>, Vec<&str>)| {
        let parts: Vec<String> = parts.iter().map(|part| format!("'{part}'")).collect();
        format!(
            "attention of {} does without {} of the checkpoint: only projections are run",
            such_as(&blocks),
            parts.join(", ")
        )
    };
    by_parts.into_iter().map(note).collect()
}

/// Tensors that a rule's pattern matches, and that are no matrices of floats.
fn no_matrices(layers: &[SourceLayer], rules: &Rules) -> Vec<String> {
    let mut by_reason: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (name, weight, _) in weights(layers) {
        // Vectors are in every model, and nobody expects them to be compressed.
        let dimensions = weight.shape.iter().filter(|n| **n != 1).count();
        if weight.is_float_matrix() || weight.shape.contains(&0) || dimensions < 2 {
            continue;
        }
        let Some((_, rule)) = rules.find(name).filter(|(_, rule)| rule.method.name() != "dense") else { continue };
        let reason = match (weight.shape.len(), weight.dtype) {
            (2, dtype) => format!("of dtype {dtype:?}, where {FLOATS} is compressed"),
            (3, _) if weight.has_floats() => {
                "of 3 dimensions, where matrices are compressed (split = \"experts\" makes a layer of each matrix)"
                    .into()
            }
            (n, _) if weight.has_floats() => format!("of {n} dimensions, where matrices are compressed"),
            (n, dtype) => format!("of {n} dimensions and dtype {dtype:?}, where matrices of {FLOATS} are compressed"),
        };
        by_reason
            .entry(format!("{reason}: stored as it is, though the rule at {} matches", rule.described()))
            .or_default()
            .push(name);
    }
    by_reason.into_iter().map(|(reason, names)| format!("{} {reason}", such_as(&names))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats::SafetensorsSource;
    use crate::layer::DType;
    use safetensors::tensor::TensorView;

    /// The notes of a checkpoint of zeros, under a rules file.
    fn notes(tensors: &[(&str, DType, &[usize])], metadata: &[(&str, &str)], rules: &str) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.safetensors");
        let bytes: Vec<Vec<u8>> =
            tensors.iter().map(|(_, d, s)| vec![0; s.iter().product::<usize>() * d.bitsize() / 8]).collect();
        let views = tensors
            .iter()
            .zip(&bytes)
            .map(|((name, dtype, shape), bytes)| (*name, TensorView::new(*dtype, shape.to_vec(), bytes).unwrap()));
        let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        safetensors::serialize_to_file(views, Some(metadata), &path).unwrap();
        let source = SafetensorsSource::open(&path).unwrap();
        let rules = Rules::parse(rules, "r.toml").unwrap();
        let layers = source.layers();
        let (blocks, _) = super::super::attention::blocks(&layers, &rules, None, &mut Default::default());
        unapplied(&source, &layers, &blocks, &rules)
    }

    const F32: DType = DType::F32;

    #[track_caller]
    fn says(notes: &[String], expected: &[&str]) {
        assert_eq!(notes.len(), expected.len(), "{notes:?}");
        for (note, part) in notes.iter().zip(expected) {
            assert!(note.contains(part), "'{note}' does not say '{part}'");
        }
    }

    #[test]
    fn what_is_not_done_is_named() {
        let rule = "[[rule]]\nlayers = '.*'\nmethod = 'low_rank'";
        says(
            &notes(
                &[("a.weight", F32, &[4, 4]), ("a.bias", F32, &[4]), ("n.weight", F32, &[4])],
                &[("format", "pt")],
                rule,
            ),
            &[],
        );
        says(
            &notes(&[("embed.weight", F32, &[4, 4])], &[("lm_head.weight", "embed.weight")], ""),
            &["'lm_head.weight' as 'embed.weight'"],
        );
        let wide =
            [("e.gate_up", F32, &[2, 4, 4][..]), ("q.weight", DType::I64, &[4, 4]), ("n.weight", F32, &[1, 1, 4])];
        says(&notes(&wide, &[], rule), &["'e.gate_up' of 3 dimensions", "'q' of dtype I64"]);
        says(&notes(&wide, &[], ""), &[]);
        says(
            &notes(&[("a.weight", F32, &[0]), ("b.weight", F32, &[4, 0])], &[], rule),
            &["'a.weight' and 1 more without elements"],
        );
        says(
            &notes(
                &[("a.qweight", DType::I32, &[4, 4]), ("b.lora_A.weight", F32, &[2, 4]), ("c.weight_g", F32, &[4, 1])],
                &[],
                "",
            ),
            &["quantised", "adapter", "weight itself"],
        );
    }

    #[test]
    fn transposed_weights_are_named() {
        let gpt2 = [
            ("h.0.attn.c_proj.weight", F32, &[4, 4][..]),
            ("h.0.attn.c_proj.bias", F32, &[4]),
            ("h.0.mlp.c_fc.weight", F32, &[4, 16]),
            ("h.0.mlp.c_fc.bias", F32, &[16]),
        ];
        says(&notes(&gpt2, &[], ""), &["'h.0.mlp.c_fc' and 1 more are [in_features"]);
        says(&notes(&gpt2[..2], &[], ""), &["'h.0.attn.c_proj' are [in_features"]);
        let linear = [gpt2[0], gpt2[1], ("h.0.mlp.c_fc.weight", F32, &[16, 4]), gpt2[3]];
        says(&notes(&linear, &[], ""), &[]);
    }

    #[test]
    fn what_attention_does_without_is_named() {
        let rule = "[[rule]]\nlayers = '.*'\nmethod = 'vq_attention'\nmechanism = 'exact'\nn_head = 2\nquery = 'q'\nkey = 'k'\nvalue = 'v'";
        let names: Vec<String> = ["x", "y"]
            .iter()
            .flat_map(|block| {
                ["q.weight", "k.weight", "v.weight", "k_norm.weight"].map(|part| format!("{block}.{part}"))
            })
            .collect();
        let tensors: Vec<(&str, DType, &[usize])> = names
            .iter()
            .map(|n| (n.as_str(), F32, if n.ends_with("norm.weight") { &[4][..] } else { &[4, 4] }))
            .collect();
        says(&notes(&tensors, &[], rule), &["attention of 'x' and 1 more does without 'k_norm'"]);
    }
}
