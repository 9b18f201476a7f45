//! Statistics of a layer's inputs: all that a compression method sees of the data that a layer is calibrated with.
//!
//! A [`Calibration`] holds how many inputs there were, their mean, the mean of their absolute values, their second moment
//! E\[x xᵀ\] (or its diagonal, where the layer is wide), and a sample of the inputs themselves, for what moments do not tell:
//! thresholds, errors of a layer whose output is no linear function of its input, k-means.

use ndarray::{Array1, Array2, ArrayView2, Axis, CowArray, Ix2, s};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::sync::OnceLock;

use crate::error::{Error, Result};
use crate::linalg::{add_gram, cholesky, covariance_of, mirror, second_moment_of};

/// Inputs that a sample holds at most: whole calibration sets of usual size.
pub const SAMPLE_ROWS: usize = 16_384;

/// Neighbouring inputs that are sampled together, so that attention can be measured over pieces of a sequence.
pub const SAMPLE_WINDOW: usize = 128;

/// Layers with more inputs than this keep the diagonal of the second moment only: the whole would take over 2 GiB.
pub const FULL_MOMENT_WIDTH: usize = 16_384;

/// Inputs are alike where their variance is at most this share of their mean square: moments are rounded to f32 on the way.
const ALIKE: f64 = 1e-10;

/// Statistics of the inputs of one layer.
#[derive(Debug, Clone)]
pub struct Calibration {
    tokens: u64,
    mean: Array1<f64>,
    mean_abs: Array1<f64>,
    moments: SecondMoments,
    sample: Array2<f32>,
}

/// Second moments, as far as they are known.
#[derive(Debug, Clone)]
enum SecondMoments {
    /// The sample is all inputs: worked out of it when they are asked for.
    OfSample { second: OnceLock<Array2<f64>>, covariance: OnceLock<Array2<f64>> },
    /// The covariance, divided by `tokens − 1`.
    Covariance(Array2<f64>),
    /// E\[x_i²\].
    Diagonal(Array1<f64>),
}

impl Calibration {
    /// Returns the statistics of `inputs` `[tokens, features]`, and a sample of at most [`SAMPLE_ROWS`] of them.
    ///
    /// # Errors
    /// When there are no tokens, or a value is not finite.
    pub fn of(inputs: Array2<f32>) -> Result<Self> {
        let (tokens, features) = inputs.dim();
        if tokens == 0 {
            return Err(Error::expected("calibration inputs", "0 tokens", "at least one"));
        }
        if tokens > SAMPLE_ROWS {
            let mut builder = CalibrationBuilder::new(features, 0);
            for chunk in inputs.axis_chunks_iter(Axis(0), 4096) {
                builder.update(chunk)?;
            }
            return builder.finish();
        }
        require_finite(inputs.view(), 0)?;
        let count = tokens as f64;
        let mean_of = |f: fn(f64) -> f64| {
            let of_column = |c: ndarray::ArrayView1<f32>| c.iter().map(|&v| f(f64::from(v))).sum::<f64>() / count;
            inputs.columns().into_iter().map(of_column).collect::<Array1<f64>>()
        };
        let mean = inputs.mapv(f64::from).mean_axis(Axis(0)).expect("at least one token");
        let mean_abs = mean_of(f64::abs);
        let moments = match features > FULL_MOMENT_WIDTH {
            true => SecondMoments::Diagonal(mean_of(|v| v * v)),
            false => SecondMoments::OfSample { second: OnceLock::new(), covariance: OnceLock::new() },
        };
        Ok(Calibration { tokens: tokens as u64, mean, mean_abs, moments, sample: inputs })
    }

    /// Returns statistics that were gathered elsewhere: the mean, the mean of |x|, and E\[x xᵀ\] or its diagonal, of `tokens`
    /// inputs, with a sample of them, which may be empty.
    ///
    /// # Errors
    /// When shapes do not fit each other, the sample has more rows than there were inputs, a number is not finite, a mean of |x| is
    /// below that of x, or the second moment is none: not symmetric, or with less on its diagonal than the means call for.
    pub fn from_moments(
        tokens: u64,
        mean: Array1<f64>,
        mean_abs: Array1<f64>,
        second: SecondMoment,
        sample: Array2<f32>,
    ) -> Result<Self> {
        let features = mean.len();
        if tokens == 0 {
            return Err(Error::expected("calibration statistics", "a count of 0 tokens", "at least one"));
        }
        let (found_second, diagonal) = match &second {
            SecondMoment::Full(full) => (full.shape().to_vec(), full.diag().to_owned()),
            SecondMoment::Diagonal(diagonal) => (vec![features; diagonal.len().min(1)], diagonal.clone()),
        };
        let found = (mean_abs.len(), diagonal.len(), sample.ncols());
        if found != (features, features, features) || found_second.iter().any(|&n| n != features) {
            return Err(Error::expected(
                "lengths of mean |x|, second moment and sample",
                format!("{found:?}"),
                format!("{features} each, as the mean has"),
            ));
        }
        let numbers: [(&str, &mut dyn Iterator<Item = &f64>); 3] = [
            ("the inputs' mean", &mut mean.iter()),
            ("the inputs' mean |x|", &mut mean_abs.iter()),
            ("the inputs' second moment", &mut diagonal.iter()),
        ];
        for (what, values) in numbers {
            if let Some((index, value)) = values.enumerate().find(|(_, v)| !v.is_finite()) {
                return Err(Error::NotFinite { what: what.into(), value: *value, index });
            }
        }
        require_finite(sample.view(), 0)?;
        if sample.nrows() as u64 > tokens {
            return Err(Error::expected(
                "sample of the inputs",
                format!("{} rows of {tokens} inputs", sample.nrows()),
                format!("{tokens} rows at most"),
            ));
        }
        // Both means may have been summed in f32, each in its own order.
        if let Some(i) = (0..features).find(|&i| mean_abs[i] < 0.0 || mean_abs[i] < mean[i].abs() * (1.0 - 1e-3)) {
            let least = format!("at least {}, the size of its mean", mean[i].abs());
            return Err(Error::expected(format!("mean |x| of input {i}"), mean_abs[i], least));
        }
        // Means come rounded to f32 where a file was written so.
        let least = |i: usize| mean[i] * mean[i] * (1.0 - 1e-5) - 1e-12;
        if let Some(i) = (0..features).find(|&i| diagonal[i] < least(i)) {
            return Err(Error::expected(
                format!("second moment of input {i}"),
                diagonal[i],
                format!("at least {}, the square of its mean", mean[i] * mean[i]),
            ));
        }
        if let Some(i) = (0..features).find(|&i| mean_abs[i] * (1.0 - 1e-3) > diagonal[i].max(0.0).sqrt() + 1e-6) {
            let most = format!("at most {}, the root of its second moment", diagonal[i].max(0.0).sqrt());
            return Err(Error::expected(format!("mean |x| of input {i}"), mean_abs[i], most));
        }
        let moments = match second {
            SecondMoment::Diagonal(diagonal) => SecondMoments::Diagonal(diagonal),
            SecondMoment::Full(full) => {
                if let Some((index, value)) = full.iter().enumerate().find(|(_, v)| !v.is_finite()) {
                    return Err(Error::NotFinite { what: "the inputs' second moment".into(), value: *value, index });
                }
                let apart = |i: usize, j: usize| {
                    let size = (diagonal[i] * diagonal[j]).sqrt();
                    (full[[i, j]] - full[[j, i]]).abs() > 1e-4 * size || full[[i, j]].abs() > size * (1.0 + 1e-4)
                };
                if let Some((i, j)) =
                    (0..features).flat_map(|i| (0..i).map(move |j| (i, j))).find(|&(i, j)| apart(i, j))
                {
                    return Err(Error::expected(
                        format!("second moment of inputs {i} and {j}"),
                        format!("{} and {}", full[[i, j]], full[[j, i]]),
                        "a symmetric positive semidefinite matrix",
                    ));
                }
                let correction = tokens as f64 / (tokens.max(2) - 1) as f64;
                let mut covariance = full;
                for ((i, j), value) in covariance.indexed_iter_mut() {
                    *value = (*value - mean[i] * mean[j]) * correction;
                }
                covariance.diag_mut().mapv_inplace(|v| v.max(0.0));
                SecondMoments::Covariance(covariance)
            }
        };
        Ok(Calibration { tokens, mean, mean_abs, moments, sample })
    }

    /// Returns statistics of a known mean and covariance alone, without a sample: E|x| is that of normal inputs.
    ///
    /// # Errors
    /// When a shape does not fit, a number is not finite, or the matrix is not symmetric positive semidefinite.
    pub fn from_covariance(mean: Array1<f64>, covariance: Array2<f64>) -> Result<Self> {
        let features = mean.len();
        if covariance.dim() != (features, features) {
            return Err(Error::expected(
                "shape of the inputs' covariance",
                format!("{:?}", covariance.dim()),
                format!("({features}, {features}), as the mean has {features}"),
            ));
        }
        for (what, index, value) in (mean.iter().enumerate().map(|(i, v)| ("the inputs' mean", i, v)))
            .chain(covariance.iter().enumerate().map(|(i, v)| ("the inputs' covariance", i, v)))
        {
            if !value.is_finite() {
                return Err(Error::NotFinite { what: what.into(), value: *value, index });
            }
        }
        let covariance = checked_covariance(covariance)?;
        let mean_abs = folded_normal_mean(&mean, &covariance);
        let sample = Array2::zeros((0, features));
        Ok(Calibration { tokens: u64::MAX, mean, mean_abs, moments: SecondMoments::Covariance(covariance), sample })
    }

    /// Returns the number of inputs that the statistics are of.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Returns the length of an input.
    pub fn features(&self) -> usize {
        self.mean.len()
    }

    /// Returns the mean E\[x\], `[features]`.
    pub fn mean(&self) -> &Array1<f64> {
        &self.mean
    }

    /// Returns the mean absolute value E|x|, `[features]`.
    pub fn mean_abs(&self) -> &Array1<f64> {
        &self.mean_abs
    }

    /// Returns sampled inputs in their order, `[rows, features]`: all of them where there were few. May be empty.
    pub fn sample(&self) -> ArrayView2<'_, f32> {
        self.sample.view()
    }

    /// Returns why these statistics tell nothing of what a layer's inputs are like, where that is so: they are all 0, or, for who looks
    /// at inputs less their mean (`centred`), all alike.
    pub fn vanishes(&self, centred: bool) -> Option<&'static str> {
        let squares = self.second_diagonal();
        if squares.iter().all(|square| *square == 0.0) {
            return Some("its inputs are all 0");
        }
        let alike = || self.variance().iter().zip(&squares).all(|(variance, square)| *variance <= ALIKE * square);
        match (centred, self.tokens) {
            (false, _) => None,
            (true, 1) => Some("it has one input alone"),
            (true, _) => alike().then_some("its inputs are all alike"),
        }
    }

    /// Returns whether there is a second moment, and not its diagonal alone.
    pub fn has_full_moment(&self) -> bool {
        !matches!(self.moments, SecondMoments::Diagonal(_))
    }

    /// Returns the second moment E\[x xᵀ\], `[features, features]`.
    ///
    /// # Errors
    /// When the statistics hold its diagonal alone.
    pub fn second_moment(&self) -> Result<CowArray<'_, f64, Ix2>> {
        match &self.moments {
            SecondMoments::OfSample { second, .. } => {
                Ok(second.get_or_init(|| second_moment_of(self.sample.view())).view().into())
            }
            SecondMoments::Covariance(covariance) => {
                let share = (self.tokens.max(2) - 1) as f64 / self.tokens as f64;
                let mean = &self.mean;
                let of = |(i, j): (usize, usize)| covariance[[i, j]] * share + mean[i] * mean[j];
                Ok(Array2::from_shape_fn(covariance.dim(), of).into())
            }
            SecondMoments::Diagonal(_) => Err(self.diagonal_only()),
        }
    }

    /// Returns the second moment's diagonal E\[x_i²\], `[features]`.
    pub fn second_diagonal(&self) -> Array1<f64> {
        match &self.moments {
            SecondMoments::OfSample { second, .. } => match second.get() {
                Some(second) => second.diag().to_owned(),
                None => {
                    let square =
                        |c: ndarray::ArrayView1<f32>| c.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>();
                    self.sample.columns().into_iter().map(|c| square(c) / self.tokens as f64).collect()
                }
            },
            SecondMoments::Covariance(covariance) => {
                let share = (self.tokens.max(2) - 1) as f64 / self.tokens as f64;
                (0..self.features()).map(|i| covariance[[i, i]] * share + self.mean[i] * self.mean[i]).collect()
            }
            SecondMoments::Diagonal(diagonal) => diagonal.clone(),
        }
    }

    /// Returns the variance of each input, divided by `tokens − 1` (zeros for one token), `[features]`.
    pub fn variance(&self) -> Array1<f64> {
        match &self.moments {
            SecondMoments::OfSample { covariance, .. } => match covariance.get() {
                Some(covariance) => covariance.diag().to_owned(),
                None => {
                    let of = |(column, mean): (ndarray::ArrayView1<f32>, &f64)| {
                        let squares: f64 = column.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum();
                        squares / (self.tokens.max(2) - 1) as f64
                    };
                    self.sample.columns().into_iter().zip(&self.mean).map(of).collect()
                }
            },
            SecondMoments::Covariance(covariance) => covariance.diag().to_owned(),
            SecondMoments::Diagonal(diagonal) => {
                let correction = self.tokens as f64 / (self.tokens.max(2) - 1) as f64;
                let of = |(second, mean): (&f64, &f64)| ((second - mean * mean) * correction).max(0.0);
                diagonal.iter().zip(&self.mean).map(of).collect()
            }
        }
    }

    /// Returns the covariance, divided by `tokens − 1` (zeros for one token), `[features, features]`.
    ///
    /// # Errors
    /// As [`Calibration::second_moment`].
    pub fn covariance(&self) -> Result<CowArray<'_, f64, Ix2>> {
        match &self.moments {
            SecondMoments::OfSample { covariance, .. } => {
                Ok(covariance.get_or_init(|| covariance_of(self.sample.view())).view().into())
            }
            SecondMoments::Covariance(covariance) => Ok(covariance.view().into()),
            SecondMoments::Diagonal(_) => Err(self.diagonal_only()),
        }
    }

    /// Returns the statistics of `map(inputs)`, of the sampled inputs: what a layer's weight meets after its norm.
    ///
    /// # Errors
    /// When there is no sample, or `map` fails.
    pub fn mapped(&self, map: impl FnOnce(ArrayView2<f32>) -> Result<Array2<f32>>) -> Result<Self> {
        if self.sample.nrows() == 0 {
            return Err(Error::expected(
                "sample of calibration inputs, which a layer with a norm is calibrated on",
                "no rows",
                "at least one",
            ));
        }
        Calibration::of(map(self.sample.view())?)
    }

    fn diagonal_only(&self) -> Error {
        Error::expected(
            "second moment of calibration inputs",
            format!("its diagonal alone, of {} features", self.features()),
            format!("all of it: layers of up to {FULL_MOMENT_WIDTH} inputs have it, others need a method without"),
        )
    }
}

/// E\[x xᵀ\] of inputs, `[features, features]`, or its diagonal `[features]`.
#[derive(Debug, Clone, PartialEq)]
pub enum SecondMoment {
    /// E\[x xᵀ\].
    Full(Array2<f64>),
    /// E\[x_i²\].
    Diagonal(Array1<f64>),
}

/// Returns a covariance, exactly symmetric, if it is one but for rounding.
fn checked_covariance(given: Array2<f64>) -> Result<Array2<f64>> {
    let wrong =
        |what: String, found: String| Err(Error::expected(what, found, "a symmetric positive semidefinite matrix"));
    let features = given.nrows();
    for (i, j) in (0..features).flat_map(|i| (0..=i).map(move |j| (i, j))) {
        let size = (given[[i, i]].max(0.0) * given[[j, j]].max(0.0)).sqrt();
        let (found, mirrored) = (given[[i, j]], given[[j, i]]);
        if (found - mirrored).abs() > 1e-4 * size || found.abs() > size * (1.0 + 1e-4) {
            let found = format!("{found} and {mirrored}, with variances {} and {}", given[[i, i]], given[[j, j]]);
            return wrong(format!("covariance of inputs {i} and {j}"), found);
        }
    }
    let covariance = (&given + &given.t()) / 2.0;
    let trace = covariance.diag().sum();
    // Rounding to f32 moves eigenvalues by less than this.
    let mut shifted = covariance.clone();
    shifted.diag_mut().mapv_inplace(|v| v + 1e-6 * trace);
    if trace > 0.0 && cholesky(shifted.view()).is_err() {
        return wrong("the inputs' covariance".into(), "a negative eigenvalue".into());
    }
    Ok(covariance)
}

/// E|x| of normal inputs.
fn folded_normal_mean(mean: &Array1<f64>, covariance: &Array2<f64>) -> Array1<f64> {
    let of = |i: usize| {
        let (m, deviation) = (mean[i], covariance[[i, i]].max(0.0).sqrt());
        if deviation == 0.0 {
            return m.abs();
        }
        let z = m / deviation;
        let density = (-0.5 * z * z).exp() * (2.0 / std::f64::consts::PI).sqrt();
        deviation * density + m * libm::erf(z / std::f64::consts::SQRT_2)
    };
    (0..mean.len()).map(of).collect()
}

fn require_finite(inputs: ArrayView2<f32>, before: usize) -> Result<()> {
    match inputs.iter().enumerate().find(|(_, v)| !v.is_finite()) {
        Some((index, value)) => Err(Error::NotFinite {
            what: "the calibration inputs".into(),
            value: f64::from(*value),
            index: before + index,
        }),
        None => Ok(()),
    }
}

/// Gathers the statistics of a stream of inputs, a batch at a time.
///
/// Moments are centred and merged batch by batch (Chan, Golub and LeVeque), so that nothing cancels; sampled are whole windows
/// of [`SAMPLE_WINDOW`] neighbouring inputs, each as likely as any other (Vitter's algorithm R, seeded).
#[derive(Debug, Clone)]
pub struct CalibrationBuilder {
    tokens: u64,
    mean: Array1<f64>,
    abs: Array1<f64>,
    squares: Array1<f64>,
    /// Σ (x − mean)(x − mean)ᵀ, on the diagonal and below it.
    comoment: Option<Array2<f64>>,
    rng: ChaCha8Rng,
    /// Windows that are kept at most.
    most_windows: usize,
    windows_seen: u64,
    /// By the place of their first token.
    windows: Vec<(u64, Array2<f32>)>,
    /// The window that is being filled.
    open: Vec<f32>,
}

impl CalibrationBuilder {
    /// Starts with no inputs of `features` numbers each.
    pub fn new(features: usize, seed: u64) -> Self {
        let zeros = || Array1::zeros(features);
        CalibrationBuilder {
            tokens: 0,
            mean: zeros(),
            abs: zeros(),
            squares: zeros(),
            comoment: (features <= FULL_MOMENT_WIDTH).then(|| Array2::zeros((features, features))),
            rng: ChaCha8Rng::seed_from_u64(seed),
            most_windows: SAMPLE_ROWS / SAMPLE_WINDOW,
            windows_seen: 0,
            windows: vec![],
            open: vec![],
        }
    }

    /// Keeps a sample of at most so many inputs, in whole windows of [`SAMPLE_WINDOW`]; [`SAMPLE_ROWS`] without this.
    #[must_use]
    pub fn with_sample(self, rows: usize) -> Self {
        CalibrationBuilder { most_windows: rows.min(SAMPLE_ROWS) / SAMPLE_WINDOW, ..self }
    }

    /// Adds `inputs` `[tokens, features]`.
    ///
    /// # Errors
    /// When their width is another, or a value is not finite: then nothing was added.
    pub fn update(&mut self, inputs: ArrayView2<f32>) -> Result<()> {
        let (rows, features) = inputs.dim();
        if features != self.mean.len() {
            return Err(Error::expected("width of the calibration inputs", features, self.mean.len()));
        }
        require_finite(inputs, self.tokens as usize * features)?;
        if rows == 0 {
            return Ok(());
        }
        let wide = inputs.mapv(f64::from);
        let (before, added) = (self.tokens as f64, rows as f64);
        let total = before + added;
        let mean = wide.mean_axis(Axis(0)).expect("at least one row");
        let apart = &mean - &self.mean;
        if let Some(comoment) = &mut self.comoment {
            let centred = &wide - &mean;
            add_gram(comoment, centred.view());
            let root = (before * added / total).sqrt();
            add_gram(comoment, (&apart * root).insert_axis(Axis(0)).view());
        }
        self.abs += &wide.mapv(f64::abs).sum_axis(Axis(0));
        self.squares += &wide.mapv(|v| v * v).sum_axis(Axis(0));
        self.mean += &(apart * (added / total));
        for (i, row) in inputs.rows().into_iter().enumerate() {
            self.open.extend(row.iter());
            if self.open.len() == SAMPLE_WINDOW * features.max(1) {
                self.close_window(self.tokens + i as u64 + 1)?;
            }
        }
        self.tokens += rows as u64;
        Ok(())
    }

    /// Ends the window that is open, whose last token is the one before `end`.
    fn close_window(&mut self, end: u64) -> Result<()> {
        let features = self.mean.len();
        let rows = self.open.len().checked_div(features).unwrap_or(0);
        if rows == 0 {
            return Ok(());
        }
        let window = Array2::from_shape_vec((rows, features), std::mem::take(&mut self.open))
            .map_err(|e| Error::Numeric(e.to_string()))?;
        let entry = (end - rows as u64, window);
        self.windows_seen += 1;
        if self.windows.len() < self.most_windows {
            self.windows.push(entry);
        } else {
            let place = self.rng.next_u64() % self.windows_seen;
            if let Some(kept) = usize::try_from(place).ok().and_then(|place| self.windows.get_mut(place)) {
                *kept = entry;
            }
        }
        Ok(())
    }

    /// Returns the statistics of all inputs so far.
    ///
    /// # Errors
    /// When there were none.
    pub fn finish(mut self) -> Result<Calibration> {
        if self.tokens == 0 {
            return Err(Error::expected("calibration inputs", "0 tokens", "at least one"));
        }
        self.close_window(self.tokens)?;
        let count = self.tokens as f64;
        self.windows.sort_by_key(|(first, _)| *first);
        let rows = self.windows.iter().map(|(_, window)| window.nrows()).sum();
        let mut sample = Array2::zeros((rows, self.mean.len()));
        let mut at = 0;
        for (_, window) in &self.windows {
            sample.slice_mut(s![at..at + window.nrows(), ..]).assign(window);
            at += window.nrows();
        }
        let moments = match self.comoment {
            Some(mut comoment) => {
                mirror(&mut comoment);
                SecondMoments::Covariance(comoment / (self.tokens.max(2) - 1) as f64)
            }
            None => SecondMoments::Diagonal(self.squares / count),
        };
        Ok(Calibration { tokens: self.tokens, mean: self.mean, mean_abs: self.abs / count, moments, sample })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn inputs(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            ((i * 7919 + j * 104_729 + seed * 31) % 1009) as f32 / 500.0 + j as f32 * 3.0
        })
    }

    fn close(a: &Array2<f64>, b: &Array2<f64>) -> bool {
        a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-9 * (1.0 + b.abs()))
    }

    proptest! {
        /// However inputs are cut into batches, the statistics are those of all of them.
        #[test]
        fn batches_give_what_the_whole_gives(rows in 1usize..40, columns in 1usize..6, cut in 1usize..9, seed in 0usize..99) {
            let x = inputs(rows, columns, seed);
            let whole = Calibration::of(x.clone()).unwrap();
            let mut builder = CalibrationBuilder::new(columns, 0);
            for chunk in x.axis_chunks_iter(Axis(0), cut) {
                builder.update(chunk).unwrap();
            }
            let streamed = builder.finish().unwrap();
            prop_assert_eq!(streamed.sample(), x.view());
            prop_assert_eq!(streamed.tokens(), rows as u64);
            prop_assert!(close(&streamed.second_moment().unwrap().to_owned(), &whole.second_moment().unwrap().to_owned()));
            prop_assert!(close(&streamed.covariance().unwrap().to_owned(), &whole.covariance().unwrap().to_owned()));
            let row = |a: &Array1<f64>| a.clone().insert_axis(Axis(0));
            prop_assert!(close(&row(streamed.mean()), &row(whole.mean())));
            prop_assert!(close(&row(streamed.mean_abs()), &row(whole.mean_abs())));
            prop_assert!(close(&row(&streamed.second_diagonal()), &row(&whole.second_diagonal())));
            prop_assert!(close(&row(&streamed.variance()), &row(&whole.variance())));
            prop_assert!(close(&row(&whole.variance()), &row(&whole.covariance().unwrap().diag().to_owned())));
            // And through the moments that a file holds.
            let second = SecondMoment::Full(whole.second_moment().unwrap().to_owned());
            let read = Calibration::from_moments(
                rows as u64, whole.mean().clone(), whole.mean_abs().clone(), second, Array2::zeros((0, columns))).unwrap();
            prop_assert!(close(&read.covariance().unwrap().to_owned(), &whole.covariance().unwrap().to_owned()));
        }
    }

    #[test]
    fn a_sample_is_whole_windows_in_order() {
        let rows = SAMPLE_ROWS + 3 * SAMPLE_WINDOW + 17;
        let x = Array2::from_shape_fn((rows, 2), |(i, j)| (2 * i + j) as f32);
        let calibration = Calibration::of(x.clone()).unwrap();
        let sample = calibration.sample();
        assert!(sample.nrows() <= SAMPLE_ROWS && sample.nrows() > SAMPLE_ROWS - SAMPLE_WINDOW, "{}", sample.nrows());
        let first: Vec<usize> = sample.column(0).iter().map(|&v| v as usize / 2).collect();
        assert!(first.is_sorted());
        let breaks = first.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
        assert!((1..=4).contains(&breaks), "{breaks}");
        assert_eq!(calibration.tokens(), rows as u64);
        assert_eq!(Calibration::of(x.clone()).unwrap().sample(), calibration.sample(), "the seed decides");
        for (rows, kept) in [(0, 0), (SAMPLE_WINDOW - 1, 0), (3 * SAMPLE_WINDOW, 3 * SAMPLE_WINDOW)] {
            let mut builder = CalibrationBuilder::new(2, 0).with_sample(rows);
            builder.update(x.slice(s![..64 * SAMPLE_WINDOW, ..])).unwrap();
            assert_eq!(builder.finish().unwrap().sample().nrows(), kept);
        }
    }

    #[test]
    fn what_is_no_statistic_is_refused() {
        assert!(Calibration::of(Array2::zeros((0, 2))).is_err());
        assert!(Calibration::of(ndarray::array![[1.0, f32::NAN]]).unwrap_err().to_string().contains("index 1"));
        let two = || Array1::from(vec![1.0, 2.0]);
        let none = || Array2::<f32>::zeros((0, 2));
        let full = |a: [[f64; 2]; 2]| SecondMoment::Full(ndarray::arr2(&a));
        let good = full([[2.0, 2.0], [2.0, 5.0]]);
        assert!(Calibration::from_moments(3, two(), two(), good.clone(), none()).is_ok());
        let abs = |a, b| Array1::from(vec![a, b]);
        for (tokens, mean_abs, second, sample, expected) in [
            (3, abs(1.0, -2.0), good.clone(), none(), "mean |x| of input 1: found -2, expected at least 2"),
            (3, abs(0.5, 2.0), good.clone(), none(), "mean |x| of input 0: found 0.5, expected at least 1"),
            (3, abs(1.0, 2.5), good.clone(), none(), "mean |x| of input 1: found 2.5, expected at most 2.2"),
            (3, two(), good.clone(), Array2::zeros((4, 2)), "found 4 rows of 3 inputs, expected 3 rows at most"),
            (0, two(), good.clone(), none(), "0 tokens"),
            (3, Array1::zeros(3), good.clone(), none(), "2 each"),
            (3, two(), good.clone(), Array2::zeros((1, 5)), "2 each"),
            (3, two(), full([[2.0, 2.0], [1.0, 5.0]]), none(), "symmetric"),
            (3, two(), full([[2.0, 9.0], [9.0, 5.0]]), none(), "semidefinite"),
            (3, two(), full([[0.5, 0.0], [0.0, 5.0]]), none(), "square of its mean"),
            (3, two(), full([[f64::NAN, 0.0], [0.0, 5.0]]), none(), "NaN"),
            (3, two(), SecondMoment::Diagonal(Array1::zeros(1)), none(), "2 each"),
            (3, two(), SecondMoment::Full(Array2::zeros((2, 3))), none(), "2 each"),
            (3, two(), good, Array2::from_elem((1, 2), f32::INFINITY), "inf"),
        ] {
            let message = Calibration::from_moments(tokens, two(), mean_abs, second, sample).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        let diagonal =
            Calibration::from_moments(3, two(), two(), SecondMoment::Diagonal(Array1::from(vec![4.0, 5.0])), none());
        let diagonal = diagonal.unwrap();
        assert_eq!(diagonal.second_diagonal().to_vec(), [4.0, 5.0]);
        assert!(diagonal.second_moment().unwrap_err().to_string().contains("diagonal alone"));
        assert!(diagonal.mapped(|x| Ok(x.to_owned())).unwrap_err().to_string().contains("no rows"));
    }

    #[test]
    fn statistics_that_tell_nothing_say_so() {
        let of = |x: Array2<f32>, centred| Calibration::of(x).unwrap().vanishes(centred);
        let varied = |scale: f32| inputs(20, 3, 1) * scale;
        for centred in [false, true] {
            assert_eq!(of(Array2::zeros((16, 4)), centred), Some("its inputs are all 0"));
            assert_eq!(of(varied(1e-15), centred), None);
            // An input that is large and always the same beside others that vary.
            let mut x = varied(0.01);
            x.column_mut(1).fill(3e4);
            assert_eq!(of(x, centred), None);
        }
        assert_eq!(of(Array2::from_elem((1, 4), 1.0), true), Some("it has one input alone"));
        assert_eq!(of(Array2::from_elem((100, 4), 0.1), true), Some("its inputs are all alike"));
        assert_eq!(of(Array2::from_elem((100, 4), 0.1), false), None);
    }

    #[test]
    fn means_of_normal_inputs() {
        let calibration = Calibration::from_covariance(Array1::from(vec![0.0, 3.0, 40.0]), Array2::eye(3)).unwrap();
        let expected = [0.797_884_560_8, 3.000_764_3, 40.0];
        for (found, expected) in calibration.mean_abs().iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{found}");
        }
        assert!(Calibration::from_covariance(Array1::zeros(2), Array2::eye(3)).is_err());
        let of = |rows: [[f64; 3]; 3]| Calibration::from_covariance(Array1::zeros(3), Array2::from(rows.to_vec()));
        // One of rank 1, and zeros, are covariances; others are not: negative, asymmetric, indefinite though each pair is possible.
        assert!(of([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [2.0, 2.0, 4.0]]).is_ok());
        assert!(of([[0.0; 3]; 3]).is_ok());
        for wrong in [
            [[-1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
            [[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
            [[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]],
        ] {
            let error = of(wrong).unwrap_err().to_string();
            assert!(error.contains("positive semidefinite"), "{error}");
        }
    }
}
