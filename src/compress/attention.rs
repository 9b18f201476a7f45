//! Attention blocks of a checkpoint: found by the names of their projections, their codebooks made from calibration inputs.

use layerstore_core::linalg::{add_outer, matmul_nt, relative_error};
use ndarray::{Array2, ArrayView1, ArrayView2, s};

use super::calibration::CalibrationFile;
use super::misfits::Misfits;
use super::recipe::Recipe;
use super::rules::{Rule, Rules};
use crate::error::{Error, Result, closest, known_list};
use crate::formats::{SourceContent, SourceLayer, TensorInfo, TensorSource};
use crate::layer::{Accuracy, Method, MethodName, VqAttentionConfig, VqAttentionLayer};
use crate::nn::AttentionBlock;

/// Calibration tokens that attend to each other when a block is measured: inputs do not say where sequences end.
const WINDOW: usize = 128;

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
        let mut y = matmul_nt(x.sample(), source.matrix(&projection.weight)?.view());
        if let Some(bias) = &projection.bias {
            let bias = source.vector(bias)?;
            add_outer(&mut y, bias.view());
        }
        Ok(Some(y))
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
            Some(attention_error(&layer, [q.view(), k.view(), v.view()])?)
        }
        _ => None,
    };
    Ok((layer, error))
}

/// Returns ‖ŷ − y‖ / ‖y‖ of outputs of the heads against those of exact attention, each window of tokens by itself; NaN where they
/// are all 0. Queries, keys and values are a row a token, and as many of each.
pub(super) fn attention_error(layer: &VqAttentionLayer, [q, k, v]: [ArrayView2<f32>; 3]) -> Result<f64> {
    let exact = AttentionBlock::new(layer.exact()?, None, None)?;
    let block = AttentionBlock::new(layer.clone(), None, None)?;
    let (mut found, mut expected) = (vec![], vec![]);
    for start in (0..q.nrows()).step_by(WINDOW) {
        let tokens = start..q.nrows().min(start + WINDOW);
        let part = |x: ArrayView2<f32>| x.slice(s![tokens.clone(), ..]).insert_axis(ndarray::Axis(0)).to_owned();
        let (q, k, v) = (part(q), part(k), part(v));
        for (block, all) in [(&block, &mut found), (&exact, &mut expected)] {
            let y = block.attend(q.view(), k.view(), v.view(), None, None, Accuracy::Full)?;
            all.extend(y);
        }
    }
    if expected.iter().all(|v| *v == 0.0) {
        // No measure.
        return Ok(f64::NAN);
    }
    let row = |all: &[f32]| ArrayView1::from(all).insert_axis(ndarray::Axis(0)).to_owned();
    Ok(relative_error(row(&found).view(), row(&expected).view()))
}
