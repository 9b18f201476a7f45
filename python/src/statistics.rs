//! Statistics of layers' inputs.

use std::path::Path;
use std::sync::Mutex;

use layerstore::{Calibration as Statistics, CalibrationBuilder, CalibrationFile, SecondMoment};
use ndarray::Array1;
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayDyn, PyReadonlyArray1, PyReadonlyArrayDyn, ToPyArray};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::convert::{Given, call};
use crate::errors::{OrRaise, invalid};
use crate::runtime::compute;

/// The widest inputs: there are no layers of more.
const MOST_FEATURES: usize = 1 << 24;

/// Statistics of a layer's inputs, gathered as they come: the mean, the second moment (its diagonal above a width), and a sample.
///
/// `Calibration(features)` starts empty; `update` adds inputs. Memory does not grow with their number.
#[pyclass(frozen, module = "layerstore")]
pub struct Calibration {
    state: Mutex<State>,
}

enum State {
    Gathering(Box<CalibrationBuilder>),
    Known(Box<Statistics>),
}

impl Calibration {
    /// Returns what was gathered.
    ///
    /// # Errors
    /// When nothing was.
    pub fn statistics(&self, py: Python<'_>) -> PyResult<Statistics> {
        let state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &*state {
            State::Gathering(builder) => builder.clone().finish().or_raise(py),
            State::Known(known) => Ok((**known).clone()),
        }
    }

    /// Reads a `Calibration`, or an array of inputs `[..., in_features]`.
    ///
    /// # Errors
    /// When it is neither, or there are no inputs.
    pub fn read(value: &Bound<'_, PyAny>) -> PyResult<Statistics> {
        let py = value.py();
        if let Ok(known) = value.cast::<Calibration>() {
            return known.get().statistics(py);
        }
        let given = Given::new(value)?;
        let (rows, _) = given.rows(py, "the inputs")?;
        let rows = rows.view().to_owned();
        compute(py, || Statistics::of(rows))
    }
}

#[pymethods]
impl Calibration {
    #[new]
    #[pyo3(signature = (features, *, seed = 0, sample = None))]
    fn new(py: Python<'_>, features: usize, seed: u64, sample: Option<usize>) -> PyResult<Self> {
        if !(1..=MOST_FEATURES).contains(&features) {
            return Err(invalid(py, "features", features, format!("1 to {MOST_FEATURES}")));
        }
        let builder = CalibrationBuilder::new(features, seed);
        let builder = sample.map_or(builder.clone(), |rows| builder.with_sample(rows));
        Ok(Calibration { state: Mutex::new(State::Gathering(Box::new(builder))) })
    }

    /// Makes statistics of a mean `[features]` and a covariance `[features, features]`; there is no sample.
    #[staticmethod]
    fn from_covariance(py: Python<'_>, mean: &Bound<'_, PyAny>, covariance: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (mean, covariance) = (Given::new(mean)?, Given::new(covariance)?);
        let mean: Array1<f64> = mean.view().iter().map(|v| f64::from(*v)).collect();
        let covariance = covariance.matrix(py, "the covariance")?.mapv(f64::from);
        let made = Statistics::from_covariance(mean, covariance).or_raise(py)?;
        Ok(Calibration { state: Mutex::new(State::Known(Box::new(made))) })
    }

    /// Adds inputs `[..., features]`. Numbers that are not finite are refused, and nothing is added then.
    fn update(&self, py: Python<'_>, inputs: &Bound<'_, PyAny>) -> PyResult<()> {
        let given = Given::new(inputs)?;
        let (rows, _) = given.rows(py, "the inputs")?;
        let view = rows.view();
        compute(py, || {
            let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            match &mut *state {
                State::Gathering(builder) => builder.update(view),
                State::Known(_) => {
                    Err(layerstore::Error::expected("statistics to add to", "finished ones", "Calibration(features)"))
                }
            }
        })
    }

    /// Inputs that were added; `None` for statistics of a covariance alone.
    #[getter]
    fn tokens(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        Ok(Some(self.statistics(py)?.tokens()).filter(|tokens| *tokens != u64::MAX))
    }

    /// The width of an input.
    #[getter]
    fn features(&self, py: Python<'_>) -> PyResult<usize> {
        Ok(self.statistics(py)?.features())
    }

    /// Returns the mean `[features]`.
    fn mean<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        Ok(self.statistics(py)?.mean().to_pyarray(py))
    }

    /// Returns the covariance `[features, features]`.
    fn covariance<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f64>>> {
        let known = self.statistics(py)?;
        Ok(known.covariance().or_raise(py)?.into_owned().into_pyarray(py))
    }

    /// Returns the sample of inputs that was kept, `[rows, features]`.
    fn sample<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray2<f32>>> {
        Ok(self.statistics(py)?.sample().to_pyarray(py))
    }

    /// Makes statistics of their numbers: how many inputs, their mean, the mean of |x|, E[x xᵀ] or its diagonal, and a sample.
    #[staticmethod]
    fn from_moments(
        py: Python<'_>,
        tokens: u64,
        mean: PyReadonlyArray1<'_, f64>,
        mean_abs: PyReadonlyArray1<'_, f64>,
        second: PyReadonlyArrayDyn<'_, f64>,
        sample: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let second = second.as_array().to_owned();
        let wrong = |found: usize| invalid(py, "dimensions of the second moment", found, "1 or 2");
        let second = match second.ndim() {
            1 => second.into_dimensionality().map(SecondMoment::Diagonal).map_err(|_| wrong(1))?,
            2 => second.into_dimensionality().map(SecondMoment::Full).map_err(|_| wrong(2))?,
            found => return Err(wrong(found)),
        };
        let (mean, mean_abs) = (mean.as_array().to_owned(), mean_abs.as_array().to_owned());
        let sample = Given::new(sample)?;
        let sample = sample.matrix(py, "the sample")?.to_owned();
        let made = compute(py, || Statistics::from_moments(tokens, mean, mean_abs, second, sample))?;
        Ok(Calibration { state: Mutex::new(State::Known(Box::new(made))) })
    }

    /// Returns E[x xᵀ] `[features, features]`, or its diagonal `[features]` of wide inputs.
    fn second_moment<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        let known = self.statistics(py)?;
        Ok(match known.has_full_moment() {
            true => known.second_moment().or_raise(py)?.into_owned().into_dyn().into_pyarray(py),
            false => known.second_diagonal().into_dyn().into_pyarray(py),
        })
    }

    /// Returns the mean of |x| `[features]`.
    fn mean_abs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArray1<f64>>> {
        Ok(self.statistics(py)?.mean_abs().to_pyarray(py))
    }

    #[expect(clippy::type_complexity, reason = "a constructor and its arguments")]
    fn __reduce__<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(
        Bound<'py, PyAny>,
        (
            u64,
            Bound<'py, PyArray1<f64>>,
            Bound<'py, PyArray1<f64>>,
            Bound<'py, PyArrayDyn<f64>>,
            Bound<'py, PyArray2<f32>>,
        ),
    )> {
        let state = (
            self.statistics(py)?.tokens(),
            self.mean(py)?,
            self.mean_abs(py)?,
            self.second_moment(py)?,
            self.sample(py)?,
        );
        Ok((py.get_type::<Calibration>().getattr("from_moments")?, state))
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        match self.statistics(py) {
            Ok(known) if known.tokens() == u64::MAX => {
                format!("<layerstore.Calibration of a covariance, {} wide>", known.features())
            }
            Ok(known) => format!("<layerstore.Calibration of {} inputs, {} wide>", known.tokens(), known.features()),
            Err(_) => "<layerstore.Calibration of no inputs>".to_owned(),
        }
    }
}

/// Writes statistics by layer, `{name: Calibration or inputs}`, to a file that imports take.
#[pyfunction]
pub fn write_statistics(py: Python<'_>, path: &Bound<'_, PyAny>, layers: &Bound<'_, PyDict>) -> PyResult<()> {
    let mut all = vec![];
    for (name, value) in layers {
        all.push((name.extract::<String>()?, Calibration::read(&value)?));
    }
    let path: std::path::PathBuf = path.extract()?;
    compute(py, || layerstore::write_statistics(&path, &all))
}

/// Opens calibration that a caller gives: a path, or statistics or inputs by layer, which go through a file of `folder`.
///
/// # Errors
/// When it is none of these.
pub fn open(value: &Bound<'_, PyAny>, folder: &Path) -> PyResult<CalibrationFile> {
    let py = value.py();
    let path = match value.cast::<PyDict>() {
        Ok(layers) => {
            let path = folder.join("statistics.safetensors");
            write_statistics(py, path.clone().into_pyobject(py)?.as_any(), layers)?;
            path
        }
        Err(_) => value
            .extract()
            .map_err(|_| invalid(py, "calibration", value.get_type(), "a path, or a dictionary by layer"))?,
    };
    compute(py, || CalibrationFile::open(&path))
}

/// Makes a folder for what is written on the way; it is removed when the returned value is dropped.
///
/// # Errors
/// When there is no room for it.
pub fn temporary(py: Python<'_>) -> PyResult<Temporary> {
    let made = call(py, "_arrays", "temporary_folder", ())?;
    Ok(Temporary { path: made.getattr("name")?.extract()?, _folder: made.unbind() })
}

/// A folder that is removed with this value.
pub struct Temporary {
    /// Its path.
    pub path: std::path::PathBuf,
    _folder: Py<PyAny>,
}
