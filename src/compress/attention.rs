//! Attention blocks of a checkpoint: found by the names of their projections, their codebooks made from calibration inputs.

use ndarray::Array2;

use super::calibration::CalibrationFile;
use super::measure::{measure_attention, projected};
use super::misfits::Misfits;
use super::recipe::Recipe;
use super::rules::{Rule, Rules};
use crate::error::{Error, Result, closest, known_list};
use crate::formats::{SourceContent, SourceLayer, TensorInfo, TensorSource};
use crate::layer::{Method, MethodName, VqAttentionConfig, VqAttentionLayer};

/// A projection of a block: a matrix of the source and its bias.
#[derive(Debug, Clone)]
pub(super) struct Projection {
    pub layer: String,
    pub weight: TensorInfo,
    pub bias: Option<TensorInfo>,
}

/// A block and how it is to be made.
#[derive(Debug, Clone)]
pub(super) struct PlannedBlock {
    pub name: String,
    /// With all lengths said.
    pub config: VqAttentionConfig,
    /// The rule that takes it.
    pub rule: String,
    /// Wq, Wk and Wv.
    pub projections: [Projection; 3],
}

impl PlannedBlock {
    /// Bytes that it will take.
    pub fn expected_bytes(&self) -> u64 {
        let of = |codes: Option<usize>, heads: usize| codes.map_or(0, |codes| heads * codes * (self.d_k() + 1) * 4);
        (of(self.config.query_codes(), self.config.n_head) + of(self.config.key_codes(), self.config.kv_heads())) as u64
    }

    pub fn method(&self) -> MethodName {
        MethodName::new(VqAttentionConfig::NAME)
    }

    fn d_k(&self) -> usize {
        self.config.d_k.unwrap_or_default()
    }

    /// Returns whether its codebooks are to be made from inputs.
    pub fn calibrates(&self) -> bool {
        self.config.key_codes().is_some()
    }
}

/// The blocks that rules for attention find among a checkpoint's layers, and for each rule whether it found one. A block is
/// where a rule's projections are, each behind one name that the rule's pattern matches. One that lacks a projection or
/// calibration inputs, or whose projections are of other shapes, is a misfit.
pub(super) fn blocks(
    layers: &[SourceLayer],
    rules: &Rules,
    calibration: Option<&CalibrationFile>,
    misfits: &mut Misfits,
) -> (Vec<PlannedBlock>, Vec<bool>) {
    let (mut found, mut used) = (Vec::<PlannedBlock>::new(), vec![]);
    for rule in rules.iter() {
        let mut takes = false;
        if let Some(config) = rule.method.downcast_ref::<VqAttentionConfig>() {
            let suffix = format!(".{}", config.query.as_deref().unwrap_or_default());
            for layer in layers {
                let Some(block) = layer.name.strip_suffix(&suffix).filter(|block| rule.pattern().is_match(block))
                else {
                    continue;
                };
                if found.iter().all(|known| known.name != block) {
                    takes = true;
                    found.extend(misfits.keep(block, planned(block, config, rule, layers, calibration)));
                }
            }
        }
        used.push(takes);
    }
    (found, used)
}

fn planned(
    block: &str,
    config: &VqAttentionConfig,
    rule: &Rule,
    layers: &[SourceLayer],
    calibration: Option<&CalibrationFile>,
) -> Result<PlannedBlock> {
    if layers.iter().any(|layer| layer.name == block) {
        return Err(Error::expected("name of an attention block", format!("'{block}', a layer"), "a name of its own"));
    }
    let named = |name: &Option<String>| {
        let name = format!("{block}.{}", name.as_deref().unwrap_or_default());
        let found = layers.iter().find(|layer| layer.name == name).map(|layer| &layer.content);
        match found {
            Some(SourceContent::Tensors { weight, bias }) if weight.is_float_matrix() => {
                Ok(Projection { layer: name, weight: weight.clone(), bias: bias.clone() })
            }
            _ => {
                let matrices = layers.iter().filter(|layer| match &layer.content {
                    SourceContent::Tensors { weight, .. } => weight.is_float_matrix(),
                    SourceContent::Ready { .. } => false,
                });
                let near = closest(&name, matrices.map(|layer| layer.name.as_str()), 3);
                let expected = format!("one that is there; {}", known_list("closest names", &near));
                Err(Error::expected("projection of an attention block", format!("no matrix '{name}'"), expected))
            }
        }
    };
    let projections = [named(&config.query)?, named(&config.key)?, named(&config.value)?];
    if config.output.is_some() {
        named(&config.output)?;
    }
    let shapes = projections.each_ref().map(|p| (p.weight.shape[0], p.weight.shape[1]));
    let planned = PlannedBlock {
        name: block.to_owned(),
        config: config.of_projections(shapes)?,
        rule: rule.described(),
        projections,
    };
    if planned.calibrates() {
        for (projection, codes) in
            planned.projections.iter().zip([planned.config.query_codes(), planned.config.key_codes()])
        {
            let there = calibration.filter(|c| c.layers().contains(&projection.layer.as_str()));
            let calibration = there.ok_or_else(|| {
                Error::expected(
                    "calibration inputs for codebooks",
                    format!("none for '{}'", projection.layer),
                    "--calibration with a tensor of that name",
                )
            })?;
            calibration.check(&projection.layer, projection.weight.shape[1])?;
            let tokens = calibration.sample_rows(&projection.layer);
            if let Some(codes) = codes
                && codes > tokens
            {
                return Err(Error::expected(
                    format!("codewords of '{}'", projection.layer),
                    format!("{codes} for {tokens} vectors"),
                    "no more than vectors",
                ));
            }
        }
    }
    Ok(planned)
}

/// Names what a block is made from and how.
pub(super) fn block_recipe(
    source: &dyn TensorSource,
    block: &PlannedBlock,
    calibration: Option<&CalibrationFile>,
) -> Result<[u8; 32]> {
    let mut recipe = Recipe::new();
    for projection in &block.projections {
        for tensor in std::iter::once(&projection.weight).chain(&projection.bias) {
            recipe.tensor(source, tensor)?;
        }
        recipe.calibration(calibration, &projection.layer)?;
    }
    recipe.settings(&block.config);
    Ok(recipe.finish())
}

/// Makes a block, and measures it against exact attention over the calibration inputs, where there are any.
pub(super) fn make_block(
    source: &dyn TensorSource,
    planned: &PlannedBlock,
    calibration: Option<&CalibrationFile>,
) -> Result<(VqAttentionLayer, Option<f64>)> {
    let [q, k, v] = &planned.projections;
    let inputs = |projection: &Projection| -> Result<Option<Array2<f32>>> {
        let Some(calibration) = calibration else { return Ok(None) };
        let Some(x) = calibration.get(&projection.layer, projection.weight.shape[1])? else { return Ok(None) };
        if x.sample().nrows() == 0 {
            return Ok(None);
        }
        let bias = projection.bias.as_ref().map(|bias| source.vector(bias)).transpose()?;
        Ok(Some(projected(x.sample(), source.matrix(&projection.weight)?.view(), bias.as_ref())))
    };
    let (queries, keys, values) = (inputs(q)?, inputs(k)?, inputs(v)?);
    let layer = match (&queries, &keys) {
        (Some(queries), Some(keys)) => {
            VqAttentionLayer::by_kmeans(planned.config.clone(), queries.view(), keys.view())?
        }
        _ => VqAttentionLayer::new(planned.config.clone(), None, None, None)?,
    };
    let error = match (queries, keys, values) {
        (Some(q), Some(k), Some(v)) if q.nrows() == k.nrows() && k.nrows() == v.nrows() => {
            Some(measure_attention(&layer, [&q, &k, &v])?)
        }
        _ => None,
    };
    Ok((layer, error))
}
