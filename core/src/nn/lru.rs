//! The linear recurrent unit (Orvieto et al., 2023) on ternary layers, as Keras-MML builds it.

use ndarray::{Array1, Array2, Array3, ArrayView1, ArrayView2, ArrayView3, s};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use serde::{Deserialize, Serialize};

use super::recurrence::{self, Cell, Ran, SequenceConfig};
use super::rows::require_shape;
use crate::error::{Error, Result};
use crate::layer::{Accuracy, SharedLayer};
use crate::linalg::require_finite;

/// An LRU's settings, with Keras-MML's defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LruConfig {
    /// Width of the outputs.
    pub units: usize,
    /// Complex numbers of the state.
    pub state_dim: usize,
    /// Whether the layers from state and input to output are ternary; plain dense ones where not.
    pub fully_mml: bool,
    /// The least size of an eigenvalue of the state before training.
    pub r_min: f64,
    /// The largest.
    pub r_max: f64,
    /// The largest phase of an eigenvalue before training.
    pub max_phase: f64,
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

/// The eigenvalues of an LRU's state and what inputs are multiplied with, as their logarithms, `[state_dim]` each:
/// `λ = exp(−exp(nu) + i exp(theta))`, `γ = exp(gamma)`.
#[derive(Debug, Clone, PartialEq)]
pub struct LruSpectrum {
    pub nu_log: Array1<f32>,
    pub theta_log: Array1<f32>,
    pub gamma_log: Array1<f32>,
}

impl LruSpectrum {
    /// Eigenvalues spread evenly over the ring of the settings, and `γ = √(1 − |λ|²)`.
    ///
    /// # Errors
    /// When the ring is none.
    pub fn initial(config: &LruConfig, seed: u64) -> Result<Self> {
        let LruConfig { state_dim, r_min, r_max, max_phase, .. } = *config;
        let ring = (0.0..=1.0).contains(&r_min) && (r_min..=1.0).contains(&r_max);
        if !(ring && max_phase > 0.0 && max_phase.is_finite()) {
            let found = format!("{r_min}, {r_max} and {max_phase}");
            let expected = "0 ≤ r_min ≤ r_max ≤ 1, and a phase above 0";
            return Err(Error::expected("r_min, r_max and max_phase of an LRU", found, expected));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        // Never 0: what it is the logarithm of has to be above that.
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

/// The layers of an LRU.
#[derive(Debug, Clone)]
pub struct LruLayers {
    /// From input to state, the real part: `[state_dim, in]`.
    pub b_re: SharedLayer,
    /// The imaginary part.
    pub b_im: SharedLayer,
    /// From the state's real part to output: `[units, state_dim]`.
    pub c_re: SharedLayer,
    /// From its imaginary part.
    pub c_im: SharedLayer,
    /// From input to output: `[units, in]`.
    pub d: SharedLayer,
}

/// `h = λ h₋₁ + γ B x`, `y = Re(C h) + D x`, with B, C and D layers, B and C of a real and an imaginary part.
#[derive(Debug, Clone)]
pub struct Lru {
    config: LruConfig,
    spectrum: LruSpectrum,
    layers: LruLayers,
    /// λ's real parts, imaginary parts, and γ.
    lambda_re: Vec<f32>,
    lambda_im: Vec<f32>,
    gamma: Vec<f32>,
}

impl Lru {
    /// From its layers and the logarithms of its eigenvalues.
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
        require_finite("what an LRU's eigenvalues are", lambda_re.iter().chain(&lambda_im).chain(&gamma))?;
        Ok(Lru { config, spectrum, layers, lambda_re, lambda_im, gamma })
    }

    /// The settings.
    pub fn config(&self) -> &LruConfig {
        &self.config
    }

    /// The logarithms of the eigenvalues.
    pub fn spectrum(&self) -> &LruSpectrum {
        &self.spectrum
    }

    /// The layers.
    pub fn layers(&self) -> &LruLayers {
        &self.layers
    }

    /// Runs sequences `[batch, steps, in_features]` as the settings say, from a state `[batch, 2, state_dim]` (real parts, then
    /// imaginary ones) on, zeros where none is given. `mask` `[batch, steps]` says which steps are there.
    ///
    /// # Errors
    /// As [`recurrence::run`].
    pub fn run(
        &self,
        x: ArrayView3<f32>,
        state: Option<ArrayView3<f32>>,
        mask: Option<ArrayView2<bool>>,
        accuracy: Accuracy,
    ) -> Result<Ran> {
        recurrence::run(self, self.config.sequence, x, state, mask, accuracy)
    }

    /// The cell's step, for inputs `[batch, in_features]`: outputs `[batch, units]`.
    ///
    /// # Errors
    /// As [`recurrence::step`].
    pub fn step(&self, x: ArrayView2<f32>, state: &mut Array3<f32>, accuracy: Accuracy) -> Result<Array2<f32>> {
        recurrence::step(self, x, state, accuracy)
    }
}

impl Cell for Lru {
    fn in_features(&self) -> usize {
        self.layers.b_re.in_features()
    }

    fn out_features(&self) -> usize {
        self.config.units
    }

    fn state_shape(&self) -> (usize, usize) {
        (2, self.config.state_dim)
    }

    /// `γ B x`, real parts and then imaginary ones.
    fn drive(&self, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Array2<f32>> {
        let state = self.config.state_dim;
        let mut all = Array2::zeros((x.nrows(), 2 * state));
        let gamma = ArrayView1::from(&self.gamma);
        let (re, im) = (self.layers.b_re.forward(x, accuracy)?.y, self.layers.b_im.forward(x, accuracy)?.y);
        all.slice_mut(s![.., ..state]).assign(&(re * gamma));
        all.slice_mut(s![.., state..]).assign(&(im * gamma));
        Ok(all)
    }

    fn left_len(&self) -> usize {
        2 * self.config.state_dim
    }

    fn advance(&self, drive: ArrayView1<f32>, state: &mut [f32], left: &mut [f32]) {
        let half = self.config.state_dim;
        let (re, im) = state.split_at_mut(half);
        let (drive_re, drive_im) = drive.split_at(ndarray::Axis(0), half);
        for i in 0..half {
            let (a, b) = (re[i], im[i]);
            re[i] = self.lambda_re[i] * a - self.lambda_im[i] * b + drive_re[i];
            im[i] = self.lambda_re[i] * b + self.lambda_im[i] * a + drive_im[i];
        }
        left.copy_from_slice(state);
    }

    fn output(&self, left: ArrayView2<f32>, x: ArrayView2<f32>, accuracy: Accuracy) -> Result<Array2<f32>> {
        let state = self.config.state_dim;
        let re = self.layers.c_re.forward(left.slice(s![.., ..state]), accuracy)?.y;
        let im = self.layers.c_im.forward(left.slice(s![.., state..]), accuracy)?.y;
        Ok(re - im + self.layers.d.forward(x, accuracy)?.y)
    }
}
