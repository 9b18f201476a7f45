//! The methods that a program knows.
//!
//! [`BUILT_IN`] lists this crate's. A program adds its own with [`register`], before it opens a store that holds such layers.

use std::any::TypeId;
use std::sync::{PoisonError, RwLock};

use serde_json::{Map, Value};

use super::dense::Dense;
use super::file::FileLayer;
use super::key_value::KeyValueConfig;
use super::low_rank::LowRankConfig;
use super::method::{Method, MethodConfig, MethodKind};
use super::module::ModuleLayer;
use super::name::MethodName;
use super::parts::Parts;
use super::ternary::TernaryConfig;
use super::traits::{Layer, SharedLayer};
use super::vq_attention::VqAttentionConfig;
use crate::error::{Error, Result};

/// A method that the registry knows.
#[derive(Debug, Clone, Copy)]
pub struct MethodEntry {
    /// The name in rules, tables and JSON.
    pub name: &'static str,
    /// What its layers stand for.
    pub kind: MethodKind,
    /// The entries of its layers' configs that are no settings, as [`Method::MEASURED`].
    pub measured: &'static [&'static str],
    implemented_by: TypeId,
    read_settings: Option<ReadSettings>,
    settings_of: Option<SettingsOf>,
    from_parts: fn(Parts) -> Result<SharedLayer>,
}

type ReadSettings = fn(Map<String, Value>) -> Result<MethodConfig>;

type SettingsOf = fn(&Map<String, Value>) -> Result<MethodConfig>;

fn read_settings<M: Method>(given: Map<String, Value>) -> Result<MethodConfig> {
    let settings: M = serde_json::from_value(Value::Object(given.clone()))
        .map_err(|e| Error::Settings { method: M::NAME.to_owned(), reason: in_words(&e.to_string()) })?;
    settings.validate()?;
    settings.check_rule(&given)?;
    Ok(settings.into())
}

/// Returns a message of serde's with numbers called by what they are, and not by their types in Rust.
pub fn in_words(message: &str) -> String {
    const WHOLE: &str = "a whole number of at least 0";
    let types = [("usize", WHOLE), ("u64", WHOLE), ("u32", WHOLE), ("f64", "a number"), ("f32", "a number")];
    let found = types.iter().find_map(|(name, words)| Some((message.strip_suffix(name)?, words)));
    match found {
        Some((before, words)) if before.ends_with("expected ") => format!("{before}{words}"),
        _ => message.to_owned(),
    }
}

impl MethodEntry {
    /// Returns the entry of a method.
    pub const fn of<M: Method>() -> Self {
        MethodEntry {
            name: M::NAME,
            kind: M::KIND,
            measured: M::MEASURED,
            implemented_by: TypeId::of::<M>(),
            read_settings: Some(read_settings::<M>),
            settings_of: Some(|config| Ok(M::from_config(config)?.into())),
            from_parts: |parts| Ok(M::from_parts(parts)?.shared()),
        }
    }

    /// Returns whether a rule can ask for the method.
    pub fn has_rules(&self) -> bool {
        self.read_settings.is_some()
    }

    /// Reads settings, as a rule gives them, and checks them by themselves.
    ///
    /// # Errors
    /// When one is unknown, of another type, or out of its range, or no rule can ask for the method.
    pub fn read_settings(&self, settings: Map<String, Value>) -> Result<MethodConfig> {
        match self.read_settings {
            Some(read) => read(settings),
            None => Err(Error::expected("method of a rule", self.name, names_for_rules().join(", "))),
        }
    }
}

impl MethodEntry {
    /// Returns the settings that a layer of this full configuration, as the catalogue keeps it, is made with again:
    /// [`Method::from_config`].
    ///
    /// # Errors
    /// When they are not valid together, or no settings make such a layer.
    pub fn settings_of(&self, config: &Value) -> Result<MethodConfig> {
        match (self.settings_of, config) {
            (Some(read), Value::Object(config)) => read(config),
            _ => Err(Error::expected(
                "configuration of a layer to make again",
                config,
                "one that a rule's settings made",
            )),
        }
    }
}

/// This crate's methods, in the order in which they are documented.
pub const BUILT_IN: [MethodEntry; 7] = [
    MethodEntry::of::<Dense>(),
    MethodEntry::of::<KeyValueConfig>(),
    MethodEntry::of::<LowRankConfig>(),
    MethodEntry::of::<TernaryConfig>(),
    MethodEntry::of::<VqAttentionConfig>(),
    // No rule asks for modules: they are saved as what they are.
    MethodEntry {
        name: ModuleLayer::METHOD,
        kind: MethodKind::Module,
        measured: &[],
        implemented_by: TypeId::of::<ModuleLayer>(),
        read_settings: None,
        settings_of: None,
        from_parts: |parts| Ok(ModuleLayer::from_parts(parts)?.shared()),
    },
    MethodEntry {
        name: FileLayer::METHOD,
        kind: MethodKind::File,
        measured: &[],
        implemented_by: TypeId::of::<FileLayer>(),
        read_settings: None,
        settings_of: None,
        from_parts: |parts| Ok(FileLayer::from_parts(parts)?.shared()),
    },
];

static REGISTERED: RwLock<Vec<MethodEntry>> = RwLock::new(Vec::new());

/// Adds a method of the program's own.
///
/// # Errors
/// When its name is taken by another.
pub fn register<M: Method>() -> Result<()> {
    let mut registered = REGISTERED.write().unwrap_or_else(PoisonError::into_inner);
    let taken = BUILT_IN.iter().chain(registered.iter()).find(|entry| entry.name == M::NAME);
    match taken {
        // A second call does no harm.
        Some(entry) if entry.implemented_by == TypeId::of::<M>() => Ok(()),
        Some(_) => Err(Error::expected("name of a method", format!("'{}', which is taken", M::NAME), "another")),
        None => {
            registered.push(MethodEntry::of::<M>());
            Ok(())
        }
    }
}

/// Returns every method that is known, built in or registered.
pub fn methods() -> Vec<MethodEntry> {
    let registered = REGISTERED.read().unwrap_or_else(PoisonError::into_inner);
    BUILT_IN.iter().chain(registered.iter()).copied().collect()
}

/// Returns the names of the methods that a rule can ask for.
pub fn names_for_rules() -> Vec<&'static str> {
    methods().iter().filter(|entry| entry.has_rules()).map(|entry| entry.name).collect()
}

/// Returns the method of that name.
///
/// # Errors
/// When there is none: the message names those that are known.
pub fn method(name: &str) -> Result<MethodEntry> {
    let all = methods();
    all.iter().find(|entry| entry.name == name).copied().ok_or_else(|| {
        let known: Vec<&str> = all.iter().map(|entry| entry.name).collect();
        Error::UnknownMethod { name: name.to_owned(), known: known.join(", ") }
    })
}

/// Returns whether layers of the method stand for a weight matrix; not known, so not, for names that no method has.
pub fn is_linear(name: &MethodName) -> bool {
    method(name.as_str()).is_ok_and(|entry| entry.kind == MethodKind::Linear)
}

/// Returns the layer that `parts` are the stored form of, as a reader will have it, and checks that all their numbers are finite
/// but for those of a dense layer, which are the checkpoint's own.
///
/// # Errors
/// As [`layer_from_parts`], and when a number is not finite.
pub fn rebuilt_layer(parts: &Parts) -> Result<SharedLayer> {
    let layer = layer_from_parts(parts.clone())?;
    if parts.method != Dense::NAME {
        parts.require_finite()?;
    }
    Ok(layer)
}

/// Returns the layer that `parts` are the stored form of, run as its defaults say until [`Layer::configured`].
///
/// # Errors
/// When the method is not known, an array is missing, or its shape does not follow from the config.
pub fn layer_from_parts(parts: Parts) -> Result<SharedLayer> {
    (method(parts.method.as_str())?.from_parts)(parts)
}
