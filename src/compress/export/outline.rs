//! What an export writes of each layer: its tensors, their biases worked out; what no tensor says; and what is refused for that.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use bytes::Bytes;
use layerstore_core::layer::{dtype_name, dtype_named, from_f32, holds};
use layerstore_core::linalg::require_finite;
use ndarray::Array1;

use super::super::misfits::Misfits;
use super::content::{Content, Kept, OutlinedTensor, Piece, packed_of};
use crate::error::{Error, Result};
use crate::layer::{ArtifactId, DType, Dense, Layer, LowRankConfig, LowRankLayer, Method, SharedLayer};
use crate::store::{LayerHandle, SourceTensor};

/// A correction of a layer that has one.
#[derive(Debug, Clone)]
pub(super) struct Correction {
    pub handle: LayerHandle,
    pub rank: usize,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Whether the checkpoint's tensor is the whole weight.
    pub is_whole: bool,
    /// Whether it is `[in, out]` there.
    pub is_transposed: bool,
}

/// All that an export writes, and what it says of it.
#[derive(Debug, Default)]
pub(super) struct Outline {
    pub tensors: Vec<OutlinedTensor>,
    /// Names of biases that the checkpoint did not have.
    pub added_biases: Vec<String>,
    /// By layer.
    pub notes: BTreeMap<String, Vec<String>>,
    /// Of the whole.
    pub remarks: Vec<String>,
    /// Layers with a correction.
    pub corrections: Vec<Correction>,
    /// Names that are second ones of tensors that are written.
    pub tied: Vec<String>,
    /// Names that were second ones, of layers that are compressed otherwise.
    pub untied: Vec<String>,
}

/// What is asked of an outline.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Asked {
    /// The dtype of all floats; each its source's where it is not said.
    pub dtype: Option<DType>,
    pub allow_approximate: bool,
    pub without_correction: bool,
}

/// Finds what to write of layers: y = x · Wᵀ + b, as they are with [`Accuracy::Full`](crate::layer::Accuracy::Full). `load` is
/// called for those that are not dense, one after another; dense ones are written as they are stored.
///
/// # Errors
/// When a layer cannot be loaded; and, unless they may be approximate, in one error for all layers, when a weight and a bias do not
/// say what one computes.
pub(super) fn outline(
    handles: Vec<LayerHandle>,
    load: impl Fn(&LayerHandle) -> Result<SharedLayer>,
    asked: Asked,
    output: &Path,
) -> Result<Outline> {
    let sources = || handles.iter().flat_map(|handle| &handle.record().source.tensors);
    let mut names: HashSet<String> = sources().map(|source| source.tensor.clone()).collect();
    let weights = handles.iter().filter_map(|handle| Some((handle.record().source.tensors.first()?, handle)));
    let owners: HashMap<String, ArtifactId> = weights
        .filter(|(weight, _)| weight.stored_as.is_none())
        .map(|(weight, handle)| (weight.tensor.clone(), handle.record().artifact))
        .collect();
    let (mut all, mut misfits) = (Outline::default(), Misfits::default());
    for handle in handles {
        let record = handle.record();
        let name = record.layer.clone();
        if let Some(weight) = record.source.tensors.first()
            && let Some(of) = weight.stored_as.as_ref().filter(|of| of.is_whole())
        {
            // A second name of what is written under the first.
            if owners.get(&of.tensor) == Some(&record.artifact) {
                all.tied.push(weight.tensor.clone());
                if record.method == LowRankConfig::NAME {
                    let mut of_layer = OfLayer { asked, ..OfLayer::default() };
                    of_layer.weight(&handle, &*load(&handle).map_err(|e| e.in_layer(&name))?);
                    all.corrections.extend(of_layer.correction);
                }
                continue;
            }
            all.untied.push(weight.tensor.clone());
        }
        let mut of_layer = OfLayer { asked, ..OfLayer::default() };
        of_layer.add(&handle, &load, &mut names).map_err(|e| e.in_layer(&name))?;
        let OfLayer { tensors, added_bias, mut notes, unsaid, correction, asked: _ } = of_layer;
        for unsaid in unsaid {
            if asked.allow_approximate {
                notes.push(format!("written without {unsaid}"));
            } else {
                misfits.keep::<()>(&name, Err(cannot_be_said(&unsaid)));
            }
        }
        all.tensors.extend(tensors);
        all.added_biases.extend(added_bias);
        all.corrections.extend(correction);
        if !notes.is_empty() {
            all.notes.insert(name, notes);
        }
    }
    misfits.result(output)?;
    all.tensors = joined(all.tensors)?;
    if !all.untied.is_empty() {
        let names = all.untied.join("', '");
        all.remarks.push(format!("'{names}' is no longer tied: the model's configuration has to say so"));
    }
    Ok(all)
}

/// Joins what several layers give to one tensor of the checkpoint.
///
/// # Errors
/// When some of a tensor is given by no layer.
fn joined(tensors: Vec<OutlinedTensor>) -> Result<Vec<OutlinedTensor>> {
    let mut all: Vec<OutlinedTensor> = vec![];
    let mut places: HashMap<String, usize> = HashMap::new();
    for mut tensor in tensors {
        let Some(of) = tensor.pieces.first().and_then(|piece| piece.stored_as.clone()) else {
            all.push(tensor);
            continue;
        };
        match places.get(&of.tensor) {
            Some(&place) => {
                let whole = &mut all[place];
                if whole.kept != tensor.kept {
                    whole.kept = Kept::Otherwise("parts that are stored in several ways".into());
                }
                if whole.shape != of.shape || whole.dtype != tensor.dtype {
                    let found = format!("{:?} {:?} and {:?} {:?}", whole.dtype, whole.shape, tensor.dtype, of.shape);
                    return Err(Error::expected(format!("parts of tensor '{}'", of.tensor), found, "those of one"));
                }
                whole.pieces.append(&mut tensor.pieces);
            }
            None => {
                places.insert(of.tensor.clone(), all.len());
                let kept = match tensor.kept {
                    Kept::Numbers => Kept::Numbers,
                    _ => Kept::Otherwise("a weight that lies in its checkpoint in another way".into()),
                };
                all.push(OutlinedTensor { name: of.tensor, shape: of.shape, kept, ..tensor });
            }
        }
    }
    for place in places.into_values() {
        let tensor = &all[place];
        let parts = tensor.pieces.iter().map(|piece| match &piece.stored_as {
            Some(part) => Ok(part.seen()?.iter().product()),
            None => Ok(0),
        });
        let given: usize = parts.sum::<Result<usize>>()?;
        let expected: usize = tensor.shape.iter().product();
        if given != expected {
            let what = format!("elements that layers give to tensor '{}'", tensor.name);
            return Err(Error::expected(what, given, format!("{expected}, all of it: every part has to be there")));
        }
    }
    Ok(all)
}

fn cannot_be_said(unsaid: &str) -> Error {
    Error::expected(
        "what a weight and a bias in a checkpoint are to say",
        unsaid,
        "y = x · Wᵀ + b; --allow-approximate writes the layer without it",
    )
}

/// What is written of one layer.
#[derive(Default)]
struct OfLayer {
    tensors: Vec<OutlinedTensor>,
    added_bias: Option<String>,
    notes: Vec<String>,
    /// What the layer computes and the tensors do not say.
    unsaid: Vec<String>,
    correction: Option<Correction>,
    asked: Asked,
}

impl OfLayer {
    fn add(
        &mut self,
        handle: &LayerHandle,
        load: &impl Fn(&LayerHandle) -> Result<SharedLayer>,
        names: &mut HashSet<String>,
    ) -> Result<()> {
        let record = handle.record();
        let sources = &record.source.tensors;
        if sources.is_empty() {
            self.notes.push(format!("left out: no tensor stands for a layer of method {}", record.method));
            return Ok(());
        }
        if record.method == Dense::NAME {
            for (place, source) in sources.iter().enumerate() {
                self.put(handle, source, if place > 0 { Content::Bias } else { Content::Weight }, Kept::Numbers)?;
            }
            return Ok(());
        }
        let layer = load(handle)?;
        let (content, kept) = self.weight(handle, &*layer);
        let own: Vec<String> = layer.own_tensors().into_iter().map(|(name, _)| name).collect();
        let mut biases = vec![];
        for (place, source) in sources.iter().enumerate() {
            // Behind a layer's name: it may be a tensor of the layer's own.
            let part = source.tensor.strip_prefix(&record.layer).and_then(|rest| rest.strip_prefix('.'));
            match part.filter(|part| own.iter().any(|own| own == part)) {
                Some(part) => self.put(handle, source, Content::Own(part.to_owned()), Kept::Numbers)?,
                None if place == 0 => self.put(handle, source, content.clone(), kept.clone())?,
                None => biases.push(source),
            }
        }
        self.note(&*layer, !own.is_empty());
        let (bias, offset) = (layer.bias()?, layer.offset()?.filter(|offset| offset.iter().any(|v| *v != 0.0)));
        for source in &biases {
            let dtype = self.written(dtype_named(&source.dtype)?, true);
            let raw = layer.raw_bias().filter(|_| offset.is_none() && bias.is_some());
            let bytes = match raw {
                Some(raw) if dtype_name(dtype) == source.dtype => raw,
                _ => self.given_bias(&*layer, dtype, bias.as_ref(), offset.as_ref())?,
            };
            self.put(handle, source, Content::Made(bytes), Kept::Numbers)?;
        }
        match (sources.first(), offset) {
            (Some(weight), Some(offset)) if biases.is_empty() => self.new_bias(handle, weight, &offset, names),
            _ => Ok(()),
        }
    }

    /// Returns what is written of a compressed layer's weight, and what it is stored as.
    fn weight(&mut self, handle: &LayerHandle, layer: &dyn Layer) -> (Content, Kept) {
        let Some(packed) = packed_of(layer) else {
            return (Content::Weight, Kept::Otherwise(format!("{} layers", layer.method())));
        };
        let rank = packed.singular_values().len();
        let is_low_rank = layer.downcast_ref::<LowRankLayer>().is_some();
        if rank > 0 && is_low_rank {
            let of = handle.record().source.tensors.first().and_then(|source| source.stored_as.as_ref());
            self.correction = Some(Correction {
                handle: handle.clone(),
                rank,
                shape: [layer.out_features(), layer.in_features()],
                is_whole: of.is_none_or(|of| of.expert.is_none() && of.rows.is_none()),
                is_transposed: of.is_some_and(|of| of.transposed),
            });
        }
        let content = match rank > 0 && is_low_rank && self.asked.without_correction {
            true => Content::Quantized,
            false => Content::Weight,
        };
        let codes = packed.quantized();
        let kept = match () {
            () if rank > 0 && matches!(content, Content::Weight) => {
                Kept::Otherwise(format!("a correction of rank {rank}"))
            }
            () if !codes.order().is_empty() => Kept::Otherwise("columns in an order of their own".into()),
            () if !codes.column_scales().is_empty() => Kept::Otherwise("scales of columns".into()),
            () if codes.format().weight_type.is_float() => Kept::Numbers,
            () => Kept::Codes(codes.format()),
        };
        (content, kept)
    }

    /// Returns the dtype that a tensor is written as: the one that is asked for, its source's, or the narrowest that holds what is no
    /// longer the source's own.
    fn written(&self, source: DType, is_made: bool) -> DType {
        let is_float =
            matches!(source, DType::F64 | DType::F32 | DType::F16 | DType::BF16 | DType::F8_E4M3 | DType::F8_E5M2);
        match self.asked.dtype.filter(|_| is_float) {
            Some(dtype) => dtype,
            None if is_made && matches!(source, DType::F8_E4M3 | DType::F8_E5M2) => DType::BF16,
            None => source,
        }
    }

    fn put(&mut self, handle: &LayerHandle, source: &SourceTensor, content: Content, kept: Kept) -> Result<()> {
        let own = dtype_named(&source.dtype)?;
        let is_made = !matches!(content, Content::Bias) && handle.record().method != Dense::NAME;
        let dtype = self.written(own, is_made);
        let stored_as = source.stored_as.clone().filter(|of| !of.is_whole());
        // What was made is of the dtype that is written.
        let own = if matches!(content, Content::Made(_)) { dtype } else { own };
        let piece = Piece { handle: handle.clone(), content, dtype: own, stored_as };
        let (name, shape) = (source.tensor.clone(), source.shape.clone());
        self.tensors.push(OutlinedTensor { name, dtype, shape, pieces: vec![piece], kept });
        Ok(())
    }

    /// Notes what a forward pass does beside what weight and bias say.
    fn note(&mut self, layer: &dyn Layer, has_own_tensors: bool) {
        let approximations = layer.approximations();
        if !approximations.is_empty() {
            let all = approximations.join(", ");
            self.notes.push(format!("written as it computes at full accuracy; as its settings run it, {all}"));
        }
        let around = layer.nonlinearities().join(" and ");
        match has_own_tensors {
            _ if around.is_empty() => {}
            // A reader of these has to know what kind of layer they belong to, and with it what is around the weight.
            true => self.notes.push(format!("no plain linear layer: it has {around}")),
            false => self.unsaid.push(around),
        }
    }

    /// Returns the bias that stands where the checkpoint had one: what a forward pass adds, and so 0 where it adds none.
    fn given_bias(
        &mut self,
        layer: &dyn Layer,
        dtype: DType,
        bias: Option<&Array1<f32>>,
        offset: Option<&Array1<f32>>,
    ) -> Result<Bytes> {
        if bias.is_none() {
            let note = "its settings leave out the checkpoint's bias: 0 is written, or the constant in its outputs";
            self.notes.push(note.into());
        }
        let all = [bias, offset].into_iter().flatten().cloned().reduce(|all, more| all + more);
        let all = all.unwrap_or_else(|| Array1::zeros(layer.out_features())).to_vec();
        require_finite("the bias to write", all.iter())?;
        if !holds(dtype, &all) {
            self.unsaid.push(format!("a part of its bias, which {} does not hold", dtype_name(dtype)));
        }
        from_f32(dtype, &all)
    }

    /// Adds a bias to a layer whose checkpoint had none, of the weight's dtype where that holds it.
    fn new_bias(
        &mut self,
        handle: &LayerHandle,
        weight: &SourceTensor,
        offset: &Array1<f32>,
        names: &mut HashSet<String>,
    ) -> Result<()> {
        let whole = weight.stored_as.as_ref().is_none_or(|of| of.expert.is_none() && of.rows.is_none());
        let name = weight.tensor.strip_suffix(".weight").filter(|_| whole).map(|stem| format!("{stem}.bias"));
        let Some(name) = name.filter(|name| names.insert(name.clone())) else {
            self.unsaid.push(format!(
                "the constant in its outputs, since '{}' cannot have a bias: it is no NAME.weight, or NAME.bias is another tensor",
                weight.tensor
            ));
            return Ok(());
        };
        let all = offset.to_vec();
        require_finite("the bias to write", all.iter())?;
        let dtype = self.written(dtype_named(&weight.dtype)?, true);
        let dtype = Some(dtype).filter(|dtype| holds(*dtype, &all)).unwrap_or(DType::F32);
        let (shape, content) = (vec![all.len()], Content::Made(from_f32(dtype, &all)?));
        self.added_bias = Some(name.clone());
        let pieces = vec![Piece { handle: handle.clone(), content, dtype, stored_as: None }];
        self.tensors.push(OutlinedTensor { name, dtype, shape, pieces, kept: Kept::Numbers });
        let note = "a bias is added, which its checkpoint did not have: the model's configuration has to allow for it";
        self.notes.push(note.into());
        Ok(())
    }
}
