//! What a compression method is: settings that a rule gives, and what they make of a weight.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use ndarray::{ArrayView1, ArrayView2};
use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use super::check::check_inputs;
use super::name::MethodName;
use super::parts::Parts;
use super::shape::LayerShape;
use super::traits::{Layer, SharedLayer};
use crate::calibration::Calibration;
use crate::error::{Error, Result};

/// What a method's layers stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MethodKind {
    /// A weight matrix: `y = x · Wᵀ + b`.
    Linear,
    /// An attention block, whose projections are layers of their own.
    Attention,
    /// A module that is made of other layers; no rule asks for one.
    Module,
    /// A file that belongs to a model; no rule asks for one.
    File,
}

/// A method of compression. It is implemented by the type of the method's settings.
///
/// Settings are read from a rule's keys by serde: unknown keys should be refused (`deny_unknown_fields`), and all should have
/// defaults. Stored parts are named by their content, so what they hold must depend on the settings and the arguments alone.
pub trait Method: Clone + PartialEq + fmt::Debug + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// The name in rules, tables and JSON.
    const NAME: &'static str;

    /// What the layers stand for.
    const KIND: MethodKind = MethodKind::Linear;

    /// The entries of a stored config that were measured when the layer was made, and are no settings.
    const MEASURED: &'static [&'static str] = &[];

    /// The layers that the method makes.
    type Layer: Layer;

    /// Checks the settings by themselves.
    ///
    /// # Errors
    /// When a setting is out of its range, or two exclude each other.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// Checks that a rule whose keys are `given` says what a rule has to, beyond valid settings.
    ///
    /// # Errors
    /// When a key is missing that a rule cannot leave at its default.
    fn check_rule(&self, given: &Map<String, Value>) -> Result<()> {
        let _ = given;
        Ok(())
    }

    /// Checks the settings against a layer's shape and whether calibration statistics are at hand, before any work is done.
    ///
    /// # Errors
    /// When a setting does not fit, or calibration is needed and missing.
    fn check(&self, shape: LayerShape, calibrated: bool) -> Result<()>;

    /// Returns the bytes that a layer's parts will take, the bias included; `None` where that follows from its numbers.
    ///
    /// # Errors
    /// When the settings do not fit the shape.
    fn expected_bytes(&self, shape: LayerShape) -> Result<Option<usize>> {
        let _ = shape;
        Ok(None)
    }

    /// Returns why a layer with inputs of these statistics is compressed as if it had none, where that is so; its error is then that
    /// of its weight.
    fn unusable(&self, calibration: &Calibration) -> Option<&'static str> {
        calibration.vanishes(false)
    }

    /// Compresses `weight` `[out_features, in_features]` with its bias `[out_features]`. Settings, shapes and numbers have been
    /// checked.
    ///
    /// # Errors
    /// When a factorisation fails, or a result is not finite.
    fn compress(
        &self,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<&Calibration>,
    ) -> Result<Self::Layer>;

    /// Returns a layer from its stored form, run as its defaults say until [`Layer::configured`].
    ///
    /// # Errors
    /// When an array is missing, or its shape does not follow from the config.
    fn from_parts(parts: Parts) -> Result<Self::Layer>;

    /// Returns a layer's full configuration: what its parts say (`stored`), and how these settings run it.
    fn with_stored(&self, stored: &Value) -> Value {
        stored.clone()
    }

    /// Returns the settings that a layer of this full configuration is made with again, as far as the configuration tells: where it has a
    /// number in the place of what decided it, the settings have the number. By default those of its entries that are settings.
    ///
    /// # Errors
    /// When they are not valid together.
    fn from_config(config: &Map<String, Value>) -> Result<Self> {
        let settings: Self = settings_in(config)?;
        settings.validate()?;
        Ok(settings)
    }
}

/// Returns the settings among the entries of a configuration, which are not checked; entries that are none are passed over.
///
/// # Errors
/// When the settings cannot be read together.
pub fn settings_in<M: Method>(config: &Map<String, Value>) -> Result<M> {
    let one = |key: &String, value: &Value| Value::Object([(key.clone(), value.clone())].into_iter().collect());
    let settings = config.iter().filter(|(key, value)| serde_json::from_value::<M>(one(key, value)).is_ok());
    let settings: Map<String, Value> = settings.map(|(key, value)| (key.clone(), value.clone())).collect();
    serde_json::from_value(Value::Object(settings))
        .map_err(|e| Error::Settings { method: M::NAME.to_owned(), reason: e.to_string() })
}

/// Compresses `weight` `[out_features, in_features]` with its bias `[out_features]`, for inputs with the statistics of
/// `calibration`.
///
/// # Errors
/// When a setting is out of its range or does not fit, calibration is needed and missing, a number is not finite, or a
/// factorisation fails.
pub fn compress<M: Method>(
    settings: &M,
    weight: ArrayView2<f32>,
    bias: Option<ArrayView1<f32>>,
    calibration: Option<&Calibration>,
) -> Result<M::Layer> {
    let (out_features, in_features) = weight.dim();
    let shape = LayerShape { out_features, in_features, has_bias: bias.is_some() };
    Method::validate(settings)?;
    Method::check(settings, shape, calibration.is_some())?;
    check_inputs(weight, bias, calibration)?;
    Method::compress(settings, weight, bias, calibration)
}

/// [`Method`] as a trait object.
trait AnyMethod: fmt::Debug + Send + Sync {
    fn as_any(&self) -> &dyn Any;
    fn name(&self) -> MethodName;
    fn kind(&self) -> MethodKind;
    fn settings(&self) -> Value;
    fn validate(&self) -> Result<()>;
    fn check(&self, shape: LayerShape, calibrated: bool) -> Result<()>;
    fn expected_bytes(&self, shape: LayerShape) -> Result<Option<usize>>;
    fn unusable(&self, calibration: &Calibration) -> Option<&'static str>;
    fn compress(
        &self,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<&Calibration>,
    ) -> Result<SharedLayer>;
    fn with_stored(&self, stored: &Value) -> Value;
}

impl<M: Method> AnyMethod for M {
    fn as_any(&self) -> &dyn Any {
        self
    }
    fn name(&self) -> MethodName {
        MethodName::new(M::NAME)
    }
    fn kind(&self) -> MethodKind {
        M::KIND
    }
    fn settings(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }
    fn validate(&self) -> Result<()> {
        Method::validate(self)
    }
    fn check(&self, shape: LayerShape, calibrated: bool) -> Result<()> {
        Method::check(self, shape, calibrated)
    }
    fn expected_bytes(&self, shape: LayerShape) -> Result<Option<usize>> {
        Method::expected_bytes(self, shape)
    }
    fn unusable(&self, calibration: &Calibration) -> Option<&'static str> {
        Method::unusable(self, calibration)
    }
    fn compress(
        &self,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<&Calibration>,
    ) -> Result<SharedLayer> {
        Ok(compress(self, weight, bias, calibration)?.shared())
    }
    fn with_stored(&self, stored: &Value) -> Value {
        Method::with_stored(self, stored)
    }
}

/// A method and its settings: what a rule asks for. Cloning shares them.
#[derive(Clone)]
pub struct MethodConfig(Arc<dyn AnyMethod>);

impl<M: Method> From<M> for MethodConfig {
    fn from(settings: M) -> Self {
        MethodConfig(Arc::new(settings))
    }
}

impl fmt::Debug for MethodConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl PartialEq for MethodConfig {
    fn eq(&self, other: &Self) -> bool {
        self.name() == other.name() && self.0.settings() == other.0.settings()
    }
}

/// Serialised as the settings with the method's name under `method`.
impl Serialize for MethodConfig {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut all = Map::new();
        all.insert("method".into(), self.name().as_str().into());
        if let Value::Object(settings) = self.0.settings() {
            all.extend(settings);
        }
        all.serialize(serializer)
    }
}

impl MethodConfig {
    /// Returns the method's name.
    pub fn name(&self) -> MethodName {
        self.0.name()
    }

    /// Returns what the method's layers stand for.
    pub fn kind(&self) -> MethodKind {
        self.0.kind()
    }

    /// Returns the settings as those of method `M`, where they are.
    pub fn downcast_ref<M: Method>(&self) -> Option<&M> {
        self.0.as_any().downcast_ref()
    }

    /// Returns a layer's full configuration, as [`Method::with_stored`].
    pub fn with_stored(&self, stored: &Value) -> Value {
        self.0.with_stored(stored)
    }

    /// Checks the settings by themselves.
    ///
    /// # Errors
    /// When a setting is out of its range, or two exclude each other.
    pub fn validate(&self) -> Result<()> {
        self.0.validate()
    }

    /// Checks the settings by themselves and against a layer's shape.
    ///
    /// # Errors
    /// When a setting does not fit, or calibration is needed and missing.
    pub fn check(&self, shape: LayerShape, calibrated: bool) -> Result<()> {
        self.0.validate()?;
        self.0.check(shape, calibrated)
    }

    /// Returns the bytes that a layer's parts will take, as [`Method::expected_bytes`].
    ///
    /// # Errors
    /// When the settings do not fit the shape.
    pub fn expected_bytes(&self, shape: LayerShape) -> Result<Option<usize>> {
        self.0.expected_bytes(shape)
    }

    /// Returns why a layer is compressed as if it had no statistics of its inputs, as [`Method::unusable`].
    pub fn unusable(&self, calibration: &Calibration) -> Option<&'static str> {
        self.0.unusable(calibration)
    }

    /// Compresses a weight, as [`compress`].
    ///
    /// # Errors
    /// As [`compress`].
    pub fn compress(
        &self,
        weight: ArrayView2<f32>,
        bias: Option<ArrayView1<f32>>,
        calibration: Option<&Calibration>,
    ) -> Result<SharedLayer> {
        self.0.compress(weight, bias, calibration)
    }
}

/// Reads a stored config into the type that a method keeps it as.
///
/// # Errors
/// When it is not what this version writes.
pub fn read_config<T: DeserializeOwned>(method: &str, config: &Value) -> Result<T> {
    T::deserialize(config).map_err(|e| {
        Error::expected(format!("stored config of a {method} layer"), e, "the settings that this version writes")
    })
}
