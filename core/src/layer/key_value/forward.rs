//! Searches and forward passes.

use ndarray::{Array2, ArrayView2, Axis};

use super::answer::Answer;
use super::layer::KeyValueLayer;
use super::limit::Limit;
use super::search::{QueryHits, SelectLimit, rank_hits};
use crate::error::{Error, Result};
use crate::layer::traits::{Accuracy, Layer, Output, SearchReport};
use crate::linalg::require_finite;

/// Batch size from which contributions may go through one matrix product instead of a gather for each row.
pub(super) const PRODUCT_FROM: usize = 8;

/// They do where hits are at least one key in this many: a gather reads only the hits, but at a fraction of a product's speed.
const PRODUCT_SHARE: usize = 2;

/// Inputs whose contributions of all keys are in memory at a time.
const FLOOR_ROWS: usize = 512;

/// Multiply-adds from which several threads share the work.
const PARALLEL_FROM: usize = 1 << 17;

impl KeyValueLayer {
    /// Returns the limit of the layer's settings, with the expected number of keys as a threshold.
    pub(super) fn limit(&self) -> SelectLimit {
        self.core.resolve(self.settings.limit(self.rank()), &self.settings)
    }

    /// Returns the hits of each row of `x` `[batch, in_features]`, under `limit` or the layer's own settings.
    ///
    /// # Errors
    /// When the width of `x` is another, a value is not finite, or the limit is out of range.
    pub fn search(&self, x: ArrayView2<f32>, limit: Option<Limit>) -> Result<Vec<QueryHits>> {
        if x.ncols() != self.in_features() {
            return Err(Error::expected(
                "width of the query",
                x.ncols(),
                format!("{}, the layer's in_features", self.in_features()),
            ));
        }
        require_finite("the query", x.iter())?;
        let limit = match limit {
            Some(limit) => {
                self.core.check(limit, &self.settings)?;
                self.core.resolve(limit, &self.settings)
            }
            None => self.limit(),
        };
        let centred = &x - &self.core.mean;
        let answers = self.core.answers(centred.view(), &self.settings, limit).into_iter().map(|mut answer| {
            rank_hits(&mut answer.hits, &self.settings);
            QueryHits { threshold: answer.threshold, certified_error: answer.bound, hits: answer.hits }
        });
        Ok(answers.collect())
    }

    /// Returns `x · Wᵀ` for a checked `x`, and the bound on its error where there is one.
    pub(super) fn retrieved_product(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Output {
        let core = &*self.core;
        let (batch, keys, outputs) = (x.nrows(), core.scales.len(), core.config.out_features);
        let centred = &x - &core.mean;
        let mut y = Array2::zeros((batch, outputs));
        y += &core.mean_output;
        if accuracy == Accuracy::Full || !self.settings.use_approximate_inference {
            let (contributions, bounds) = core.every_contribution(centred.view());
            y += &core.values.weighted(contributions.view());
            return Output { y, relative_error_bound: worst(bounds.into_iter()) };
        }
        // A batch enters the pool of threads once, and its parts are shared out in there.
        let answers = match batch {
            0 | 1 => self.gathered(centred.view(), &mut y),
            _ => rayon::scope(|_| self.gathered(centred.view(), &mut y)),
        };
        if many(&answers, keys) {
            let mut contributions = Array2::zeros((batch, keys));
            for (mut row, answer) in contributions.rows_mut().into_iter().zip(&answers) {
                answer.hits.iter().for_each(|hit| row[hit.key as usize] = hit.contribution);
            }
            y += &core.values.weighted(contributions.view());
        }
        Output { y, relative_error_bound: worst(answers.iter().map(|answer| answer.bound)) }
    }

    /// Returns the answers to centred queries. Their values are added to `y`, unless the caller is to do it by a product because
    /// there are [`many`].
    fn gathered(&self, centred: ArrayView2<f32>, y: &mut Array2<f32>) -> Vec<Answer> {
        let core = &*self.core;
        let answers = core.answers(centred, &self.settings, self.limit());
        let outputs = y.ncols();
        if outputs == 0 || many(&answers, core.scales.len()) {
            return answers;
        }
        let sparse_row =
            |answer: &Answer| answer.hits.iter().map(|hit| (hit.key, hit.contribution)).collect::<Vec<_>>();
        let sparse_rows: Vec<Vec<(u32, f32)>> = answers.iter().map(sparse_row).collect();
        let used: usize = sparse_rows.iter().map(Vec::len).sum();
        if answers.len() > 1 && used * outputs >= PARALLEL_FROM {
            core.values.accumulate_batch(&sparse_rows, y.view_mut());
        } else {
            let rows = y.as_slice_mut().expect("a fresh array is contiguous");
            rows.chunks_mut(outputs).zip(&sparse_rows).for_each(|(y, row)| core.values.accumulate(row, y));
        }
        answers
    }

    /// Returns the mean number of keys and the mean certified error of `inputs`; nothing where the layer uses every key.
    pub(super) fn searched(&self, inputs: ArrayView2<f32>) -> Result<SearchReport> {
        if !self.settings.use_approximate_inference || inputs.nrows() == 0 {
            return Ok(SearchReport::default());
        }
        let answers = self.search(inputs, None)?;
        let keys = answers.iter().map(|a| a.hits.len()).sum::<usize>() as f64 / answers.len() as f64;
        let bounds: Option<Vec<f64>> = answers.iter().map(|a| a.certified_error).collect();
        let asked = self.asked_error();
        let floor = || {
            let centred = &inputs - &self.core.mean;
            let parts = centred.axis_chunks_iter(Axis(0), FLOOR_ROWS);
            worst(parts.flat_map(|x| self.core.every_contribution(x).1))
        };
        Ok(SearchReport {
            mean_keys: Some(keys),
            mean_certified_error: bounds.map(|b| b.iter().sum::<f64>() / b.len() as f64),
            missed_queries: asked.map(|asked| missed(&answers, asked)),
            error_floor: asked.and_then(|_| floor()),
        })
    }

    /// Returns the largest error that the settings have each query certify, where they ask for one.
    pub fn asked_error(&self) -> Option<f64> {
        match self.settings.limit(self.rank()) {
            Limit::MaxError(asked) if self.settings.use_approximate_inference => Some(asked),
            _ => None,
        }
    }

    /// Returns what to tell a person where the layer cannot certify the error that its settings ask for, for all of `inputs`
    /// `[batch, in_features]`, of which `report` is; without inputs, for any.
    pub fn unkept_promise(&self, inputs: usize, report: &SearchReport) -> Option<String> {
        let asked = self.asked_error()?;
        if inputs == 0 {
            // Inputs have mean 0, and outputs are no longer than the largest scale makes them.
            let config = &self.core.config;
            let most = self.core.scales.iter().fold(0f32, |most, s| most.max(*s));
            let keys =
                if most > 0.0 && self.core.float_keys.is_none() { config.key_error / f64::from(most) } else { 0.0 };
            let least = config.value_error + keys;
            return (least > asked).then(|| {
                format!("max_relative_error = {asked} is missed by every input: rounded keys and values alone leave {least:.4} or more")
            });
        }
        let missed = report.missed_queries.filter(|missed| *missed > 0)?;
        let why = match report.error_floor {
            Some(floor) if floor <= asked => ": max_ids_capacity keeps keys out".to_owned(),
            Some(floor) => format!(": rounded keys and values alone leave up to {floor:.4}"),
            None => ": for one of them no bound can be given".to_owned(),
        };
        Some(format!("max_relative_error = {asked} is missed by {missed} of {inputs} inputs{why}"))
    }
}

/// Whether one matrix product takes less time than gathering all hits.
fn many(answers: &[Answer], keys: usize) -> bool {
    let used: usize = answers.iter().map(|answer| answer.hits.len()).sum();
    used * PRODUCT_SHARE >= answers.len() * keys && answers.len() >= PRODUCT_FROM
}

/// Returns how many answers have no bound of at most `asked`.
fn missed(answers: &[QueryHits], asked: f64) -> usize {
    // A budget that is used up to the last bit is no miss.
    let kept = |answer: &&QueryHits| answer.certified_error.is_some_and(|bound| bound <= asked * (1.0 + 1e-9));
    answers.len() - answers.iter().filter(kept).count()
}

/// Returns the largest bound, where there is one for every row.
fn worst(mut bounds: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    bounds.try_fold(0f64, |worst, bound| Some(worst.max(bound?)))
}
