//! What an export writes of each layer: its tensors, their biases worked out; what no tensor says; and what is refused for that.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use bytes::Bytes;
use layerstore_core::layer::{dtype_name, dtype_named, from_f32, holds};
use layerstore_core::linalg::require_finite;
use ndarray::Array1;

use super::misfits::Misfits;
use crate::error::{Error, Result};
use crate::layer::{DType, Dense, Layer, Method, SharedLayer};
use crate::store::{LayerHandle, SourceTensor};

/// Where the bytes of a tensor come from.
#[derive(Debug, Clone)]
pub(super) enum Content {
    /// The layer's weight.
    Weight,
    /// The bias of a dense layer, as it is stored.
    Bias,
    /// The tensor of that name among [`Layer::own_tensors`].
    Own(String),
    /// They are these.
    Made(Bytes),
}

/// A tensor of the file.
#[derive(Debug, Clone)]
pub(super) struct OutlinedTensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub handle: LayerHandle,
    pub content: Content,
}

/// All that an export writes, and what it says of it.
#[derive(Debug, Default)]
pub(super) struct Outline {
    pub tensors: Vec<OutlinedTensor>,
    /// Names of biases that the checkpoint did not have.
    pub added_biases: Vec<String>,
    /// By layer.
    pub notes: BTreeMap<String, Vec<String>>,
}

/// Finds what to write of layers: y = x · Wᵀ + b, as they are with [`Accuracy::Full`](crate::layer::Accuracy::Full). `load` is
/// called for those that are not dense, one after another; dense ones are written as they are stored.
///
/// # Errors
/// When a layer cannot be loaded; and, unless `allow_approximate`, in one error for all layers, when a weight and a bias do not
/// say what one computes.
pub(super) fn outline(
    handles: Vec<LayerHandle>,
    load: impl Fn(&LayerHandle) -> Result<SharedLayer>,
    allow_approximate: bool,
    output: &Path,
) -> Result<Outline> {
    let sources = handles.iter().flat_map(|handle| &handle.record().source.tensors);
    let mut names: HashSet<String> = sources.map(|source| source.tensor.clone()).collect();
    let (mut all, mut misfits) = (Outline::default(), Misfits::default());
    for handle in handles {
        let name = handle.record().layer.clone();
        let mut of_layer = OfLayer::default();
        of_layer.add(&handle, &load, &mut names).map_err(|e| e.in_layer(&name))?;
        let OfLayer { tensors, added_bias, mut notes, unsaid } = of_layer;
        for unsaid in unsaid {
            if allow_approximate {
                notes.push(format!("written without {unsaid}"));
            } else {
                misfits.keep::<()>(&name, Err(cannot_be_said(&unsaid)));
            }
        }
        all.tensors.extend(tensors);
        all.added_biases.extend(added_bias);
        if !notes.is_empty() {
            all.notes.insert(name, notes);
        }
    }
    misfits.result(output)?;
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
                self.put(handle, source, if place > 0 { Content::Bias } else { Content::Weight })?;
            }
            return Ok(());
        }
        let layer = load(handle)?;
        let own: Vec<String> = layer.own_tensors().into_iter().map(|(name, _)| name).collect();
        let mut biases = vec![];
        for (place, source) in sources.iter().enumerate() {
            // Behind a layer's name: it may be a tensor of the layer's own.
            let part = source.tensor.strip_prefix(&record.layer).and_then(|rest| rest.strip_prefix('.'));
            match part.filter(|part| own.iter().any(|own| own == part)) {
                Some(part) => self.put(handle, source, Content::Own(part.to_owned()))?,
                None if place == 0 => self.put(handle, source, Content::Weight)?,
                None => biases.push(source),
            }
        }
        self.note(&*layer, !own.is_empty());
        let (bias, offset) = (layer.bias()?, layer.offset()?.filter(|offset| offset.iter().any(|v| *v != 0.0)));
        for source in &biases {
            let dtype = dtype_named(&source.dtype)?;
            let raw = layer.raw_bias().filter(|_| offset.is_none() && bias.is_some());
            let bytes = match raw {
                Some(raw) => raw,
                None => self.given_bias(&*layer, dtype, bias.as_ref(), offset.as_ref())?,
            };
            self.put(handle, source, Content::Made(bytes))?;
        }
        match (sources.first(), offset) {
            (Some(weight), Some(offset)) if biases.is_empty() => self.new_bias(handle, weight, &offset, names),
            _ => Ok(()),
        }
    }

    fn put(&mut self, handle: &LayerHandle, source: &SourceTensor, content: Content) -> Result<()> {
        let (name, dtype, shape) = (source.tensor.clone(), dtype_named(&source.dtype)?, source.shape.clone());
        self.tensors.push(OutlinedTensor { name, dtype, shape, handle: handle.clone(), content });
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
        let name = weight.tensor.strip_suffix(".weight").map(|stem| format!("{stem}.bias"));
        let Some(name) = name.filter(|name| names.insert(name.clone())) else {
            self.unsaid.push(format!(
                "the constant in its outputs, since '{}' cannot have a bias: it is no NAME.weight, or NAME.bias is another tensor",
                weight.tensor
            ));
            return Ok(());
        };
        let all = offset.to_vec();
        require_finite("the bias to write", all.iter())?;
        let dtype = Some(dtype_named(&weight.dtype)?).filter(|dtype| holds(*dtype, &all)).unwrap_or(DType::F32);
        let (shape, content) = (vec![all.len()], Content::Made(from_f32(dtype, &all)?));
        self.added_bias = Some(name.clone());
        self.tensors.push(OutlinedTensor { name, dtype, shape, handle: handle.clone(), content });
        let note = "a bias is added, which its checkpoint did not have: the model's configuration has to allow for it";
        self.notes.push(note.into());
        Ok(())
    }
}
