//! The linear recurrent unit (Orvieto et al., 2023) on ternary layers, as Keras-MatMulLess builds it.

use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, ArrayView3, s};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

use super::recurrence::{RnnCell, RnnOutput, SequenceConfig, run_sequence, run_step};
use super::shape::require_shape;
use crate::error::{Error, Result};
use crate::layer::{Accuracy, SharedLayer};
use crate::linalg::require_finite;

/// Settings of an LRU, with Keras-MatMulLess's defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LruConfig {
    /// Width of the outputs.
    pub units: usize,
    /// Number of complex numbers in the state.
    pub state_dim: usize,
    /// Whether the layers from state and input to output (C and D) are ternary; dense ones if not.
    pub fully_mml: bool,
    /// Least magnitude of an eigenvalue before training.
    pub r_min: f64,
    /// Largest magnitude of an eigenvalue before training.
    pub r_max: f64,
    /// Largest phase of an eigenvalue before training, in radians.
    pub max_phase: f64,
    /// How sequences are run.
    #[serde(flatten)]
    pub sequence: SequenceConfig,
}

impl Default for LruConfig {
    fn default() -> Self {
        LruConfig {
            units: 0,
            state_dim: 0,
            fully_mml: false,
            r_min: 0.0,
            r_max: 1.0,
            max_phase: 2.0 * std::f64::consts::PI,
            sequence: SequenceConfig::default(),
        }
    }
}

/// The eigenvalues λ of an LRU's recurrence and the factors γ of its inputs, as the logarithms that are trained:
/// `λ = exp(−exp(nu_log) + i exp(theta_log))`, `γ = exp(gamma_log)`.
#[derive(Debug, Clone, PartialEq)]
pub struct LruSpectrum {
    /// ln(−ln |λ|), `[state_dim]`.
    pub nu_log: Array1<f32>,
    /// ln of the phases, `[state_dim]`.
    pub theta_log: Array1<f32>,
    /// ln γ, `[state_dim]`.
    pub gamma_log: Array1<f32>,
}

impl LruSpectrum {
    /// Draws eigenvalues uniformly from the ring `r_min ≤ |λ| ≤ r_max` of the settings, and takes `γ = √(1 − |λ|²)`.
    ///
    /// # Errors
    /// When `r_min`, `r_max` and `max_phase` describe no ring within the unit circle.
    pub fn initial(config: &LruConfig, seed: u64) -> Result<Self> {
        let LruConfig { state_dim, r_min, r_max, max_phase, .. } = *config;
        let ring = (0.0..=1.0).contains(&r_min) && (r_min..=1.0).contains(&r_max);
        if !(ring && max_phase > 0.0 && max_phase.is_finite()) {
            let found = format!("{r_min}, {r_max} and {max_phase}");
            let expected = "0 ≤ r_min ≤ r_max ≤ 1, and a phase above 0";
            return Err(Error::expected("r_min, r_max and max_phase of an LRU", found, expected));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Never 0, whose logarithm is not finite.
        let mut uniform = || (f64::from(rng.next_u32()) + 0.5) / (f64::from(u32::MAX) + 1.0);
        let squares: Array1<f64> =
            (0..state_dim).map(|_| uniform() * (r_max * r_max - r_min * r_min) + r_min * r_min).collect();
        let least = f64::from(f32::EPSILON);
        let squares = squares.mapv(|v| v.clamp(least, 1.0 - least));
        Ok(LruSpectrum {
            nu_log: squares.mapv(|v| (-0.5 * v.ln()).ln() as f32),
            theta_log: (0..state_dim).map(|_| (max_phase * uniform()).ln() as f32).collect(),
            gamma_log: squares.mapv(|v| (0.5 * (1.0 - v).ln()) as f32),
        })
    }
}

/// The linear layers of an LRU.
#[derive(Debug, Clone)]
pub struct LruLayers {
    /// Real part of B, from input to state: `[state_dim, in_features]`.
    pub b_re: SharedLayer,
    /// Imaginary part of B: `[state_dim, in_features]`.
    pub b_im: SharedLayer,
    /// Real part of C, from state to output: `[units, state_dim]`.
    pub c_re: SharedLayer,
    /// Imaginary part of C: `[units, state_dim]`.
    pub c_im: SharedLayer,
    /// D, from input to output: `[units, in_features]`.
    pub d: SharedLayer,
}

/// A linear recurrent unit: `h = λ h₋₁ + γ B x`, `y = Re(C h) + D x`, with a complex state h, B and C.
#[derive(Debug, Clone)]
pub struct Lru {
    config: LruConfig,
    spectrum: LruSpectrum,
    layers: LruLayers,
    /// Re λ, `[state_dim]`.
    lambda_re: Vec<f32>,
    /// Im λ, `[state_dim]`.
    lambda_im: Vec<f32>,
    /// γ, `[state_dim]`.
    gamma: Vec<f32>,
}

impl Lru {
    /// Returns the LRU of these layers and eigenvalues.
    ///
    /// # Errors
    /// When they do not fit each other or the settings, or an eigenvalue is not finite.
    pub fn new(config: LruConfig, spectrum: LruSpectrum, layers: LruLayers) -> Result<Self> {
        let (units, state) = (config.units, config.state_dim);
        if units == 0 || state == 0 {
            return Err(Error::expected("units and state_dim of an LRU", format!("{units} and {state}"), "at least 1"));
        }
        let all =
            [("nu_log", &spectrum.nu_log), ("theta_log", &spectrum.theta_log), ("gamma_log", &spectrum.gamma_log)];
        for (what, vector) in all {
            if vector.len() != state {
                return Err(Error::expected(format!("length of {what}"), vector.len(), format!("{state}, state_dim")));
            }
            require_finite(what, vector.iter())?;
        }
        let inputs = layers.b_re.in_features();
        require_shape("an LRU's b_re", &layers.b_re, state, inputs)?;
        require_shape("an LRU's b_im", &layers.b_im, state, inputs)?;
        require_shape("an LRU's c_re", &layers.c_re, units, state)?;
        require_shape("an LRU's c_im", &layers.c_im, units, state)?;
        require_shape("an LRU's d", &layers.d, units, inputs)?;
        let size = spectrum.nu_log.mapv(|v| (-f64::from(v).exp()).exp());
        let phase = spectrum.theta_log.mapv(|v| f64::from(v).exp());
        let of = |part: fn(f64) -> f64| size.iter().zip(&phase).map(|(r, p)| (r * part(*p)) as f32).collect::<Vec<_>>();
        let (lambda_re, lambda_im) = (of(f64::cos), of(f64::sin));
        let gamma: Vec<f32> = spectrum.gamma_log.iter().map(|&v| f64::from(v).exp() as f32).collect();
        require_finite("eigenvalues of an LRU", lambda_re.iter().chain(&lambda_im).chain(&gamma))?;
        Ok(Lru { config, spectrum, layers, lambda_re, lambda_im, gamma })
    }

    /// Returns the settings.
    pub fn config(&self) -> &LruConfig {
        &self.config
    }

    /// Returns the eigenvalues, as their logarithms.
    pub fn spectrum(&self) -> &LruSpectrum {
        &self.spectrum
    }

    /// Returns the linear layers.
    pub fn layers(&self) -> &LruLayers {
        &self.layers
    }

    /// Runs sequences `[batch, steps, in_features]` as the settings say, from `state` `[batch, 2, state_dim]` (real parts, then
    /// imaginary ones), or from zeros. A step whose `mask` `[batch, steps]` is false leaves the state as it is.
    ///
    /// # Errors
    /// As [`run_sequence`].
    pub fn forward(
        &self,
        x: ArrayView3<f32>,
        state: Option<ArrayView3<f32>>,
        mask: Option<ArrayView2<bool>>,
        accuracy: Accuracy,
    ) -> Result<RnnOutput> {
        run_sequence(self, self.config.sequence, x, state, mask, accuracy)
    }

    /// Runs one step for inputs `[batch, in_features]`: returns outputs `[batch, units]`, and replaces the state by the next one.
    ///
    /// # Errors
    /// As [`run_step`].
    pub fn step(&self, x: ArrayView2<f32>, state: &mut Array3<f32>, accuracy: Accuracy) -> Result<Array2<f32>> {
        run_step(self, x, state, accuracy)
    }
}

impl RnnCell for Lru {
    fn in_features(&self) -> usize {
        self.layers.b_re.in_features()
    }

    fn out_features(&self) -> usize {
        self.config.units
    }

    fn state_shape(&self) -> (usize, usize) {
        (2, self.config.state_dim)
    }

    /// Returns `γ B x`, `[rows, 2 · state_dim]`: real parts, then imaginary ones.
    fn input_projection(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Array2<f32>> {
        let state = self.config.state_dim;
        let mut all = Array2::zeros((x.nrows(), 2 * state));
        let gamma = ArrayView1::from(&self.gamma);
        let (re, im) = (self.layers.b_re.forward(x, accuracy)?.y, self.layers.b_im.forward(x, accuracy)?.y);
        all.slice_mut(s![.., ..state]).assign(&(re * gamma));
        all.slice_mut(s![.., state..]).assign(&(im * gamma));
        Ok(all)
    }

    fn hidden_len(&self) -> usize {
        2 * self.config.state_dim
    }

    fn update(&self, projected: ArrayView1<f32>, state: &mut [f32], hidden: &mut [f32]) {
        let half = self.config.state_dim;
        let (re, im) = state.split_at_mut(half);
        let (input_re, input_im) = projected.split_at(ndarray::Axis(0), half);
        for i in 0..half {
            let (a, b) = (re[i], im[i]);
            re[i] = self.lambda_re[i] * a - self.lambda_im[i] * b + input_re[i];
            im[i] = self.lambda_re[i] * b + self.lambda_im[i] * a + input_im[i];
        }
        hidden.copy_from_slice(state);
    }

    fn output_projection(
        &self,
        hidden: ArrayView2<f32>,
        x: ArrayView2<f32>,
        accuracy: Accuracy,
    ) -> Result<Array2<f32>> {
        let state = self.config.state_dim;
        let re = self.layers.c_re.forward(hidden.slice(s![.., ..state]), accuracy)?.y;
        let im = self.layers.c_im.forward(hidden.slice(s![.., state..]), accuracy)?.y;
        Ok(re - im + self.layers.d.forward(x, accuracy)?.y)
    }
}
