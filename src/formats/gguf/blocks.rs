//! Packed weights as blocks of a GGUF file: the way back from `types`.

use half::f16;
use layerstore_core::quant::{Group, PackedMatrix, ScaleType, WeightFormat, WeightType};

use super::types::BlockType;

/// Every type of blocks, the smaller of two that hold the same weights first.
const ALL: [BlockType; 14] = [
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q5_0,
    BlockType::Q5_1,
    BlockType::Q8_0,
    BlockType::Q2K,
    BlockType::Q3K,
    BlockType::Q4K,
    BlockType::Q5K,
    BlockType::Q6K,
    BlockType::Iq4Nl,
    BlockType::Iq4Xs,
    BlockType::Tq2_0,
    BlockType::Mxfp4,
];

impl BlockType {
    /// Returns the type of blocks that hold weights of this format, in rows of so many: codes of fewer bits in more, and scales of larger
    /// groups once for each block. With `rounds`, scales that are no f16 may be rounded to it.
    ///
    /// # Errors
    /// When there is none: what the weights are.
    pub fn holding(format: WeightFormat, columns: usize, rounds: bool) -> Result<Self, String> {
        if let Some(same) = ALL.into_iter().find(|blocks| blocks.format() == format) {
            return match columns.is_multiple_of(same.weights()) {
                true => Ok(same),
                false => Err(format!("rows of {columns} weights, no multiple of {}", same.weights())),
            };
        }
        let WeightFormat { weight_type, group, symmetric, minimum, scales } = format;
        let blocks = match weight_type {
            WeightType::Int(0..=4) if symmetric => BlockType::Q4_0,
            WeightType::Int(5) if symmetric => BlockType::Q5_0,
            WeightType::Int(6..=8) if symmetric => BlockType::Q8_0,
            WeightType::Int(0..=4) if minimum && scales.nested().is_none() => BlockType::Q4_1,
            WeightType::Int(5) if minimum && scales.nested().is_none() => BlockType::Q5_1,
            WeightType::Int(_) if !minimum => return Err("integers with zero points".into()),
            WeightType::Iq4Nl => BlockType::Iq4Nl,
            WeightType::MxFp4 => BlockType::Mxfp4,
            WeightType::Ternary => BlockType::Tq2_0,
            other => return Err(format!("weights of {other}")),
        };
        let weights = blocks.weights();
        let fits = match group {
            Group::Size(group) => group.is_multiple_of(weights),
            Group::Channel | Group::Tensor => columns.is_multiple_of(weights),
        };
        match scales {
            _ if !fits => Err(format!("groups that are no multiple of {weights} weights")),
            _ if weight_type.has_power_scales() => Ok(blocks),
            ScaleType::F16 => Ok(blocks),
            ScaleType::F32 | ScaleType::Bf16 if rounds => Ok(blocks),
            ScaleType::F32 | ScaleType::Bf16 => {
                Err("scales that are no f16, as blocks have (--allow-approximate rounds them)".into())
            }
            _ => Err("scales of scales of another kind".into()),
        }
    }

    /// Returns the blocks of a matrix of a format that [`BlockType::holding`] gives this type for.
    pub fn blocks(self, matrix: &PackedMatrix) -> Vec<u8> {
        let (rows, columns) = (matrix.nrows(), matrix.ncols());
        let (format, weights) = (matrix.format(), self.weights());
        let per_row = columns / weights;
        // What is stored beside the codes of a block, as `split` takes it apart.
        let scales = self.scales(matrix);
        let each = scales.len() / (rows * per_row).max(1);
        let minimums = self.minimums(matrix);
        let mut codes = vec![0; columns];
        let mut all = Vec::with_capacity(rows * per_row * self.bytes());
        for row in 0..rows {
            matrix.codes(row, &mut codes);
            if let (WeightType::Int(from), WeightType::Int(to), true) =
                (format.weight_type, self.format().weight_type, format.symmetric)
                && from < to
            {
                // Two's complement of more bits.
                let (half, mask) = (1u8 << (from - 1), ((1u16 << to) - 1) as u8);
                codes.iter_mut().for_each(|code| *code = (*code ^ half).wrapping_sub(half) & mask);
            }
            for (block, codes) in codes.chunks_exact(weights).enumerate() {
                let place = row * per_row + block;
                let minimum = minimums.get(2 * place..2 * place + 2).unwrap_or_default();
                self.join(codes, &scales[place * each..(place + 1) * each], minimum, &mut all);
            }
        }
        all
    }

    /// The scales of each block.
    fn scales(self, matrix: &PackedMatrix) -> Vec<u8> {
        let format = matrix.format();
        if format.scales.nested().is_some() {
            return matrix.scale_bytes().to_vec();
        }
        if format.weight_type.has_power_scales() {
            return spread(&matrix.scale_bytes(), 1, self.weights(), matrix);
        }
        let halves: Vec<u8> = matrix.scales().iter().flat_map(|&scale| f16::from_f32(scale).to_le_bytes()).collect();
        spread(&halves, 2, self.weights(), matrix)
    }

    /// The minimums of each block, where they are apart from the scales.
    fn minimums(self, matrix: &PackedMatrix) -> Vec<u8> {
        if matrix.format().scales.nested().is_some() {
            return vec![];
        }
        let halves: Vec<u8> = matrix.minimums().iter().flat_map(|&least| f16::from_f32(least).to_le_bytes()).collect();
        spread(&halves, 2, self.weights(), matrix)
    }

    /// Appends a block of these codes, scales and minimums.
    fn join(self, codes: &[u8], scales: &[u8], minimum: &[u8], all: &mut Vec<u8>) {
        use BlockType::*;
        match self {
            Q4_0 => {
                all.extend(scales);
                let unsigned: Vec<u8> = codes.iter().map(|code| code ^ 8).collect();
                halves(&unsigned, all);
            }
            Iq4Nl => {
                all.extend(scales);
                halves(codes, all);
            }
            Q4_1 => {
                all.extend(scales);
                all.extend(minimum);
                halves(codes, all);
            }
            Q5_0 => {
                let unsigned: Vec<u8> = codes.iter().map(|code| code ^ 16).collect();
                all.extend(scales);
                fifth_bits(&unsigned, all);
                halves(&low(&unsigned), all);
            }
            Q5_1 => {
                all.extend(scales);
                all.extend(minimum);
                fifth_bits(codes, all);
                halves(&low(codes), all);
            }
            Q8_0 => {
                all.extend(scales);
                all.extend(codes);
            }
            Mxfp4 => {
                all.extend(scales);
                halves(codes, all);
            }
            Q2K => {
                all.extend(&scales[..16]);
                quarters(codes, all);
                all.extend(&scales[16..]);
            }
            Q3K => {
                let mut high = [0u8; 32];
                for (at, code) in codes.iter().enumerate() {
                    high[at % 32] |= ((code >> 2 & 1) ^ 1) << (at / 32);
                }
                all.extend(high);
                let two: Vec<u8> = codes.iter().map(|code| code & 3).collect();
                quarters(&two, all);
                all.extend(scales);
            }
            Q4K => {
                all.extend(scales);
                quants(codes, all);
            }
            Q5K => {
                all.extend(scales);
                let mut fifth = [0u8; 32];
                codes.iter().enumerate().for_each(|(at, code)| fifth[at % 32] |= (code >> 4 & 1) << (at / 32));
                all.extend(fifth);
                quants(&low(codes), all);
            }
            Q6K => {
                let (mut lower, mut upper) = ([0u8; 128], [0u8; 64]);
                for (at, code) in codes.iter().enumerate() {
                    let code = (code ^ 32) & 63;
                    let (half, at) = (at / 128, at % 128);
                    lower[64 * half + at % 64] |= (code & 15) << (4 * (at / 64));
                    upper[32 * half + at % 32] |= (code >> 4) << (2 * (at / 32));
                }
                all.extend(lower);
                all.extend(upper);
                all.extend(scales);
            }
            Iq4Xs => {
                all.extend(scales);
                codes.chunks_exact(32).for_each(|codes| halves(codes, all));
            }
            Tq1_0 => unreachable!("ternary weights are written as TQ2_0"),
            Tq2_0 => {
                quarters(codes, all);
                all.extend(scales);
            }
        }
    }
}

/// What each group has, of so many bytes, for each block of it.
fn spread(groups: &[u8], bytes: usize, weights: usize, matrix: &PackedMatrix) -> Vec<u8> {
    let count = groups.len() / bytes;
    let blocks = matrix.nrows() * (matrix.ncols() / weights);
    let times = blocks.checked_div(count).unwrap_or(0);
    groups.chunks_exact(bytes).flat_map(|group| group.repeat(times)).collect()
}

/// The lower four bits.
fn low(codes: &[u8]) -> Vec<u8> {
    codes.iter().map(|code| code & 15).collect()
}

/// Two codes to a byte: the lower nibbles are the first half of them.
fn halves(codes: &[u8], all: &mut Vec<u8>) {
    let (first, second) = codes.split_at(codes.len() / 2);
    all.extend(first.iter().zip(second).map(|(low, high)| low & 15 | high << 4));
}

/// The fifth bits of 32 codes.
fn fifth_bits(codes: &[u8], all: &mut Vec<u8>) {
    let bits = codes.iter().enumerate().fold(0u32, |bits, (at, code)| bits | u32::from(code >> 4 & 1) << at);
    all.extend(bits.to_le_bytes());
}

/// 64 codes at a time: 32 lower nibbles, 32 upper ones.
fn quants(codes: &[u8], all: &mut Vec<u8>) {
    codes.chunks_exact(64).for_each(|codes| halves(codes, all));
}

/// 128 codes at a time, of two bits, 32 to a place in the byte.
fn quarters(codes: &[u8], all: &mut Vec<u8>) {
    for codes in codes.chunks_exact(128) {
        all.extend((0..32).map(|at| (0..4).fold(0, |byte, part| byte | (codes[32 * part + at] & 3) << (2 * part))));
    }
}

/// Rounds numbers to Q8_0, as llama.cpp does: 32 to a scale, which is the largest of them in 127ths.
pub fn to_q8_0(numbers: &[f32]) -> Vec<u8> {
    let mut all = Vec::with_capacity(numbers.len() / 32 * 34);
    for block in numbers.chunks_exact(32) {
        let most = block.iter().fold(0f32, |most, v| most.max(v.abs()));
        let scale = most / 127.0;
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        all.extend(f16::from_f32(scale).to_le_bytes());
        all.extend(block.iter().map(|v| (v * inverse).round() as i8 as u8));
    }
    all
}
