//! What an import makes or finds made: layers, attention blocks, and files that belong to the model.

use std::collections::BTreeMap;

use layerstore_core::layer::dtype_name;
use ndarray::ArrayView2;
use serde_json::Value;

use super::attention::{PlannedBlock, block_recipe, make_block};
use super::inputs::Inputs;
use super::measure::measure;
use super::plan::Planned;
use super::recipe::Recipe;
use crate::error::{Error, Result};
use crate::formats::{SideFile, SourceContent, TensorInfo, TensorSource};
use crate::layer::parts::Tensor;
use crate::layer::{CorrectionReport, DenseLayer, FileLayer, KeyValueLayer, Layer, Parts, SearchReport, SharedLayer};
use crate::store::{ErrorBasis, Source, adapted, source_tensors};

/// A layer that an import makes, or finds made. Its methods do blocking work.
pub(super) trait Item: Clone + Send + Sync + 'static {
    fn name(&self) -> &str;

    /// `(out_features, in_features)`.
    fn shape(&self) -> (u64, u64);

    /// Bytes in the source.
    fn dense_bytes(&self) -> Result<u64>;

    /// The tensor of the source that making the layer reads, where it reads one.
    fn tensor(&self) -> Option<&TensorInfo> {
        None
    }

    /// Names what the layer is made from and how, and where it comes from.
    fn recipe(&self, inputs: &Inputs) -> Result<([u8; 32], Source)>;

    /// Makes the layer, and measures it.
    fn make(&self, inputs: &Inputs) -> Result<Compressed>;

    /// The full configuration of the layer, whose parts the store has with this config.
    fn configuration(&self, stored: &Value) -> Value;
}

/// A layer that was made.
pub(super) struct Compressed {
    pub parts: Parts,
    /// What a person should know of it.
    pub notes: Vec<String>,
    pub search: SearchReport,
    pub correction: CorrectionReport,
    pub relative_error: Option<f64>,
    pub error_basis: ErrorBasis,
}

impl Item for Planned {
    fn name(&self) -> &str {
        &self.source.name
    }

    fn shape(&self) -> (u64, u64) {
        Planned::shape(self)
    }

    fn dense_bytes(&self) -> Result<u64> {
        Planned::dense_bytes(self)
    }

    fn tensor(&self) -> Option<&TensorInfo> {
        match &self.source.content {
            SourceContent::Tensors { weight, .. } => Some(weight),
            SourceContent::Ready { .. } => None,
        }
    }

    fn recipe(&self, inputs: &Inputs) -> Result<([u8; 32], Source)> {
        let mut recipe = Recipe::new();
        let from = inputs.source();
        let source = match &self.source.content {
            SourceContent::Tensors { weight, bias } => {
                let tensors = std::iter::once(weight).chain(bias).map(|tensor| recipe.tensor(from, tensor));
                let tensors = tensors.collect::<Result<_>>()?;
                Source { file: from.file_name(&weight.name), tensors, metadata: BTreeMap::new() }
            }
            SourceContent::Ready { layer, .. } => {
                let layer = layer.load()?;
                let id = layer.to_parts().id();
                recipe.artifact(id);
                let mut tensors = source_tensors(&self.source.name, &*layer, id)?;
                tensors.iter_mut().for_each(|tensor| tensor.stored_as = from.stored_as(&tensor.tensor));
                Source { file: from.file_name(&self.source.name), tensors, metadata: BTreeMap::new() }
            }
        };
        if let Some(method) = &self.method {
            recipe.settings(method);
            if self.calibrated {
                recipe.calibration(inputs.calibration.as_deref(), &self.source.name)?;
            }
        }
        Ok((recipe.finish(), source))
    }

    fn make(&self, inputs: &Inputs) -> Result<Compressed> {
        let Some(method) = &self.method else { return self.as_it_is(inputs.source()) };
        let (weight, bias) = match &self.source.content {
            SourceContent::Tensors { weight, bias } => {
                let bias = bias.as_ref().map(|b| inputs.source().vector(b)).transpose()?;
                (inputs.source().matrix(weight)?, bias)
            }
            SourceContent::Ready { layer, .. } => {
                let layer = layer.load()?;
                (layer.weight()?, layer.stored_bias()?)
            }
        };
        let calibration = match inputs.calibration.as_ref().filter(|_| self.calibrated) {
            Some(calibration) => calibration.get(&self.source.name, weight.ncols())?,
            None => None,
        };
        let layer = method.compress(weight.view(), bias.as_ref().map(|b| b.view()), calibration.as_ref())?;
        // What says nothing of inputs is no measure either.
        let unusable = calibration.as_ref().and_then(|calibration| method.unusable(calibration));
        let inputs = calibration.as_ref().filter(|_| unusable.is_none()).map(|c| c.sample());
        let inputs = inputs.filter(|sample| sample.nrows() > 0);
        let measured = measure(&*layer, weight.view(), inputs)?;
        let inputs = inputs.filter(|_| measured.basis == ErrorBasis::Activations);
        let parts = layer.to_parts();
        let noted = adapted(&parts.config).iter().any(|note| note.starts_with("calibration"));
        let unused = unusable.filter(|_| !noted).map(|reason| format!("calibration: not used, {reason}"));
        let (search, unkept) = promised(&layer, inputs)?;
        Ok(Compressed {
            correction: layer.correction_report(weight.view(), inputs),
            search,
            notes: unused.into_iter().chain(measured.note).chain(unkept).collect(),
            parts,
            relative_error: Some(measured.error).filter(|e| e.is_finite()),
            error_basis: measured.basis,
        })
    }

    fn configuration(&self, stored: &Value) -> Value {
        match (&self.method, &self.source.content) {
            (Some(method), _) => method.with_stored(stored),
            (None, SourceContent::Ready { layer, .. }) => {
                layer.in_memory().map_or_else(|| stored.clone(), |layer| layer.config())
            }
            (None, SourceContent::Tensors { .. }) => stored.clone(),
        }
    }
}

impl Planned {
    /// The layer as the source has it, bit for bit.
    fn as_it_is(&self, source: &dyn TensorSource) -> Result<Compressed> {
        let (parts, relative_error) = match &self.source.content {
            SourceContent::Ready { layer, .. } => (layer.load()?.to_parts(), None),
            SourceContent::Tensors { weight, bias } => {
                let bias = bias.as_ref().map(|b| {
                    let data = source.bytes_without_nan(b)?.into_owned().into();
                    Ok::<_, Error>(Tensor {
                        name: "bias".into(),
                        dtype: dtype_name(b.dtype),
                        shape: b.shape.clone(),
                        data,
                    })
                });
                let data = source.bytes_without_nan(weight)?.into_owned().into();
                let layer = DenseLayer::new(weight.dtype, weight.shape.clone(), data, bias.transpose()?)?;
                (layer.to_parts(), Some(0.0))
            }
        };
        let correction = CorrectionReport::default();
        Ok(Compressed {
            parts,
            notes: vec![],
            search: SearchReport::default(),
            correction,
            relative_error,
            error_basis: ErrorBasis::Weights,
        })
    }
}

impl Item for PlannedBlock {
    fn name(&self) -> &str {
        &self.name
    }

    fn shape(&self) -> (u64, u64) {
        let width = self.config.d_model.unwrap_or_default() as u64;
        (width, width)
    }

    /// None of its own: its projections are layers by themselves.
    fn dense_bytes(&self) -> Result<u64> {
        Ok(0)
    }

    fn recipe(&self, inputs: &Inputs) -> Result<([u8; 32], Source)> {
        Ok((block_recipe(inputs, self)?, Source::default()))
    }

    fn make(&self, inputs: &Inputs) -> Result<Compressed> {
        let (layer, error) = make_block(inputs, self)?;
        Ok(Compressed {
            parts: layer.to_parts(),
            notes: vec![],
            search: SearchReport::default(),
            correction: CorrectionReport::default(),
            relative_error: error.filter(|e| e.is_finite()),
            error_basis: ErrorBasis::Activations,
        })
    }

    fn configuration(&self, stored: &Value) -> Value {
        stored.clone()
    }
}

impl Item for SideFile {
    fn name(&self) -> &str {
        &self.name
    }

    fn shape(&self) -> (u64, u64) {
        (0, 0)
    }

    fn dense_bytes(&self) -> Result<u64> {
        Ok(self.read()?.len() as u64)
    }

    fn recipe(&self, _: &Inputs) -> Result<([u8; 32], Source)> {
        let mut recipe = Recipe::new();
        recipe.artifact(FileLayer::new(self.read()?).to_parts().id());
        Ok((recipe.finish(), Source::default()))
    }

    fn make(&self, _: &Inputs) -> Result<Compressed> {
        Ok(Compressed {
            parts: FileLayer::new(self.read()?).to_parts(),
            notes: vec![],
            search: SearchReport::default(),
            correction: CorrectionReport::default(),
            relative_error: None,
            error_basis: ErrorBasis::Weights,
        })
    }

    fn configuration(&self, stored: &Value) -> Value {
        stored.clone()
    }
}

/// Returns what a layer that is to certify an error finds for `inputs`, and what to say where it cannot certify it.
fn promised(layer: &SharedLayer, inputs: Option<ArrayView2<f32>>) -> Result<(SearchReport, Option<String>)> {
    let found = layer.downcast_ref::<KeyValueLayer>().filter(|layer| layer.asked_error().is_some());
    let Some(layer) = found else { return Ok((SearchReport::default(), None)) };
    let report = inputs.map_or(Ok(SearchReport::default()), |x| layer.search_report(x))?;
    let note = layer.unkept_promise(inputs.map_or(0, |x| x.nrows()), &report);
    Ok((report, note))
}
