//! Progress of long work, told to a Python callable.

use std::sync::{Arc, Mutex};

use layerstore::{Cancel, Progress, Silent};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::call;

#[derive(Default)]
struct State {
    layer: String,
    done: usize,
    total: usize,
    bytes_done: u64,
    bytes_total: u64,
    /// What the callable raised.
    raised: Option<PyErr>,
}

/// Tells a callable how far the work is: `callable(event)`, a dictionary of `event`, `layer`, `done`, `total`, `bytes_done` and
/// `bytes_total`. Work whose callable raises is stopped, and the exception goes on to the caller.
struct Told {
    callable: Py<PyAny>,
    cancel: Cancel,
    state: Mutex<State>,
}

impl Told {
    fn tell(&self, event: &str, change: impl FnOnce(&mut State)) {
        let (layer, done, total, bytes_done, bytes_total) = {
            let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            change(&mut state);
            if state.raised.is_some() {
                return;
            }
            (state.layer.clone(), state.done, state.total, state.bytes_done, state.bytes_total)
        };
        let told = Python::attach(|py| {
            let dict = PyDict::new(py);
            dict.set_item("event", event)?;
            dict.set_item("layer", layer)?;
            dict.set_item("done", done)?;
            dict.set_item("total", total)?;
            dict.set_item("bytes_done", bytes_done)?;
            dict.set_item("bytes_total", bytes_total)?;
            self.callable.call1(py, (dict,)).map(|_| ())
        });
        if let Err(raised) = told {
            self.cancel.cancel();
            self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner).raised = Some(raised);
        }
    }
}

impl Progress for Told {
    fn started(&self, layers: usize, bytes: u64) {
        self.tell("started", |state| (state.total, state.bytes_total) = (layers, bytes));
    }
    fn layer(&self, name: &str) {
        self.tell("layer", |state| name.clone_into(&mut state.layer));
    }
    fn layer_done(&self, bytes: u64, skipped: bool) {
        self.tell(if skipped { "skipped" } else { "done" }, |state| {
            state.done += 1;
            state.bytes_done += bytes;
        });
    }
    fn training_started(&self, epochs: usize, steps: usize) {
        self.tell("started", |state| state.total = epochs * steps);
    }
    fn step_done(&self) {
        self.tell("done", |state| state.done += 1);
    }
    fn finished(&self) {
        self.tell("finished", |_| {});
    }
}

/// What is told, and what it raised.
pub struct Telling {
    told: Option<Arc<Told>>,
    /// Asks the work to stop.
    pub cancel: Cancel,
}

impl Telling {
    /// Takes `None` or `False` for silence, `True` for a bar, or a callable.
    ///
    /// # Errors
    /// When a bar cannot be made.
    pub fn new(progress: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let cancel = Cancel::new();
        let callable = match progress {
            None => None,
            Some(value) if value.is_callable() => Some(value.clone()),
            Some(value) if value.is_truthy()? => Some(call(value.py(), "_progress", "bar", ())?),
            Some(_) => None,
        };
        let told = |callable: Bound<'_, PyAny>| {
            let (callable, cancel) = (callable.unbind(), cancel.clone());
            Arc::new(Told { callable, cancel, state: Mutex::default() })
        };
        Ok(Telling { told: callable.map(told), cancel })
    }

    /// Returns what the work tells.
    pub fn progress(&self) -> Arc<dyn Progress> {
        match &self.told {
            Some(told) => told.clone(),
            None => Arc::new(Silent),
        }
    }

    /// Returns what the work gave, or what the callable raised.
    ///
    /// # Errors
    /// As the work, and the callable's.
    pub fn ended<T>(self, done: PyResult<T>) -> PyResult<T> {
        let raised = self
            .told
            .and_then(|told| told.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner).raised.take());
        raised.map_or(done, Err)
    }
}
