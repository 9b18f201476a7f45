//! What scales are stored as. Scales of scales: a group's scale is a small integer times the f16 scale of its super-block of 256 weights, and so is its
//! minimum where there is one. Laid out as in llama.cpp's K-quants and IQ4_XS.

use std::borrow::Cow;

use half::f16;
use serde::{Deserialize, Serialize};

use crate::kernels::GroupNumbers;

/// What a scale is stored as. Scales of MXINT and MXFP4 are one byte, their exponent, whatever is said here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleType {
    /// Four bytes a scale.
    #[default]
    F32,
    /// Two bytes a scale.
    F16,
    /// Two bytes a scale, with the exponent of an f32. Of weights that another program has quantised, as are the next ones.
    Bf16,
    /// 4-bit scales and minimums of 16 groups of 16 weights, of Q2_K in llama.cpp.
    Q2K,
    /// 6-bit scales of 16 groups of 16 weights, of Q3_K in llama.cpp.
    Q3K,
    /// 6-bit scales and minimums of 8 groups of 32 weights, of Q4_K and Q5_K in llama.cpp.
    Q4K,
    /// 8-bit scales of 16 groups of 16 weights, of Q6_K in llama.cpp.
    Q6K,
    /// 6-bit scales of 8 groups of 32 weights, of IQ4_XS in llama.cpp.
    Iq4Xs,
}

/// Scales or minimums of groups in memory: as f16 where they are stored so, since kernels read them faster.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum GroupValues {
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl GroupValues {
    /// Returns numbers, which are f16 ones already where they `are_halves`.
    pub fn new(values: Vec<f32>, are_halves: bool) -> Self {
        match are_halves && !values.is_empty() {
            true => GroupValues::F16(values.into_iter().map(f16::from_f32).collect()),
            false => GroupValues::F32(values),
        }
    }

    pub fn none() -> Self {
        GroupValues::F32(vec![])
    }

    pub fn len(&self) -> usize {
        self.view().len()
    }

    /// Returns one of them; `None` where there are fewer.
    pub fn get(&self, place: usize) -> Option<f32> {
        match self {
            GroupValues::F32(all) => all.get(place).copied(),
            GroupValues::F16(all) => all.get(place).map(|value| value.to_f32()),
        }
    }

    pub fn floats(&self) -> Cow<'_, [f32]> {
        match self {
            GroupValues::F32(all) => all.into(),
            GroupValues::F16(all) => all.iter().map(|value| value.to_f32()).collect(),
        }
    }

    pub fn bytes(&self) -> usize {
        match self {
            GroupValues::F32(all) => 4 * all.len(),
            GroupValues::F16(all) => 2 * all.len(),
        }
    }

    /// Returns them as kernels take them.
    pub fn view(&self) -> GroupNumbers<'_> {
        match self {
            GroupValues::F32(all) => GroupNumbers::F32(all),
            GroupValues::F16(all) => GroupNumbers::F16(all),
        }
    }
}

/// Weights of a super-block.
pub const SUPER_BLOCK: usize = 256;

/// How the scales of a super-block are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nested {
    /// Weights of a group.
    pub group: usize,
    /// Bytes of a super-block's scales and minimums.
    pub bytes: usize,
    /// Whether groups have minimums.
    pub minimum: bool,
}

impl ScaleType {
    /// Returns how scales of scales are laid out; `None` for scales that are numbers by themselves.
    pub fn nested(self) -> Option<Nested> {
        let (group, bytes, minimum) = match self {
            ScaleType::F32 | ScaleType::F16 | ScaleType::Bf16 => return None,
            ScaleType::Q2K => (16, 20, true),
            ScaleType::Q3K => (16, 14, false),
            ScaleType::Q4K => (32, 16, true),
            ScaleType::Q6K => (16, 18, false),
            ScaleType::Iq4Xs => (32, 8, false),
        };
        Some(Nested { group, bytes, minimum })
    }

    /// Appends the scales and minimums of a super-block's groups, which its `bytes` say.
    ///
    /// The order of the bytes is that of the block in a GGUF file: 4-bit scales and minimums, then both f16 (`q2_k`); 6-bit
    /// scales, then the f16 (`q3_k`); both f16, then 6-bit scales and minimums (`q4_k`, also of Q5_K); 8-bit scales, then the f16
    /// (`q6_k`); the f16, the upper two bits of the 6-bit scales, their lower four (`iq4_xs`).
    ///
    /// # Panics
    /// When there are not as many bytes as [`Nested::bytes`].
    pub(super) fn unnest(self, bytes: &[u8], scales: &mut Vec<f32>, minimums: &mut Vec<f32>) {
        let half = |at: usize| f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
        match self {
            ScaleType::F32 | ScaleType::F16 | ScaleType::Bf16 => {}
            ScaleType::Q2K => {
                let (of_scales, of_minimums) = (half(16), half(18));
                scales.extend(bytes[..16].iter().map(|both| of_scales * f32::from(both & 15)));
                minimums.extend(bytes[..16].iter().map(|both| -(of_minimums * f32::from(both >> 4))));
            }
            ScaleType::Q3K => {
                // The lower four bits of eight and eight scales share a byte, the upper two of four of them one of the last.
                let of_scales = half(12);
                scales.extend((0..16).map(|group| {
                    let low = if group < 8 { bytes[group] & 15 } else { bytes[group - 8] >> 4 };
                    let high = bytes[8 + group % 4] >> (2 * (group / 4)) & 3;
                    of_scales * (f32::from(low | high << 4) - 32.0)
                }));
            }
            ScaleType::Q4K => {
                let (of_scales, of_minimums) = (half(0), half(2));
                let bytes = &bytes[4..];
                for group in 0..8 {
                    let (scale, minimum) = match group {
                        0..4 => (bytes[group] & 63, bytes[group + 4] & 63),
                        _ => (
                            bytes[group + 4] & 15 | bytes[group - 4] >> 6 << 4,
                            bytes[group + 4] >> 4 | bytes[group] >> 6 << 4,
                        ),
                    };
                    scales.push(of_scales * f32::from(scale));
                    minimums.push(-(of_minimums * f32::from(minimum)));
                }
            }
            ScaleType::Q6K => {
                let of_scales = half(16);
                scales.extend(bytes[..16].iter().map(|&scale| of_scales * f32::from(scale as i8)));
            }
            ScaleType::Iq4Xs => {
                let (of_scales, high) = (half(0), u16::from_le_bytes([bytes[2], bytes[3]]));
                scales.extend((0..8).map(|group| {
                    let low = bytes[4 + group / 2] >> (4 * (group % 2)) & 15;
                    let high = (high >> (2 * group) & 3) as u8;
                    of_scales * (f32::from(low | high << 4) - 32.0)
                }));
            }
        }
    }
}
