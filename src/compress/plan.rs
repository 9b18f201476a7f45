//! Which rule takes which layer of a source, found and checked before any layer is worked on.

use super::attention::{PlannedBlock, blocks};
use super::calibration::CalibrationFile;
use super::misfits::Misfits;
use super::rules::Rules;
use super::unapplied::unapplied;
use crate::error::{Error, Result};
use crate::formats::{SideFile, SourceContent, SourceLayer, TensorInfo, TensorSource};
use crate::layer::{LayerShape, MethodConfig, StoredAs};

/// A layer, and what is to become of it.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    pub source: SourceLayer,
    /// `None` where the layer is stored as it is.
    pub method: Option<MethodConfig>,
    /// Whether there are calibration statistics for it.
    pub calibrated: bool,
    /// The rule that takes it.
    pub rule: Option<String>,
    /// Whether its tensor is another layer's, too, and counts there.
    pub tied: bool,
}

impl Planned {
    /// Rows and columns: a vector is one column, more dimensions fold into the columns.
    pub fn shape(&self) -> (u64, u64) {
        shape_of(&self.source.content)
    }

    /// The lengths that the method's settings are held against.
    pub fn lengths(&self) -> Result<LayerShape> {
        lengths_of(&self.source.content)
    }

    /// Bytes in the source, the bias counted; none where the tensor is another layer's, too; of a layer that comes ready, those of its numbers as f32.
    pub fn dense_bytes(&self) -> Result<u64> {
        if self.tied {
            return Ok(0);
        }
        match &self.source.content {
            SourceContent::Tensors { weight, bias } => {
                Ok(weight.byte_len() + bias.as_ref().map_or(0, TensorInfo::byte_len))
            }
            SourceContent::Ready { layer, .. } => {
                let Some(layer) = layer.in_memory() else {
                    let LayerShape { out_features, in_features, has_bias } = layer.shape()?;
                    return Ok(4 * (out_features * in_features + usize::from(has_bias) * out_features) as u64);
                };
                let tensors = crate::store::source_tensors(&self.source.name, &**layer, layer.to_parts().id())?;
                Ok(tensors.iter().map(|t| 4 * t.shape.iter().product::<usize>() as u64).sum())
            }
        }
    }
}

fn shape_of(content: &SourceContent) -> (u64, u64) {
    match content {
        SourceContent::Tensors { weight, .. } => {
            let rows = weight.shape.first().copied().unwrap_or(1);
            (rows as u64, weight.shape.iter().skip(1).product::<usize>() as u64)
        }
        SourceContent::Ready { layer, .. } => {
            let (rows, columns) = layer.dimensions();
            (rows as u64, columns as u64)
        }
    }
}

fn lengths_of(content: &SourceContent) -> Result<LayerShape> {
    let (out_features, in_features) = shape_of(content);
    let has_bias = match content {
        SourceContent::Tensors { bias, .. } => bias.is_some(),
        SourceContent::Ready { layer, .. } => return layer.shape(),
    };
    Ok(LayerShape { out_features: out_features as usize, in_features: in_features as usize, has_bias })
}

/// All that an import does.
pub(super) struct Work {
    pub layers: Vec<Planned>,
    pub blocks: Vec<PlannedBlock>,
    /// Files that belong to the model.
    pub files: Vec<SideFile>,
    /// Patterns of rules that take nothing.
    pub unused_rules: Vec<String>,
    /// What a user should know of the checkpoint.
    pub notes: Vec<String>,
    /// Rules and calibration that do not fit.
    pub misfits: Misfits,
}

/// Finds each layer's rule and holds it against the layer, the blocks of attention, and the rules that took nothing.
pub(super) fn plan(from: &dyn TensorSource, rules: &Rules, calibration: Option<&CalibrationFile>) -> Work {
    let all = from.layers();
    let mut misfits = Misfits::default();
    let (blocks, mut used) = blocks(&all, rules, calibration, &mut misfits);
    let notes = unapplied(from, &all, &blocks, rules);
    let mut planned = Vec::with_capacity(all.len());
    for source in all {
        let takes_rules = match &source.content {
            // Vectors, and tensors of other types, have no rows to compress: rules are for matrices.
            SourceContent::Tensors { weight, .. } => weight.is_float_matrix(),
            SourceContent::Ready { takes_rules, .. } => *takes_rules,
        };
        let stored_as = match &source.content {
            SourceContent::Tensors { weight, .. } => from.stored_as(&weight.name),
            SourceContent::Ready { .. } => from.stored_as(&format!("{}.weight", source.name)),
        };
        let whole = stored_as.as_ref().map(|stored| stored.tensor.strip_suffix(".weight").unwrap_or(&stored.tensor));
        let tied = stored_as.as_ref().is_some_and(StoredAs::is_whole);
        let rule = match tied {
            true => rules.find(&source.name),
            false => rules.find_part(&source.name, whole),
        };
        let rule = rule.filter(|_| takes_rules);
        let (mut method, rule) = match rule {
            Some((place, rule)) => {
                used[place] = true;
                (Some(rule.method.clone()), Some(rule.described()))
            }
            None => (None, None),
        };
        // The method that compresses nothing is to leave everything as it is, bit for bit.
        method = method.filter(|method| method.name() != "dense");
        let in_features = shape_of(&source.content).1 as usize;
        let calibrated = match (&method, calibration) {
            (Some(_), Some(calibration)) => misfits.keep(&source.name, calibration.check(&source.name, in_features)),
            _ => Some(false),
        };
        // With inputs that do not fit, nothing more can be said of the method.
        if let (Some(method), Some(calibrated)) = (&method, calibrated) {
            let checked = lengths_of(&source.content).and_then(|shape| method.check(shape, calibrated));
            misfits.keep(&source.name, checked);
        }
        planned.push(Planned { source, method, calibrated: calibrated.unwrap_or(false), rule, tied });
    }
    let unused = rules.iter().zip(used).filter(|(_, used)| !used).map(|(rule, _)| rule.described());
    let files = from.side_files();
    for file in &files {
        if !file.has_portable_name() {
            let expected = "a path relative to the model's folder, which stays in it";
            misfits.keep::<()>(
                &file.name,
                Err(Error::expected("name of a file to keep with the model", &file.name, expected)),
            );
        }
        if planned.iter().any(|layer| layer.source.name == file.name) {
            let taken = Error::expected("name of a file to keep with the model", "that of a layer", "another");
            misfits.keep::<()>(&file.name, Err(taken));
        }
    }
    Work { layers: planned, blocks, files, unused_rules: unused.collect(), notes, misfits }
}
