//! A scan of every key: the right default for a layer's few thousand orthogonal keys.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis};

use super::search::{IndexInfo, SearchIndex};
use crate::error::{Error, Result};
use crate::linalg::dot_f64;
use crate::quant::{RowFormat, RowMatrix, RowType};

/// An index that scores every key. Keys are rows of one matrix: f32, f16, int8 with a scale per key, or product codes, whose scores are sums from a table
/// made once a query.
///
/// A key of a whitened layer is long in the directions in which inputs vary little, so one scale for all its numbers
/// would round the others away. Int8 keys may therefore be kept in units of how much each input varies; queries are
/// brought to the same units.
#[derive(Debug, Clone, PartialEq)]
pub struct FlatIndex {
    keys: RowMatrix,
    /// `[dimension]`, what each number of a key was multiplied with.
    units: Option<Array1<f32>>,
}

impl FlatIndex {
    /// Makes an index of `keys` `[len, dimension]`, kept in `units` `[dimension]` where these are given.
    ///
    /// # Errors
    /// When the units' number is another, one of them is no positive number, or a number does not fit the type.
    pub fn new(keys: Array2<f32>, kind: RowType, units: Option<Array1<f32>>) -> Result<Self> {
        Self::in_format(keys, RowFormat::Plain(kind), &[], units)
    }

    /// Makes an index of `keys` `[len, dimension]` in any format; `weights` `[len]` say how much each key's error counts
    /// where codewords are learned.
    ///
    /// # Errors
    /// As [`FlatIndex::new`], and when a product format does not fit the keys.
    pub fn in_format(
        keys: Array2<f32>,
        format: RowFormat,
        weights: &[f32],
        units: Option<Array1<f32>>,
    ) -> Result<Self> {
        let keys = match &units {
            Some(units) => {
                check_units(units.view(), keys.ncols())?;
                keys * units.view().insert_axis(Axis(0))
            }
            None => keys,
        };
        Ok(FlatIndex { keys: RowMatrix::in_format(keys, format, weights)?, units })
    }

    /// Makes an index of what [`FlatIndex::rows`] and [`FlatIndex::units`] returned.
    ///
    /// # Errors
    /// As [`FlatIndex::new`].
    pub fn from_rows(keys: RowMatrix, units: Option<Array1<f32>>) -> Result<Self> {
        if let Some(units) = &units {
            check_units(units.view(), keys.columns())?;
        }
        Ok(FlatIndex { keys, units })
    }

    /// Returns the keys as they are kept, in their units.
    pub fn rows(&self) -> &RowMatrix {
        &self.keys
    }

    /// Returns what each number of a key was multiplied with `[dimension]`.
    pub fn units(&self) -> Option<ArrayView1<'_, f32>> {
        self.units.as_ref().map(|u| u.view())
    }

    /// Returns a query's length in the units of the keys.
    pub fn length(&self, query: ArrayView1<f32>) -> f64 {
        let query = match &self.units {
            Some(units) => &query / units,
            None => query.to_owned(),
        };
        let query = query.as_slice().expect("a fresh array is contiguous");
        dot_f64(query, query).sqrt()
    }

    /// Returns the bytes of memory of keys and units.
    pub fn memory_bytes(&self) -> usize {
        self.keys.memory_bytes() + self.units.as_ref().map_or(0, |u| 4 * u.len())
    }
}

fn check_units(units: ArrayView1<f32>, dimension: usize) -> Result<()> {
    if units.len() != dimension {
        return Err(Error::expected("units of the keys", units.len(), format!("{dimension}, a key's length")));
    }
    match units.iter().find(|u| !(u.is_finite() && **u > 0.0)) {
        Some(unit) => Err(Error::expected("units of the keys", unit, "positive numbers")),
        None => Ok(()),
    }
}

impl SearchIndex for FlatIndex {
    fn len(&self) -> usize {
        self.keys.rows()
    }

    fn dimension(&self) -> usize {
        self.keys.columns()
    }

    fn scores(&self, queries: ArrayView2<f32>) -> Array2<f32> {
        match &self.units {
            Some(units) => self.keys.products((&queries / &units.view().insert_axis(Axis(0))).view()),
            None => self.keys.products(queries),
        }
    }

    fn scores_of(&self, query: ArrayView1<f32>, keys: &[u32]) -> Vec<f32> {
        match &self.units {
            Some(units) => self.keys.products_of((&query / units).view(), keys),
            None => self.keys.products_of(query, keys),
        }
    }

    fn info(&self) -> IndexInfo {
        let backend = if self.keys.quantizer().is_some() { "pq" } else { "flat" };
        IndexInfo { backend, keys: self.len(), dimension: self.dimension(), memory_bytes: self.memory_bytes() }
    }

    fn reset(&mut self) -> Result<()> {
        self.keys = RowMatrix::new(Array2::zeros((0, self.dimension())), RowType::F32)?;
        Ok(())
    }

    fn reconstruct(&self) -> Array2<f32> {
        let keys = self.keys.to_f32();
        match &self.units {
            Some(units) => keys / units.view().insert_axis(Axis(0)),
            None => keys,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn units_change_the_rounding_and_not_the_scores() {
        // The second number is small, and matters as much: inputs are large there.
        let keys = array![[1.0f32, 0.001], [-0.5, 0.002]];
        let queries = array![[1.0f32, 1000.0], [0.5, -500.0]];
        let exact = queries.dot(&keys.t());
        let far = |index: &FlatIndex| {
            (index.scores(queries.view()) - &exact).iter().fold(0f32, |worst, d| worst.max(d.abs()))
        };
        let plain = FlatIndex::new(keys.clone(), RowType::Int8, None).unwrap();
        let scaled = FlatIndex::new(keys.clone(), RowType::Int8, Some(array![1.0, 1000.0])).unwrap();
        assert!(far(&scaled) < 0.02 && far(&plain) > 0.1, "{} {}", far(&scaled), far(&plain));
        assert!((scaled.reconstruct() - &keys).iter().all(|d| d.abs() < 0.01));
        let back = FlatIndex::from_rows(scaled.rows().clone(), scaled.units().map(|u| u.to_owned())).unwrap();
        assert_eq!(back, scaled);
        for bad in [array![1.0f32], array![1.0, 0.0], array![1.0, f32::NAN]] {
            assert!(FlatIndex::new(keys.clone(), RowType::F32, Some(bad)).is_err());
        }
    }
}
