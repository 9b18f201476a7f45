//! Product codes in cells: a query scores the keys of the few cells that it points at (FAISS's IVF-PQ).
//!
//! The codes are those of the keys themselves (FAISS's `by_residual = false`): a layer's keys are orthogonal, so what is
//! left of one after its cell's centre is taken off is hardly shorter.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

use super::flat::FlatIndex;
use super::search::{ContributionRange, IndexInfo, SearchIndex};
use super::space::{ContributionSpace, check_scales};
use crate::error::{Error, Result};
use crate::linalg::unit_of_f32;
use crate::quant::{kmeans, nearest};

/// An index of product codes in cells, of which a search looks into some.
#[derive(Debug, Clone, PartialEq)]
pub struct IvfPqIndex {
    codes: FlatIndex,
    space: ContributionSpace,
    /// `[clusters, dimension]`, of contributions in their units.
    centres: Array2<f32>,
    /// Distance of each cell's farthest key from the centre `[clusters]`.
    radii: Array1<f32>,
    /// Each key's cell `[len]`.
    cells: Vec<u32>,
    /// Each cell's keys `[clusters]`.
    lists: Vec<Vec<u32>>,
    probes: usize,
}

impl IvfPqIndex {
    /// Divides `keys` `[len, dimension]` of these `scales` `[len]` into `clusters` cells by k-means; `codes` are the same
    /// keys. `units` `[dimension]` say how much each input varies. A search looks into `probes` cells.
    ///
    /// # Errors
    /// When there are fewer keys than cells, no cells, or more probes than cells; when sizes do not fit each other.
    pub fn fit(
        codes: FlatIndex,
        keys: ArrayView2<f32>,
        scales: &[f32],
        units: Option<Array1<f32>>,
        (clusters, probes): (usize, usize),
        seed: u64,
    ) -> Result<Self> {
        let space = ContributionSpace::new(units, keys.ncols())?;
        check_scales(keys, scales)?;
        if keys.dim() != (codes.len(), codes.dimension()) {
            let expected = format!("{:?}, as the codes are of", (codes.len(), codes.dimension()));
            return Err(Error::expected("shape of the keys", format!("{:?}", keys.dim()), expected));
        }
        if clusters == 0 || clusters > codes.len() {
            return Err(Error::expected("clusters", clusters, format!("1 to {}, the layer's keys", codes.len())));
        }
        let mut points = space.keys(keys, scales);
        // Cells are put in order by what they may add, in whatever unit that is.
        if let Some(unit) = unit_of_f32(points.iter()) {
            points *= 1.0 / unit;
        }
        let centres = kmeans(points.view(), &vec![1.0; points.nrows()], clusters, seed);
        let mut radii = Array1::zeros(clusters);
        let cells = points.rows().into_iter().map(|point| {
            let (cell, distance) = nearest(&centres, point.to_slice().expect("standard layout"));
            radii[cell] = distance.sqrt().max(radii[cell]);
            cell as u32
        });
        let cells = cells.collect();
        Self::assemble(codes, centres, radii, cells, space, probes)
    }

    /// Makes an index of what [`IvfPqIndex::rows`], [`IvfPqIndex::cells`] and [`IvfPqIndex::units`] returned.
    ///
    /// # Errors
    /// When shapes do not belong together, a cell is not there, or there are more probes than cells.
    pub fn from_cells(
        codes: FlatIndex,
        centres: Array2<f32>,
        radii: Array1<f32>,
        cells: Vec<u32>,
        units: Option<Array1<f32>>,
        probes: usize,
    ) -> Result<Self> {
        let space = ContributionSpace::new(units, codes.dimension())?;
        Self::assemble(codes, centres, radii, cells, space, probes)
    }

    fn assemble(
        codes: FlatIndex,
        centres: Array2<f32>,
        radii: Array1<f32>,
        cells: Vec<u32>,
        space: ContributionSpace,
        probes: usize,
    ) -> Result<Self> {
        let found = (centres.ncols(), radii.len(), cells.len());
        let expected = (codes.dimension(), centres.nrows(), codes.len());
        if found != expected {
            return Err(Error::expected(
                "length of the cells' centres, number of radii, number of keys in cells",
                format!("{found:?}"),
                format!("{expected:?}"),
            ));
        }
        let mut lists = vec![vec![]; centres.nrows()];
        for (key, &cell) in cells.iter().enumerate() {
            let list = lists.get_mut(cell as usize).ok_or_else(|| {
                Error::expected("a key's cell", cell, format!("less than {}, the number of cells", centres.nrows()))
            })?;
            list.push(key as u32);
        }
        if probes == 0 || probes > lists.len() {
            return Err(Error::expected("probes", probes, format!("1 to {}, the number of cells", lists.len())));
        }
        let centres = centres.as_standard_layout().into_owned();
        Ok(IvfPqIndex { codes, space, centres, radii, cells, lists, probes })
    }

    /// Returns the keys' codes.
    pub fn rows(&self) -> &FlatIndex {
        &self.codes
    }

    /// Returns the cells' centres `[clusters, dimension]`, their radii `[clusters]`, and each key's cell `[len]`.
    pub fn cells(&self) -> (ArrayView2<'_, f32>, ArrayView1<'_, f32>, &[u32]) {
        (self.centres.view(), self.radii.view(), &self.cells)
    }

    /// Returns the units of the centres `[dimension]`.
    pub fn units(&self) -> Option<ArrayView1<'_, f32>> {
        self.space.units()
    }
}

impl SearchIndex for IvfPqIndex {
    fn len(&self) -> usize {
        self.codes.len()
    }

    fn dimension(&self) -> usize {
        self.codes.dimension()
    }

    fn scores(&self, queries: ArrayView2<f32>) -> Array2<f32> {
        self.codes.scores(queries)
    }

    fn scores_of(&self, query: ArrayView1<f32>, keys: &[u32]) -> Vec<f32> {
        self.codes.scores_of(query, keys)
    }

    fn candidates(&self, query: ArrayView1<f32>, range: ContributionRange) -> Option<Vec<u32>> {
        let query = Array1::from(self.space.query(query));
        // What a key at the centre adds, and what one at the rim may add by a direction of which the query has its usual
        // share: keys are orthogonal, so their centre says little of them, and their lengths say more.
        let usual = query.dot(&query).sqrt() / (query.len().max(1) as f32).sqrt();
        let near = self.centres.dot(&query);
        let rank = |cell: usize| {
            let centre = if range.two_sided { near[cell].abs() } else { near[cell] };
            centre + usual * self.radii[cell]
        };
        let mut order: Vec<usize> = (0..self.lists.len()).collect();
        order.sort_unstable_by(|&a, &b| rank(b).total_cmp(&rank(a)));
        let mut keys: Vec<u32> = order.iter().take(self.probes).flat_map(|&cell| &self.lists[cell]).copied().collect();
        keys.sort_unstable();
        Some(keys)
    }

    fn reconstruct(&self) -> Array2<f32> {
        self.codes.reconstruct()
    }

    fn info(&self) -> IndexInfo {
        let cells = 4 * (self.centres.len() + 2 * self.cells.len());
        IndexInfo { backend: "ivf_pq", memory_bytes: self.codes.memory_bytes() + cells, ..self.codes.info() }
    }

    fn reset(&mut self) -> Result<()> {
        self.codes.reset()?;
        self.cells.clear();
        self.lists.iter_mut().for_each(Vec::clear);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::RowType;

    fn sample(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
        let cell = |i: usize, j: usize| ((i * 7919 + j * 104_729 + seed * 31) % 1009) as f32 / 500.0 - 1.0;
        Array2::from_shape_fn((rows, columns), |(i, j)| cell(i, j))
    }

    #[test]
    fn every_cell_probed_is_every_key() {
        let (keys, scales) = (sample(60, 8, 1), vec![1.0; 60]);
        let rows = FlatIndex::new(keys.clone(), RowType::F32, None).unwrap();
        let fitted = |probes| IvfPqIndex::fit(rows.clone(), keys.view(), &scales, None, (12, probes), 0).unwrap();
        let range = ContributionRange { least: 0.5, two_sided: true };
        let mut last = 0;
        for probes in [1, 4, 12] {
            let index = fitted(probes);
            let found = index.candidates(sample(1, 8, 9).row(0), range).unwrap();
            assert!(found.len() > last && found.windows(2).all(|w| w[0] < w[1]));
            last = found.len();
            let (centres, radii, cells) = index.cells();
            let back = IvfPqIndex::from_cells(
                rows.clone(),
                centres.to_owned(),
                radii.to_owned(),
                cells.to_vec(),
                None,
                probes,
            )
            .unwrap();
            assert_eq!(back, index);
        }
        assert_eq!(last, 60);
        // A direction probes the cell of the key that it is, before most.
        let index = fitted(4);
        let found = (0..60u32).filter(|&i| index.candidates(keys.row(i as usize), range).unwrap().contains(&i)).count();
        assert!(found > 50, "{found}");
    }

    #[test]
    fn cells_that_do_not_belong_are_refused() {
        let (keys, scales) = (sample(5, 4, 1), vec![1.0; 5]);
        let rows = FlatIndex::new(keys.clone(), RowType::F32, None).unwrap();
        for (clusters, probes) in [(0, 1), (6, 1), (3, 0), (3, 4)] {
            assert!(IvfPqIndex::fit(rows.clone(), keys.view(), &scales, None, (clusters, probes), 0).is_err());
        }
        let made = |cells: Vec<u32>, radii: usize, units: Option<Array1<f32>>| {
            IvfPqIndex::from_cells(rows.clone(), sample(2, 4, 3), Array1::ones(radii), cells, units, 1)
        };
        assert!(made(vec![0, 1, 1, 0, 1], 2, None).is_ok());
        assert!(made(vec![0, 1, 2, 0, 1], 2, None).is_err());
        assert!(made(vec![0, 1], 2, None).is_err());
        assert!(made(vec![0; 5], 3, None).is_err());
        assert!(made(vec![0; 5], 2, Some(Array1::ones(3))).is_err());
    }
}
