//! The space in which cells and graphs find neighbours.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};

use crate::error::{Error, Result};

/// The space of cells and graphs: keys times their scales, so that an inner product is a contribution, in units of how
/// much each input varies, so that directions in which inputs vary little do not decide which keys are near.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ContributionSpace {
    units: Option<Array1<f32>>,
}

impl ContributionSpace {
    /// Makes the space of keys of length `dimension`, in units `[dimension]` where these are given.
    ///
    /// # Errors
    /// When the units' number is another, or one of them is no finite number of at least 0.
    pub fn new(units: Option<Array1<f32>>, dimension: usize) -> Result<Self> {
        if let Some(units) = &units {
            if units.len() != dimension {
                let expected = format!("{dimension}, a key's length");
                return Err(Error::expected("units of an index", units.len(), expected));
            }
            if let Some(unit) = units.iter().find(|u| !(u.is_finite() && **u >= 0.0)) {
                return Err(Error::expected("units of an index", unit, "finite numbers of at least 0"));
            }
        }
        Ok(ContributionSpace { units })
    }

    /// Returns the units `[dimension]`.
    pub fn units(&self) -> Option<ArrayView1<'_, f32>> {
        self.units.as_ref().map(|u| u.view())
    }

    /// Returns the space in which keys of length `dimension` are multiplied with `factor` beside.
    ///
    /// # Errors
    /// When a unit is beyond what f32 holds.
    pub fn in_units_of(self, factor: f64, dimension: usize) -> Result<Self> {
        let units = self.units.unwrap_or_else(|| Array1::ones(dimension));
        ContributionSpace::new(Some(units.mapv(|unit| (f64::from(unit) * factor) as f32)), dimension)
    }

    /// Returns keys `[len, dimension]` of these `scales` `[len]` in the space.
    pub fn keys(&self, keys: ArrayView2<f32>, scales: &[f32]) -> Array2<f32> {
        let mut keys = &keys * &ArrayView1::from(scales).insert_axis(Axis(1));
        if let Some(units) = &self.units {
            keys *= &units.view().insert_axis(Axis(0));
        }
        keys
    }

    /// Returns a query `[dimension]` in the space.
    pub fn query(&self, query: ArrayView1<f32>) -> Vec<f32> {
        match &self.units {
            Some(units) => (&query / units).to_vec(),
            None => query.to_vec(),
        }
    }
}

/// Refuses keys and scales that are not equally many.
pub(super) fn check_scales(keys: ArrayView2<f32>, scales: &[f32]) -> Result<()> {
    match keys.nrows() == scales.len() {
        true => Ok(()),
        false => Err(Error::expected("scales of the keys", scales.len(), format!("{}, one a key", keys.nrows()))),
    }
}
