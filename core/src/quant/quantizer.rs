//! From the weights of a group to codes and back: integers, NormalFloat, and integers under a power of two.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::format::{WeightFormat, WeightType};
use crate::error::{Error, Result};

/// How a group's scale (and zero point) is found.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Clipping {
    /// The codes span the group. Symmetric integers as LQER-Qwix has them: `scale = max|w| / (2^(b−1) − ½)`.
    Absmax,
    /// They span all of it but the largest weights: this percentile of |w|, and half of what it leaves at each end of an
    /// asymmetric group.
    Percentile(f64),
    /// The mean of |w|, for ternary weights alone (BitNet b1.58); 1e-5 where all are 0.
    Absmean,
    /// Narrower spans and other zero points are tried, then the best scale for the codes: the least squared error, each
    /// column's weighed by its E\[x²\] where inputs are known.
    #[default]
    Mse,
    /// From the whole span on, what leaves the least Σ|w − ŵ|^0.7: few errors, if large ones (HQQ).
    Hqq,
}

/// A name, or `{ percentile = P }`.
impl<'de> Deserialize<'de> for Clipping {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Table {
            percentile: f64,
        }
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Clipping;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(r#""mse", "absmax", "hqq", "absmean" or a table { percentile = 99.9 }"#)
            }
            fn visit_str<E: serde::de::Error>(self, name: &str) -> std::result::Result<Clipping, E> {
                match name {
                    "absmax" => Ok(Clipping::Absmax),
                    "absmean" => Ok(Clipping::Absmean),
                    "mse" => Ok(Clipping::Mse),
                    "hqq" => Ok(Clipping::Hqq),
                    _ => Err(E::invalid_value(Unexpected::Str(name), &self)),
                }
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<Clipping, A::Error> {
                let Table { percentile } = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Clipping::Percentile(percentile))
            }
        }
        deserializer.deserialize_any(Either)
    }
}

impl Clipping {
    /// Checks the numbers by themselves, and that ternary clipping is for ternary weights.
    ///
    /// # Errors
    /// When a percentile is not above 0 and at most 100, or the mean is to be the scale of other weights.
    pub fn check(self, weight_type: WeightType) -> Result<()> {
        match self {
            Clipping::Percentile(percent) if !(percent > 0.0 && percent <= 100.0) => {
                Err(Error::expected("percentile of clipping", percent, "above 0 and at most 100"))
            }
            Clipping::Absmean if weight_type != WeightType::Ternary => {
                let found = format!("\"absmean\" for {weight_type}");
                Err(Error::expected("clipping", found, "\"absmean\" for ternary weights alone"))
            }
            _ => Ok(()),
        }
    }
}

/// The scale and zero point of a group: what its codes stand for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuantParams {
    /// The number that levels are multiplied with.
    pub scale: f32,
    /// The code of 0, of asymmetric integers; else 0.
    pub zero: u8,
}

/// Adding and subtracting it rounds to the nearest whole number, ties to even, for numbers below 2²².
const TO_WHOLE: f32 = 12_582_912.0;

/// Spans tried for [`Clipping::Mse`].
const SPANS: usize = 12;

/// The levels of NF4: quantiles of a standard normal distribution, scaled to [−1, 1] (QLoRA, appendix E).
pub const NORMAL_FLOAT: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The levels of bitsandbytes' 4-bit floats, by code.
pub const FP4: [f32; 16] = [
    0.0,
    0.005_208_333_3,
    0.666_666_7,
    1.0,
    0.333_333_33,
    0.5,
    0.166_666_67,
    0.25,
    0.0,
    -0.005_208_333_3,
    -0.666_666_7,
    -1.0,
    -0.333_333_33,
    -0.5,
    -0.166_666_67,
    -0.25,
];

/// The levels of MXFP4 (E2M1 floats) at twice their size, by code.
pub const MXFP4: [f32; 16] = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];

/// The levels of llama.cpp's IQ4_NL and IQ4_XS.
pub const IQ4_NL: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// The 8-bit floats of 4 bits of exponent, by code; NaN at 127 and 255.
pub(crate) static F8_E4M3: [f32; 256] = eight_bits(4);

/// The 8-bit floats of 5 bits of exponent, by code; infinite at 124 and 252, NaN above.
pub(crate) static F8_E5M2: [f32; 256] = eight_bits(5);

const fn eight_bits(exponent_bits: u32) -> [f32; 256] {
    let (fraction_bits, bias) = (7 - exponent_bits, (1i32 << (exponent_bits - 1)) - 1);
    let mut all = [0f32; 256];
    let mut code = 0usize;
    while code < 256 {
        let exponent = (code as u32 >> fraction_bits) & ((1 << exponent_bits) - 1);
        let fraction = code as u32 & ((1 << fraction_bits) - 1);
        let whole = if exponent == 0 { fraction } else { fraction | 1 << fraction_bits };
        let power = (if exponent == 0 { 1 } else { exponent as i32 }) - bias - fraction_bits as i32;
        let size = whole as f32 * f32::from_bits(((power + 127) as u32) << 23);
        let size = match (exponent_bits, code & 127) {
            (4, 127) | (5, 125..) => f32::NAN,
            (5, 124) => f32::INFINITY,
            _ => size,
        };
        all[code] = if code > 127 { -size } else { size };
        code += 1;
    }
    all
}

/// A way to write a weight as a code of at most eight bits.
///
/// Weights are finite, and at most `LARGEST` in size.
pub trait Quantizer: Send + Sync {
    /// Returns parameters worth trying for a group, the plain ones first; for anything but [`Clipping::Mse`] (and ternary
    /// weights) they are the only ones.
    fn candidates(&self, weights: &[f32], clipping: Clipping) -> Vec<QuantParams>;
    /// Writes the weights as they come back from their codes.
    fn round(&self, params: QuantParams, weights: &[f32], out: &mut [f32]);
    /// Writes the weights' codes, in the low bits.
    fn encode(&self, params: QuantParams, weights: &[f32], codes: &mut [u8]);
    /// Writes the numbers that codes stand for.
    fn decode(&self, params: QuantParams, codes: &[u8], out: &mut [f32]);
}

impl WeightFormat {
    /// Returns the quantiser of the format's codes; `None` for floats, which need none.
    pub(crate) fn quantizer(&self) -> Option<Box<dyn Quantizer>> {
        match self.weight_type {
            WeightType::Int(bits) if self.symmetric => Some(Box::new(Symmetric { bits: bits.into() })),
            WeightType::Int(bits) => Some(Box::new(Asymmetric { bits: bits.into() })),
            WeightType::Nf4 => Some(Box::new(NormalFloat)),
            WeightType::Fp4 => Some(Box::new(Levels(&FP4))),
            WeightType::MxFp4 => Some(Box::new(Levels(&MXFP4))),
            WeightType::Iq4Nl => Some(Box::new(Levels(&IQ4_NL))),
            WeightType::F8E4M3 => Some(Box::new(Levels(&F8_E4M3))),
            WeightType::F8E5M2 => Some(Box::new(Levels(&F8_E5M2))),
            WeightType::MxInt(bits) => Some(Box::new(Microscaling { bits: bits.into() })),
            WeightType::Ternary => Some(Box::new(Ternary)),
            WeightType::F16 | WeightType::Bf16 => None,
        }
    }
}

fn whole(value: f32, lowest: f32, highest: f32) -> f32 {
    (value.clamp(lowest, highest) + TO_WHOLE) - TO_WHOLE
}

fn largest(weights: &[f32]) -> f32 {
    weights.iter().fold(0f32, |m, w| m.max(w.abs()))
}

/// The value that this percentile of the values is not above.
fn percentile(mut values: Vec<f32>, percent: f64) -> f32 {
    if values.is_empty() {
        return 0.0;
    }
    let place = (percent / 100.0 * values.len() as f64).ceil() as usize;
    let place = place.clamp(1, values.len()) - 1;
    *values.select_nth_unstable_by(place, f32::total_cmp).1
}

/// Shares of the plain span to try: with fewer levels it pays to cut off more.
fn shares(bits: u32) -> impl Iterator<Item = f32> {
    let least = match bits {
        ..=2 => 0.35,
        3 => 0.5,
        4 => 0.65,
        5 => 0.8,
        _ => 0.9,
    };
    (0..SPANS).map(move |i| 1.0 - (1.0 - least) * i as f32 / (SPANS - 1) as f32)
}

fn spans(plain: f32, bits: u32, clipping: Clipping) -> Vec<QuantParams> {
    let params = |share: f32| QuantParams { scale: plain * share, zero: 0 };
    if clipping == Clipping::Mse { shares(bits).map(params).collect() } else { vec![params(1.0)] }
}

/// The largest weight that is not clipped.
fn reach(weights: &[f32], clipping: Clipping) -> f32 {
    match clipping {
        Clipping::Percentile(percent) => percentile(weights.iter().map(|w| w.abs()).collect(), percent),
        _ => largest(weights),
    }
}

/// Returns the scale, or 0 for one of (nearly) nothing: weights of nothing, beside others of a size that needs no unit. Any
/// other scale would leave the rounding of their products in a layer's output.
fn or_zero(scale: f32) -> f32 {
    if scale < f32::MIN_POSITIVE.sqrt() { 0.0 } else { scale }
}

/// Returns what weights are multiplied with to be levels; all are 0 under a scale of 0.
fn reciprocal(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

struct Symmetric {
    bits: u32,
}

impl Symmetric {
    fn half(&self) -> f32 {
        (1u32 << (self.bits - 1)) as f32
    }
}

impl Quantizer for Symmetric {
    fn candidates(&self, weights: &[f32], clipping: Clipping) -> Vec<QuantParams> {
        // In LQER-Qwix's order of operations.
        spans(or_zero(reach(weights, clipping) * (1.0 / (self.half() - 0.5))), self.bits, clipping)
    }

    fn round(&self, params: QuantParams, weights: &[f32], out: &mut [f32]) {
        let (reciprocal, half) = (reciprocal(params.scale), self.half());
        out.iter_mut().zip(weights).for_each(|(o, w)| *o = whole(w * reciprocal, -half, half - 1.0) * params.scale);
    }

    fn encode(&self, params: QuantParams, weights: &[f32], codes: &mut [u8]) {
        let (reciprocal, half) = (reciprocal(params.scale), self.half());
        codes.iter_mut().zip(weights).for_each(|(c, w)| *c = whole(w * reciprocal, -half, half - 1.0) as i8 as u8);
    }

    fn decode(&self, params: QuantParams, codes: &[u8], out: &mut [f32]) {
        let unused = 8 - self.bits;
        out.iter_mut().zip(codes).for_each(|(o, &c)| *o = f32::from((c << unused) as i8 >> unused) * params.scale);
    }
}

struct Asymmetric {
    bits: u32,
}

impl Asymmetric {
    fn top(&self) -> f32 {
        ((1u32 << self.bits) - 1) as f32
    }
}

impl Quantizer for Asymmetric {
    fn candidates(&self, weights: &[f32], clipping: Clipping) -> Vec<QuantParams> {
        let top = f64::from(self.top());
        let (lo, hi) = match clipping {
            Clipping::Percentile(percent) => {
                let end = |sign: f32| percentile(weights.iter().map(|w| sign * w).collect(), 50.0 + percent / 2.0);
                (f64::from(-end(-1.0)).min(0.0), f64::from(end(1.0)).max(0.0))
            }
            _ => weights.iter().fold((0f64, 0f64), |(lo, hi), &w| (lo.min(w.into()), hi.max(w.into()))),
        };
        let plain = (hi - lo) / top;
        if (plain as f32) < f32::MIN_POSITIVE {
            return vec![QuantParams { scale: 0.0, zero: 0 }];
        }
        let ideal = -lo / plain;
        let params = |scale: f64, zero: f64| QuantParams { scale: scale as f32, zero: zero.clamp(0.0, top) as u8 };
        let mut group_params = vec![params(plain, ideal.round_ties_even())];
        if clipping == Clipping::Mse {
            // Clipping the ends a little buys finer steps for the rest.
            group_params.extend(
                shares(self.bits).skip(1).map(|share| params(plain * f64::from(share), ideal.round_ties_even())),
            );
            // A rounded zero point pushes one end off the parameters: let the step grow to reach both.
            for zero in [ideal.floor(), ideal.ceil()] {
                if (lo == 0.0 || zero > 0.0) && (hi == 0.0 || zero < top) {
                    let below = if zero > 0.0 { -lo / zero } else { 0.0 };
                    let above = if zero < top { hi / (top - zero) } else { 0.0 };
                    let wide = below.max(above);
                    group_params
                        .extend(shares(self.bits).step_by(3).map(|share| params(wide * f64::from(share), zero)));
                }
            }
        }
        group_params
    }

    fn round(&self, params: QuantParams, weights: &[f32], out: &mut [f32]) {
        let (reciprocal, zero) = (reciprocal(params.scale), f32::from(params.zero));
        let top = self.top();
        out.iter_mut().zip(weights).for_each(|(o, w)| *o = whole(w * reciprocal, -zero, top - zero) * params.scale);
    }

    fn encode(&self, params: QuantParams, weights: &[f32], codes: &mut [u8]) {
        let (reciprocal, zero) = (reciprocal(params.scale), f32::from(params.zero));
        let top = self.top();
        codes.iter_mut().zip(weights).for_each(|(c, w)| *c = (whole(w * reciprocal, -zero, top - zero) + zero) as u8);
    }

    fn decode(&self, params: QuantParams, codes: &[u8], out: &mut [f32]) {
        let zero = f32::from(params.zero);
        out.iter_mut().zip(codes).for_each(|(o, &c)| *o = (f32::from(c) - zero) * params.scale);
    }
}

struct NormalFloat;

/// The place of the level nearest to a number; the lower one of two.
fn normal_level(value: f32) -> usize {
    NORMAL_FLOAT.windows(2).map(|pair| usize::from(value > 0.5 * (pair[0] + pair[1]))).sum()
}

impl Quantizer for NormalFloat {
    fn candidates(&self, weights: &[f32], clipping: Clipping) -> Vec<QuantParams> {
        spans(or_zero(reach(weights, clipping)), 4, clipping)
    }

    fn round(&self, params: QuantParams, weights: &[f32], out: &mut [f32]) {
        let reciprocal = reciprocal(params.scale);
        out.iter_mut().zip(weights).for_each(|(o, w)| *o = NORMAL_FLOAT[normal_level(w * reciprocal)] * params.scale);
    }

    fn encode(&self, params: QuantParams, weights: &[f32], codes: &mut [u8]) {
        let reciprocal = reciprocal(params.scale);
        codes.iter_mut().zip(weights).for_each(|(c, w)| *c = normal_level(w * reciprocal) as u8);
    }

    fn decode(&self, params: QuantParams, codes: &[u8], out: &mut [f32]) {
        out.iter_mut().zip(codes).for_each(|(o, &c)| *o = NORMAL_FLOAT[usize::from(c & 15)] * params.scale);
    }
}

/// Numbers in any order, as many as there are codes.
struct Levels<const N: usize>(&'static [f32; N]);

impl<const N: usize> Levels<N> {
    fn nearest(&self, value: f32) -> usize {
        // A NaN is the farthest of all.
        let distance = |level: &f32| (level - value).abs();
        let nearest = self.0.iter().enumerate().min_by(|(_, a), (_, b)| distance(a).total_cmp(&distance(b)));
        nearest.map_or(0, |(place, _)| place)
    }
}

impl<const N: usize> Quantizer for Levels<N> {
    fn candidates(&self, weights: &[f32], clipping: Clipping) -> Vec<QuantParams> {
        let most = self.0.iter().filter(|level| level.is_finite()).fold(0f32, |most, level| most.max(level.abs()));
        spans(or_zero(reach(weights, clipping) / most), 4, clipping)
    }

    fn round(&self, params: QuantParams, weights: &[f32], out: &mut [f32]) {
        let reciprocal = reciprocal(params.scale);
        out.iter_mut().zip(weights).for_each(|(o, w)| *o = self.0[self.nearest(w * reciprocal)] * params.scale);
    }

    fn encode(&self, params: QuantParams, weights: &[f32], codes: &mut [u8]) {
        let reciprocal = reciprocal(params.scale);
        codes.iter_mut().zip(weights).for_each(|(c, w)| *c = self.nearest(w * reciprocal) as u8);
    }

    fn decode(&self, params: QuantParams, codes: &[u8], out: &mut [f32]) {
        out.iter_mut().zip(codes).for_each(|(o, &c)| *o = self.0[usize::from(c) % N] * params.scale);
    }
}

struct Microscaling {
    bits: u32,
}

impl Microscaling {
    fn top(&self) -> f32 {
        ((1u32 << (self.bits - 1)) - 1) as f32
    }
}

impl Quantizer for Microscaling {
    fn candidates(&self, weights: &[f32], clipping: Clipping) -> Vec<QuantParams> {
        let reach = reach(weights, clipping);
        if reach < f32::MIN_POSITIVE.sqrt() {
            return vec![QuantParams { scale: 0.0, zero: 0 }];
        }
        // The power of two that brings the largest weight just below 2^(b−1).
        let power = reach.log2().floor() as i32 - (self.bits as i32 - 2);
        let params = |power: i32| QuantParams { scale: 2f32.powi(power.clamp(-126, 127)), zero: 0 };
        // Half of it clips the largest weights, and has finer steps for the others.
        if clipping == Clipping::Mse { [power, power - 1, power + 1].map(params).to_vec() } else { vec![params(power)] }
    }

    fn round(&self, params: QuantParams, weights: &[f32], out: &mut [f32]) {
        let (reciprocal, top) = (reciprocal(params.scale), self.top());
        out.iter_mut().zip(weights).for_each(|(o, w)| *o = whole(w * reciprocal, -top, top) * params.scale);
    }

    fn encode(&self, params: QuantParams, weights: &[f32], codes: &mut [u8]) {
        let (reciprocal, top) = (reciprocal(params.scale), self.top());
        codes.iter_mut().zip(weights).for_each(|(c, w)| *c = whole(w * reciprocal, -top, top) as i8 as u8);
    }

    fn decode(&self, params: QuantParams, codes: &[u8], out: &mut [f32]) {
        Symmetric { bits: self.bits }.decode(params, codes, out);
    }
}

struct Ternary;

/// Scales to try, in mean sizes of the weights: normal ones want 1.53, evenly spread ones less, peaked ones more.
const TIMES_MEAN: [f64; 7] = [1.5, 1.0, 1.25, 1.75, 2.0, 2.25, 2.5];

/// Returns the scale of ternary weights of this mean size: the mean itself, or 1e-5 (Keras-MML's least) where it is 0.
pub(crate) fn absmean_scale(mean: f64) -> f32 {
    let scale = mean as f32;
    if scale > 0.0 { scale } else { 1e-5 }
}

impl Quantizer for Ternary {
    fn candidates(&self, weights: &[f32], clipping: Clipping) -> Vec<QuantParams> {
        let params = |scale: f64| QuantParams { scale: scale as f32, zero: 0 };
        let sum: f64 = weights.iter().map(|w| f64::from(w.abs())).sum();
        let mean = sum / weights.len().max(1) as f64;
        match clipping {
            Clipping::Absmean => vec![QuantParams { scale: absmean_scale(mean), zero: 0 }],
            Clipping::Absmax | Clipping::Percentile(_) => {
                vec![QuantParams { scale: or_zero(reach(weights, clipping)), zero: 0 }]
            }
            Clipping::Mse | Clipping::Hqq => {
                let mean = f64::from(or_zero(mean as f32));
                TIMES_MEAN.map(|times| params(times * mean)).to_vec()
            }
        }
    }

    fn round(&self, params: QuantParams, weights: &[f32], out: &mut [f32]) {
        let reciprocal = reciprocal(params.scale);
        out.iter_mut().zip(weights).for_each(|(o, w)| *o = whole(w * reciprocal, -1.0, 1.0) * params.scale);
    }

    fn encode(&self, params: QuantParams, weights: &[f32], codes: &mut [u8]) {
        let reciprocal = reciprocal(params.scale);
        codes.iter_mut().zip(weights).for_each(|(c, w)| *c = (whole(w * reciprocal, -1.0, 1.0) + 1.0) as u8);
    }

    fn decode(&self, params: QuantParams, codes: &[u8], out: &mut [f32]) {
        out.iter_mut().zip(codes).for_each(|(o, &c)| *o = (f32::from(c & 3) - 1.0) * params.scale);
    }
}
