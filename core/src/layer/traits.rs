//! What every layer is, whatever its method.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use ndarray::{Array1, Array2, ArrayD, ArrayView1, ArrayView2, ArrayViewMut2, Axis, CowArray, Ix2};
use serde::Serialize;
use serde_json::Value;

use super::name::MethodName;
use super::parts::Parts;
use crate::error::{Error, Result};
use crate::linalg::{add_outer, require_finite};
use crate::quant::PackedForward;

/// Whether a forward pass may leave out what matters little.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Accuracy {
    /// Runs as the layer's settings say: few keys, rounded inputs.
    #[default]
    Approximate,
    /// Uses everything that the layer stores, and inputs as they are.
    Full,
}

/// The result of a forward pass.
#[derive(Debug, Clone)]
pub struct Output {
    /// `[batch, out_features]`.
    pub y: Array2<f32>,
    /// Bound on ‖ŷ − y‖ / ‖y‖ of every row, bias left out, where the method can certify one.
    pub relative_error_bound: Option<f64>,
}

/// The gradients of a loss with respect to a layer's input, weight and bias.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradients {
    /// `[batch, in_features]`.
    pub input: Array2<f32>,
    /// `[out_features, in_features]`.
    pub weight: Array2<f32>,
    /// `[out_features]`.
    pub bias: Array1<f32>,
}

/// Where the exact output of a layer comes from, when a caller asks for one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExactSource {
    /// The layer itself: it stores all that an exact output needs.
    Layer,
    /// A dense layer of the same checkpoint tensors; without one there is no exact output.
    Dense,
    /// A dense layer of the same checkpoint tensors, else the layer itself with everything that it stores.
    DenseOrLayer,
}

/// What a low-rank correction gains; empty for layers without one.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct CorrectionReport {
    /// The relative error of the quantised weight alone, measured as the error of the layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uncorrected_error: Option<f64>,
    /// Singular values of the quantisation error that the correction keeps, descending.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub singular_values: Option<Vec<f32>>,
}

/// What a search of keys finds, on average over inputs; empty for layers that do not search.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct SearchReport {
    /// Keys that an input uses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_keys: Option<f64>,
    /// The bound that the layer gives for an input's relative error; `None` where one input has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_certified_error: Option<f64>,
    /// Inputs whose bound is above the error that the settings ask for, or that have none; `None` where they ask for none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missed_queries: Option<usize>,
    /// The largest bound that rounded keys and values leave for an input, every key used: no search of it certifies less. `None`
    /// where the settings ask for no error, or one input has no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_floor: Option<f64>,
}

/// A layer of any method, shared between threads.
pub type SharedLayer = Arc<dyn Layer>;

/// A layer in memory, ready to run.
///
/// A linear layer computes `y = x · Wᵀ + b` for `x` `[batch, in_features]`. Methods that stand for no weight matrix (attention,
/// modules, files) leave `product`, `weight` and `gradients` at their defaults, which refuse. To add a method, see `CONTRIBUTING.md`.
pub trait Layer: Any + fmt::Debug + Send + Sync {
    /// Returns the method that the layer is compressed by.
    fn method(&self) -> MethodName;

    /// Returns the length of an output row; for a dense tensor that is no matrix, its first dimension.
    fn out_features(&self) -> usize;

    /// Returns the length of an input row; for a dense tensor that is no matrix, the product of its other dimensions.
    fn in_features(&self) -> usize;

    /// Returns the full configuration as JSON: what the parts hold, and how the layer runs.
    fn config(&self) -> Value;

    /// Returns the stored form.
    fn to_parts(&self) -> Parts;

    /// Returns the memory that the arrays take, in bytes.
    fn memory_bytes(&self) -> usize;

    /// Returns the same arrays run as `config` (a full configuration, as the catalogue keeps it) says; `None` where no
    /// setting changes how the layer runs.
    ///
    /// # Errors
    /// When the settings are not valid for the layer.
    fn configured(&self, config: &Value) -> Result<Option<SharedLayer>> {
        let _ = config;
        Ok(None)
    }

    /// Refuses to run where the layer stands for no weight matrix.
    ///
    /// # Errors
    /// For tensors that are no matrices, attention and modules.
    fn require_linear(&self) -> Result<()> {
        Ok(())
    }

    /// Computes `x · Wᵀ` for a checked `x` `[batch, in_features]`, bias and activation left out. Callers use
    /// [`Layer::linear`].
    ///
    /// # Errors
    /// When the layer cannot compute with its stored type, or stands for no weight matrix.
    fn product(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Output> {
        let _ = (x, accuracy);
        Err(no_weight("a layer to run", &self.method()))
    }

    /// Returns the bias `[out_features]` that a forward pass adds.
    ///
    /// # Errors
    /// When the bias is of a dtype that cannot be computed with.
    fn bias(&self) -> Result<Option<Array1<f32>>> {
        Ok(None)
    }

    /// Returns what a forward pass computes, where that is a product with a packed weight and what is added to it, and nothing
    /// else: several layers that have the same inputs are run at once by it. `None` otherwise.
    #[doc(hidden)]
    fn packed_forward(&self) -> Option<PackedForward<'_>> {
        None
    }

    /// Returns the constant `[out_features]` that [`Layer::product`] adds to `x · Wᵀ` at full accuracy, W being [`Layer::weight`]:
    /// what makes up for a mean error, for instance. `None` where it adds none.
    ///
    /// # Errors
    /// When the layer cannot compute with its stored type.
    fn offset(&self) -> Result<Option<Array1<f32>>> {
        Ok(None)
    }

    /// Returns what a forward pass of full accuracy does beside `x · Wᵀ`, the offset and the bias, as words for a person: a norm
    /// before, an activation after. Empty where it does nothing else, so that a weight and a bias say it all.
    fn nonlinearities(&self) -> Vec<String> {
        vec![]
    }

    /// Returns what a pass of [`Accuracy::Approximate`] leaves out or rounds, as words for a person; empty where it gives what one
    /// of full accuracy does.
    fn approximations(&self) -> Vec<String> {
        vec![]
    }

    /// Returns the bias as it is stored, whether a forward pass adds it or not.
    ///
    /// # Errors
    /// As [`Layer::bias`].
    fn stored_bias(&self) -> Result<Option<Array1<f32>>> {
        self.bias()
    }

    /// Applies the activation that follows the product, in place.
    fn activate(&self, y: ArrayViewMut2<f32>) {
        let _ = y;
    }

    /// Returns the weight that the layer stands for, `[out_features, in_features]`, everything that is stored counted.
    ///
    /// # Errors
    /// When the layer stands for no weight matrix, or its dtype cannot be computed with.
    fn weight(&self) -> Result<Array2<f32>> {
        Err(no_weight("a layer with a weight", &self.method()))
    }

    /// Returns rows of the weight, `[indices, in_features]`: an embedding looked up by token.
    ///
    /// # Errors
    /// When an index is not below `out_features`, and as [`Layer::weight`].
    fn rows(&self, indices: &[u32]) -> Result<Array2<f32>> {
        check_rows(indices, self.out_features())?;
        let indices: Vec<usize> = indices.iter().map(|&i| i as usize).collect();
        Ok(self.weight()?.select(Axis(0), &indices))
    }

    /// Gradients for checked `x` and `grad_output`. Callers use [`Layer::backward`].
    ///
    /// # Errors
    /// When the layer has no gradients.
    fn gradients(&self, x: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<Gradients> {
        let _ = (x, grad_output);
        Err(no_weight("a layer with gradients of a weight", &self.method()))
    }

    /// Input gradient for checked `x` and `grad_output`. Callers use [`Layer::backward_input`].
    ///
    /// # Errors
    /// As [`Layer::gradients`].
    fn input_gradients(&self, x: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<Array2<f32>> {
        Ok(self.gradients(x, grad_output)?.input)
    }

    /// Returns the tensors beside weight and bias, by name: a norm's `norm.gain`, a module's own.
    fn own_tensors(&self) -> Vec<(String, ArrayD<f32>)> {
        vec![]
    }

    /// Returns the weight's bytes in the checkpoint's own dtype, where the layer keeps them bit for bit.
    fn raw_weight(&self) -> Option<Bytes> {
        None
    }

    /// Returns the bias's bytes in the checkpoint's own dtype, where the layer keeps them bit for bit.
    fn raw_bias(&self) -> Option<Bytes> {
        None
    }

    /// Returns the inputs that the weight meets: `x`, or what a norm makes of it.
    ///
    /// # Errors
    /// When the norm is of another width.
    fn weight_inputs<'a>(&self, x: ArrayView2<'a, f32>) -> Result<CowArray<'a, f32, Ix2>> {
        Ok(x.into())
    }

    /// Positions of a sequence that the layer's norm has gains of their own for; 1 where all positions are alike.
    fn positions(&self) -> usize {
        1
    }

    /// Returns the layer as it is at one position of a sequence; `None` where all positions are alike.
    ///
    /// # Errors
    /// When the position is not below [`Layer::positions`].
    fn at_position(&self, position: usize) -> Result<Option<SharedLayer>> {
        let _ = position;
        Ok(None)
    }

    /// Returns where the layer's exact output comes from.
    fn exact_source(&self) -> ExactSource {
        ExactSource::Layer
    }

    /// Returns what the layer's correction gains, measured against `weight` over `inputs`, else on the weight itself.
    fn correction_report(&self, weight: ArrayView2<f32>, inputs: Option<ArrayView2<f32>>) -> CorrectionReport {
        let _ = (weight, inputs);
        CorrectionReport::default()
    }

    /// Returns what the layer's search finds for `inputs`.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    fn search_report(&self, inputs: ArrayView2<f32>) -> Result<SearchReport> {
        let _ = inputs;
        Ok(SearchReport::default())
    }

    /// Computes `y = x · Wᵀ + b` for `x` `[batch, in_features]`, with the norm before and the activation after, where
    /// the layer has them.
    ///
    /// # Errors
    /// When the width of `x` is another, a value is not finite, or the layer stands for no weight matrix.
    fn forward(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Output> {
        let mut output = self.linear(x, accuracy)?;
        if let Some(bias) = self.bias()? {
            add_outer(&mut output.y, bias.view());
        }
        self.activate(output.y.view_mut());
        Ok(output)
    }

    /// Computes [`Layer::forward`] for one input `[in_features]`.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    fn forward_vector(&self, x: ArrayView1<f32>, accuracy: Accuracy) -> Result<Array1<f32>> {
        let y = self.forward(x.insert_axis(Axis(0)), accuracy)?.y;
        Ok(y.index_axis_move(Axis(0), 0))
    }

    /// Computes `x · Wᵀ` for `x` `[batch, in_features]`, bias and activation left out: what relative errors are measured on.
    ///
    /// # Errors
    /// As [`Layer::forward`].
    fn linear(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Output> {
        self.require_linear()?;
        if x.ncols() != self.in_features() {
            return Err(Error::expected(
                "width of the input",
                x.ncols(),
                format!("{}, the layer's in_features", self.in_features()),
            ));
        }
        require_finite("the input", x.iter())?;
        self.product(x, accuracy)
    }

    /// Returns the gradients for inputs `x` `[batch, in_features]` and `grad_output` `[batch, out_features]`.
    ///
    /// A straight-through estimator: with G for `grad_output`, these are G W, Gᵀ x and Σ G over the batch, W being everything
    /// that the layer stores, whatever a forward pass leaves out. A key–value layer whose settings say
    /// `use_straight_through_estimator = false` gives the gradients of the pass that its settings run instead: those of
    /// W μ + P W (x − μ), with P the projection to the values of each row's hits.
    ///
    /// # Errors
    /// When a shape is another, a value is not finite, or the layer stands for no weight matrix.
    fn backward(&self, x: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<Gradients> {
        self.check_gradients(x, grad_output)?;
        self.gradients(x, grad_output)
    }

    /// Returns the gradient with respect to the input alone, `[batch, in_features]`, as [`Layer::backward`] gives it.
    ///
    /// # Errors
    /// As [`Layer::backward`].
    fn backward_input(&self, x: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<Array2<f32>> {
        self.check_gradients(x, grad_output)?;
        self.input_gradients(x, grad_output)
    }

    /// Checks what gradients are asked for.
    ///
    /// # Errors
    /// As [`Layer::backward`].
    #[doc(hidden)]
    fn check_gradients(&self, x: ArrayView2<f32>, grad_output: ArrayView2<f32>) -> Result<()> {
        self.require_linear()?;
        let expected = [(x.nrows(), self.in_features()), (x.nrows(), self.out_features())];
        let found = [x.dim(), grad_output.dim()];
        if found != expected {
            return Err(Error::expected(
                "shapes of input and output gradient",
                format!("{found:?}"),
                format!("{expected:?}"),
            ));
        }
        require_finite("the input", x.iter())?;
        require_finite("the output gradient", grad_output.iter())
    }

    /// Returns the layer as one that code shares whatever its method.
    fn shared(self) -> SharedLayer
    where
        Self: Sized,
    {
        Arc::new(self)
    }
}

impl dyn Layer {
    /// Returns the layer as one of type `L`, where it is one.
    pub fn downcast_ref<L: Layer>(&self) -> Option<&L> {
        (self as &dyn Any).downcast_ref()
    }
}

/// Returns the layer run as `config` (a full configuration, as the catalogue keeps it) says.
///
/// # Errors
/// When the settings are not valid for the layer.
pub fn configured(layer: &SharedLayer, config: &Value) -> Result<SharedLayer> {
    Ok(layer.configured(config)?.unwrap_or_else(|| layer.clone()))
}

/// Checks the indices of rows that are looked up.
///
/// # Errors
/// When one is not below `rows`.
pub fn check_rows(indices: &[u32], rows: usize) -> Result<()> {
    match indices.iter().find(|&&index| index as usize >= rows) {
        Some(index) => Err(Error::expected("row of a weight", index, format!("below {rows}, its rows"))),
        None => Ok(()),
    }
}

/// Returns the error for a layer that is made of several layers where a linear one belongs.
pub fn no_weight(what: &str, found: &MethodName) -> Error {
    let expected = match found.as_str() {
        "vq_attention" => "a linear layer: attention runs by `attend`, and its projections by themselves",
        "file" => "a linear layer: a file of the model is only kept",
        _ => "a linear layer: a module runs with the layers that it is made of",
    };
    Error::expected(what, found, expected)
}
