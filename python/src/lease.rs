//! Leases: what keeps gc away for a while.

use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// Keeps gc from artifacts that no version names yet: `with store.lease():`. Closing it, or the end of the process, lets go.
#[pyclass(frozen, module = "layerstore")]
pub struct Lease {
    held: Mutex<Option<layerstore::Lease>>,
}

impl Lease {
    /// Wraps a lease.
    pub fn of(lease: layerstore::Lease) -> Self {
        Lease { held: Mutex::new(Some(lease)) }
    }
}

#[pymethods]
impl Lease {
    /// Lets go.
    fn close(&self) {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, _exception: &Bound<'_, PyTuple>) {
        self.close();
    }

    fn __repr__(&self) -> &'static str {
        match *self.held.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(_) => "<layerstore.Lease>",
            None => "<layerstore.Lease, closed>",
        }
    }
}
