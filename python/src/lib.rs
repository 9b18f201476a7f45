//! The native module of the Python package `layerstore`: the crate's verbs as methods, arrays without copies, errors as exceptions.

use pyo3::prelude::*;

mod attention;
mod convert;
mod errors;
mod layer;
mod lease;
mod make;
mod models;
mod modules;
mod parts;
mod progress;
mod runtime;
mod snapshot;
mod source;
mod statistics;
mod store;

/// The native module of `layerstore`.
#[pymodule]
mod _native {
    #[pymodule_export]
    use crate::attention::{AttentionCache, exact_attention};
    #[pymodule_export]
    use crate::layer::Layer;
    #[pymodule_export]
    use crate::lease::Lease;
    #[pymodule_export]
    use crate::make::{compress, learn_codebooks, load_backend, methods, save_backend, vq_attention};
    #[pymodule_export]
    use crate::models::{LanguageModel, Session, TextEncoder};
    #[pymodule_export]
    use crate::modules::{AttentionBlock, Module, decode_ternary, encode_ternary};
    #[pymodule_export]
    use crate::runtime::after_fork;
    #[pymodule_export]
    use crate::snapshot::Snapshot;
    #[pymodule_export]
    use crate::statistics::{Calibration, write_statistics};
    #[pymodule_export]
    use crate::store::{Store, create, open};
    /// Loads NumPy's interface now: later, Ctrl-C could come between.
    #[pymodule_init]
    fn init(module: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
        use pyo3::types::PyModuleMethods;
        numpy::PyArray1::<f32>::zeros(module.py(), 0, false);
        let _ = module.name()?;
        Ok(())
    }

    /// The version of the package.
    #[pymodule_export]
    #[expect(non_upper_case_globals, reason = "a name of Python's")]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
