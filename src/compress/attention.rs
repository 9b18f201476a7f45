//! Attention blocks of a checkpoint: found by the names of their projections, their codebooks made from calibration inputs.

use ndarray::{Array2, ArrayView2};

use super::calibration::CalibrationFile;
use super::inputs::Inputs;
use super::measure::{measure_attention, projected};
use super::misfits::Misfits;
use super::recipe::Recipe;
use super::rules::{Rule, Rules};
use crate::error::{Error, Result, closest, known_list};
use crate::formats::{SourceContent, SourceLayer, TensorSource};
use crate::layer::{Method, MethodName, VqAttentionConfig, VqAttentionLayer};

/// A projection of a block: a layer of the source.
#[derive(Debug, Clone)]
pub(super) struct Projection {
    pub source: SourceLayer,
}

impl Projection {
    /// `(out_features, in_features)`.
    pub fn shape(&self) -> (usize, usize) {
        match &self.source.content {
            SourceContent::Tensors { weight, .. } => {
                let length = |place: usize| weight.shape.get(place).copied().unwrap_or(0);
                (length(0), length(1))
            }
            SourceContent::Ready { layer, .. } => layer.dimensions(),
        }
    }

    /// What the projection makes of inputs `[tokens, in_features]`.
    fn of(&self, source: &dyn TensorSource, x: ArrayView2<f32>) -> Result<Array2<f32>> {
        let (weight, bias) = match &self.source.content {
            SourceContent::Tensors { weight, bias } => {
                (source.matrix(weight)?, bias.as_ref().map(|bias| source.vector(bias)).transpose()?)
            }
            SourceContent::Ready { layer, .. } => {
                let layer = layer.load()?;
                (layer.weight()?, layer.stored_bias()?)
            }
        };
        Ok(projected(x, weight.view(), bias.as_ref()))
    }
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
        let found = layers.iter().find(|layer| layer.name == name);
        match found {
            Some(source) if is_matrix(&source.content) => Ok(Projection { source: source.clone() }),
            _ => {
                let matrices = layers.iter().filter(|layer| is_matrix(&layer.content));
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
    let shapes = projections.each_ref().map(Projection::shape);
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
            let layer = &projection.source.name;
            let there = calibration.filter(|c| c.layers().contains(&layer.as_str()));
            let calibration = there.ok_or_else(|| {
                Error::expected(
                    "calibration inputs for codebooks",
                    format!("none for '{layer}'"),
                    "--calibration with a tensor of that name, or --calibration-text",
                )
            })?;
            calibration.check(layer, projection.shape().1)?;
            let tokens = calibration.sample_rows(layer);
            if let Some(codes) = codes
                && codes > tokens
            {
                return Err(Error::expected(
                    format!("codewords of '{layer}'"),
                    format!("{codes} for {tokens} vectors"),
                    "no more than vectors",
                ));
            }
        }
    }
    Ok(planned)
}

fn is_matrix(content: &SourceContent) -> bool {
    match content {
        SourceContent::Tensors { weight, .. } => weight.is_float_matrix(),
        SourceContent::Ready { takes_rules, .. } => *takes_rules,
    }
}

/// Names what a block is made from and how.
pub(super) fn block_recipe(inputs: &Inputs, block: &PlannedBlock) -> Result<[u8; 32]> {
    let mut recipe = Recipe::new();
    if let Some(heads) = inputs.heads.as_deref().filter(|_| block.calibrates()) {
        heads.all().for_each(|all| recipe.numbers(all));
        recipe.settings(&block.config);
        return Ok(recipe.finish());
    }
    for projection in &block.projections {
        match &projection.source.content {
            SourceContent::Tensors { weight, bias } => {
                for tensor in std::iter::once(weight).chain(bias) {
                    recipe.tensor(inputs.source(), tensor)?;
                }
            }
            SourceContent::Ready { layer, .. } => recipe.artifact(layer.load()?.to_parts().id()),
        }
        recipe.calibration(inputs.calibration.as_deref(), &projection.source.name)?;
    }
    recipe.settings(&block.config);
    Ok(recipe.finish())
}

/// Makes a block, and measures it against exact attention over the calibration inputs, where there are any.
pub(super) fn make_block(inputs: &Inputs, planned: &PlannedBlock) -> Result<(VqAttentionLayer, Option<f64>)> {
    let mut of_places = planned.projections.iter().enumerate().map(|(place, projection)| {
        if let Some(heads) = &inputs.heads {
            return Ok(heads.get(place));
        }
        let Some(calibration) = &inputs.calibration else { return Ok(None) };
        let found = calibration.get(&projection.source.name, projection.shape().1)?;
        let found = found.filter(|found| found.sample().nrows() > 0);
        found.map(|found| projection.of(inputs.source(), found.sample())).transpose()
    });
    let mut next = || of_places.next().unwrap_or(Ok(None));
    let (queries, keys, values): (Option<Array2<f32>>, _, _) = (next()?, next()?, next()?);
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
