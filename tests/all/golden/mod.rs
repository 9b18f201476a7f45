//! Reference data: inputs, weights and outputs of other implementations, and of float64 formulas.
//!
//! Reads the folder that `LAYERSTORE_GOLDEN` names, or `tests/fixtures/golden`. In it each system has a folder with an
//! `index.json` that lists its cases; every case is run, every output of it is looked at, and what was run is counted.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use ndarray::{Array1, Array2, Ix1, Ix2};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

mod attention;
mod axl;
mod low_rank;
mod matmul_free;

type Tensor = ndarray::ArrayD<f64>;

/// One case of an `index.json`.
struct Case {
    name: String,
    index: Value,
    /// What the folder's index says beside its cases.
    folder: Arc<Value>,
    tensors: BTreeMap<String, Tensor>,
    /// Names of tensors that a test has looked at.
    used: RefCell<BTreeSet<String>>,
}

/// The folder that `LAYERSTORE_GOLDEN` names.
fn named_folder() -> Option<PathBuf> {
    std::env::var_os("LAYERSTORE_GOLDEN").map(PathBuf::from)
}

/// What a test ran, by kind of case.
#[derive(Default)]
struct Tally(BTreeMap<String, usize>);

impl Tally {
    /// Counts a case that was run, and asserts that all outputs with a tolerance were looked at, but for those that `unused`
    /// names: another test's, or what the other implementation is known to have wrong. A name with a dot or a slash at its end
    /// stands for all that begin with it.
    fn ran(&mut self, case: &Case, kind: &str, unused: &[&str]) {
        let used = case.used.borrow();
        let named = |name: &str| {
            let group = |start: &str| start.ends_with(['.', '/']) && name.starts_with(start);
            unused.iter().any(|entry| name == *entry || group(entry))
        };
        let judged = |name: &str| {
            case.tolerance(name).is_some_and(|t| ["abs", "rel", "atol", "exact"].iter().any(|k| !t[k].is_null()))
        };
        let outputs = case.tensors.keys().filter(|name| name.starts_with("out."));
        let missed: Vec<&String> =
            outputs.filter(|name| judged(name) && !used.contains(*name) && !named(name)).collect();
        assert!(missed.is_empty(), "{}: nothing looked at {missed:?}", case.name);
        *self.0.entry(kind.to_owned()).or_default() += 1;
    }

    /// Asserts that so many cases of each kind were run; of another folder's cases, that there was one of each kind at least.
    fn expect(self, expected: &[(&str, usize)]) {
        let found: Vec<(&str, usize)> = self.0.iter().map(|(kind, &count)| (kind.as_str(), count)).collect();
        let kinds = |of: &[(&str, usize)]| of.iter().map(|(kind, _)| (*kind).to_owned()).collect::<BTreeSet<String>>();
        match named_folder() {
            None => assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), expected.iter().copied().collect()),
            Some(folder) => assert_eq!(kinds(&found), kinds(expected), "{}", folder.display()),
        }
    }
}

impl Case {
    /// The cases of a system.
    fn of(system: &str) -> Vec<Case> {
        let folder = named_folder().unwrap_or_else(|| "tests/fixtures/golden".into()).join(system);
        let index = folder.join("index.json");
        // Python writes numbers that are not finite, which JSON does not know.
        let index = std::fs::read_to_string(&index).unwrap_or_else(|e| panic!("{}: {e}", index.display()));
        let index = ["-Infinity", "Infinity", "NaN"].iter().fold(index, |text, name| text.replace(name, "null"));
        let index: Value = serde_json::from_str(&index).unwrap();
        let index = Arc::new(index);
        let cases = index["cases"].as_array().unwrap();
        assert!(!cases.is_empty(), "{} lists no cases", folder.display());
        let read = |case: &Value| {
            let file = case["file"].as_str().unwrap();
            let bytes = std::fs::read(folder.join(file)).unwrap();
            let tensors = SafeTensors::deserialize(&bytes).unwrap();
            let tensors = tensors.iter().map(|(name, view)| (name.to_owned(), wide(&view))).collect();
            let used = RefCell::default();
            Case { name: format!("{system}/{file}"), index: case.clone(), folder: index.clone(), tensors, used }
        };
        cases.iter().map(read).collect()
    }

    fn function(&self) -> &str {
        self.index["function"].as_str().unwrap()
    }

    fn has(&self, tensor: &str) -> bool {
        self.tensors.contains_key(tensor)
    }

    fn any(&self, tensor: &str) -> &Tensor {
        self.used.borrow_mut().insert(tensor.to_owned());
        self.tensors.get(tensor).unwrap_or_else(|| panic!("{}: no tensor '{tensor}'", self.name))
    }

    fn vector(&self, tensor: &str) -> Array1<f64> {
        self.any(tensor).clone().into_dimensionality::<Ix1>().unwrap()
    }

    fn matrix(&self, tensor: &str) -> Array2<f64> {
        self.any(tensor).clone().into_dimensionality::<Ix2>().unwrap()
    }

    /// The tolerance of an output: its own, or that of a name with a wildcard.
    fn tolerance(&self, tensor: &str) -> Option<&Value> {
        let all = self.index["tolerance"].as_object()?;
        let matching = |pattern: &str| match pattern.split_once('*') {
            Some((start, end)) => {
                tensor.len() >= pattern.len() - 1 && tensor.starts_with(start) && tensor.ends_with(end)
            }
            None => pattern == tensor,
        };
        all.get(tensor).or_else(|| all.iter().find(|(name, _)| matching(name)).map(|(_, tolerance)| tolerance))
    }

    /// Compares a result with the stored output, as far apart as the index allows.
    fn holds(&self, tensor: &str, found: impl Into<Tensor>) {
        let (found, expected) = (found.into(), self.any(tensor));
        assert_eq!(found.shape(), expected.shape(), "{} {tensor}", self.name);
        let tolerance = self.tolerance(tensor).unwrap_or_else(|| panic!("{} {tensor}: no tolerance", self.name));
        let number = |name: &str| tolerance[name].as_f64();
        let (abs, rel, exact) = (number("abs"), number("rel"), tolerance["exact"].as_bool() == Some(true));
        let sum = number("atol").zip(number("rtol"));
        assert!(abs.is_some() || rel.is_some() || sum.is_some() || exact, "{} {tensor}: {tolerance}", self.name);
        for (at, (f, e)) in found.iter().zip(expected).enumerate() {
            let allowed = match sum {
                Some((abs, rel)) => abs + rel * e.abs(),
                None => abs.unwrap_or(0.0).max(rel.unwrap_or(0.0) * e.abs()),
            };
            assert!((f - e).abs() <= allowed, "{} {tensor} at {at}: {f} for {e}, allowed {allowed}", self.name);
        }
    }
}

fn wide(view: &safetensors::tensor::TensorView) -> Tensor {
    fn numbers<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        bytes.as_chunks::<N>().0.iter().map(|&b| read(b)).collect()
    }
    let values = match view.dtype() {
        Dtype::F32 => numbers(view.data(), |b| f64::from(f32::from_le_bytes(b))),
        Dtype::F16 => numbers(view.data(), |b| half::f16::from_le_bytes(b).to_f64()),
        Dtype::I8 => numbers(view.data(), |b| f64::from(i8::from_le_bytes(b))),
        Dtype::I32 => numbers(view.data(), |b| f64::from(i32::from_le_bytes(b))),
        Dtype::I64 => numbers(view.data(), |b| i64::from_le_bytes(b) as f64),
        other => panic!("a golden tensor of {other:?}"),
    };
    Tensor::from_shape_vec(view.shape(), values).unwrap()
}

fn narrow(matrix: &Array2<f64>) -> Array2<f32> {
    matrix.mapv(|v| v as f32)
}
