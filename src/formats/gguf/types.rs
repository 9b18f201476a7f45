//! The types of tensors in GGUF files: which weights a block has, how its bytes are laid out, and the format that holds them as
//! they are.
//!
//! The layouts are those of `ggml-common.h` in llama.cpp. Each block of a row has its own scales, so that codes and scales only
//! have to be put side by side: nothing is computed, and what the weights are worth stays the same to the bit.

use layerstore_core::quant::{Group, PackedMatrix, ScaleType, WeightFormat, WeightType};

use crate::error::{Error, Result};
use crate::layer::DType;

/// A type of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorType {
    /// Numbers one by one.
    Plain(DType),
    /// Blocks of codes.
    Blocks(BlockType),
}

/// A type of blocks, by llama.cpp's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, clippy::upper_case_acronyms)]
pub enum BlockType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
    Iq4Xs,
    Tq1_0,
    Tq2_0,
    Mxfp4,
}

/// Names of types that cannot be read, by number.
const OTHERS: [(u32, &str); 11] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (29, "IQ1_M"),
    (36, "IQ4_NL_4_4"),
    (40, "NVFP4"),
];

/// Types that can be read, as messages list them.
const READ: &str =
    "F32, F16, BF16, F64, I8 to I64, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, TQ1_0, TQ2_0 or MXFP4";

impl TensorType {
    /// Returns the type of a number in a file.
    ///
    /// # Errors
    /// When it is one that is not read here: the message has its name.
    pub fn of(number: u32) -> Result<Self> {
        use BlockType::*;
        Ok(match number {
            0 => TensorType::Plain(DType::F32),
            1 => TensorType::Plain(DType::F16),
            24 => TensorType::Plain(DType::I8),
            25 => TensorType::Plain(DType::I16),
            26 => TensorType::Plain(DType::I32),
            27 => TensorType::Plain(DType::I64),
            28 => TensorType::Plain(DType::F64),
            30 => TensorType::Plain(DType::BF16),
            2 => TensorType::Blocks(Q4_0),
            3 => TensorType::Blocks(Q4_1),
            6 => TensorType::Blocks(Q5_0),
            7 => TensorType::Blocks(Q5_1),
            8 => TensorType::Blocks(Q8_0),
            10 => TensorType::Blocks(Q2K),
            11 => TensorType::Blocks(Q3K),
            12 => TensorType::Blocks(Q4K),
            13 => TensorType::Blocks(Q5K),
            14 => TensorType::Blocks(Q6K),
            20 => TensorType::Blocks(Iq4Nl),
            23 => TensorType::Blocks(Iq4Xs),
            34 => TensorType::Blocks(Tq1_0),
            35 => TensorType::Blocks(Tq2_0),
            39 => TensorType::Blocks(Mxfp4),
            other => {
                let name = OTHERS.iter().find(|(number, _)| *number == other).map(|(_, name)| *name);
                let found = name.map_or_else(|| format!("number {other}"), |name| format!("{name} (number {other})"));
                return Err(Error::expected("type of a tensor", found, READ));
            }
        })
    }

    /// Returns the type's number in a file; none for numbers that GGUF has not.
    pub fn number(self) -> Option<u32> {
        (0..64).find(|number| matches!(Self::of(*number), Ok(found) if found == self))
    }

    /// Returns the weights and the bytes of a block; a number by itself is a block of one.
    pub fn block(self) -> (usize, usize) {
        match self {
            TensorType::Plain(dtype) => (1, dtype.bitsize() / 8),
            TensorType::Blocks(blocks) => (blocks.weights(), blocks.bytes()),
        }
    }
}

impl BlockType {
    /// Returns the weights of a block.
    pub fn weights(self) -> usize {
        use BlockType::*;
        match self {
            Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Iq4Nl | Mxfp4 => 32,
            Q2K | Q3K | Q4K | Q5K | Q6K | Iq4Xs | Tq1_0 | Tq2_0 => 256,
        }
    }

    /// Returns the bytes of a block.
    pub fn bytes(self) -> usize {
        use BlockType::*;
        match self {
            Q4_0 | Iq4Nl => 18,
            Q4_1 => 20,
            Q5_0 => 22,
            Q5_1 => 24,
            Q8_0 => 34,
            Mxfp4 => 17,
            Q2K => 84,
            Q3K => 110,
            Q4K => 144,
            Q5K => 176,
            Q6K => 210,
            Iq4Xs => 136,
            Tq1_0 => 54,
            Tq2_0 => 66,
        }
    }

    /// Returns the format that holds such weights as they are.
    pub fn format(self) -> WeightFormat {
        use BlockType::*;
        let (weight_type, group, minimum, scales) = match self {
            Q4_0 => (WeightType::Int(4), 32, false, ScaleType::F16),
            Q4_1 => (WeightType::Int(4), 32, true, ScaleType::F16),
            Q5_0 => (WeightType::Int(5), 32, false, ScaleType::F16),
            Q5_1 => (WeightType::Int(5), 32, true, ScaleType::F16),
            Q8_0 => (WeightType::Int(8), 32, false, ScaleType::F16),
            Q2K => (WeightType::Int(2), 16, true, ScaleType::Q2K),
            Q3K => (WeightType::Int(3), 16, false, ScaleType::Q3K),
            Q4K => (WeightType::Int(4), 32, true, ScaleType::Q4K),
            Q5K => (WeightType::Int(5), 32, true, ScaleType::Q4K),
            Q6K => (WeightType::Int(6), 16, false, ScaleType::Q6K),
            Iq4Nl => (WeightType::Iq4Nl, 32, false, ScaleType::F16),
            Iq4Xs => (WeightType::Iq4Nl, 32, false, ScaleType::Iq4Xs),
            Tq1_0 | Tq2_0 => (WeightType::Ternary, 256, false, ScaleType::F16),
            Mxfp4 => (WeightType::MxFp4, 32, false, ScaleType::F32),
        };
        let symmetric = matches!(weight_type, WeightType::Int(_)) && !minimum;
        WeightFormat { weight_type, group: Group::Size(group), symmetric, minimum, scales }
    }

    /// Returns the matrix `[rows, columns]` that these blocks are.
    ///
    /// # Errors
    /// When there are not as many bytes, a scale is not finite, or a code stands for nothing.
    pub fn packed(self, (rows, columns): (usize, usize), blocks: &[u8]) -> Result<PackedMatrix> {
        let expected = columns / self.weights() * rows * self.bytes();
        if !columns.is_multiple_of(self.weights()) || blocks.len() != expected {
            let expected = format!("{expected}, in whole blocks of {} weights", self.weights());
            return Err(Error::expected(format!("bytes of {rows} × {columns} weights"), blocks.len(), expected));
        }
        let mut codes = vec![0; rows * columns];
        let (mut scales, mut zeros) = (Vec::with_capacity(blocks.len() / 8), vec![]);
        for (block, codes) in blocks.chunks_exact(self.bytes()).zip(codes.chunks_exact_mut(self.weights())) {
            self.split(block, codes, &mut scales, &mut zeros);
        }
        if self == BlockType::Tq2_0 && codes.contains(&3) {
            return Err(Error::expected("code of a ternary weight", 3, "0, 1 or 2"));
        }
        PackedMatrix::from_unpacked(self.format(), (rows, columns), &codes, &scales, zeros)
    }

    /// Writes a block's codes, and appends its scales, and its minimums where they are apart.
    fn split(self, block: &[u8], codes: &mut [u8], scales: &mut Vec<u8>, minimums: &mut Vec<u8>) {
        use BlockType::*;
        match self {
            Q4_0 | Iq4Nl => {
                scales.extend(&block[..2]);
                halves(&block[2..], codes);
                // Signed: 0 is the code 8.
                if self == Q4_0 {
                    codes.iter_mut().for_each(|code| *code ^= 8);
                }
            }
            Q4_1 => {
                scales.extend(&block[..2]);
                minimums.extend(&block[2..4]);
                halves(&block[4..], codes);
            }
            Q5_0 => {
                scales.extend(&block[..2]);
                halves(&block[6..], codes);
                fifth_bits(&block[2..6], codes);
                codes.iter_mut().for_each(|code| *code ^= 16);
            }
            Q5_1 => {
                scales.extend(&block[..2]);
                minimums.extend(&block[2..4]);
                halves(&block[8..], codes);
                fifth_bits(&block[4..8], codes);
            }
            Q8_0 => {
                scales.extend(&block[..2]);
                codes.copy_from_slice(&block[2..]);
            }
            Mxfp4 => {
                scales.push(block[0]);
                halves(&block[1..], codes);
            }
            Q2K => {
                scales.extend(&block[..16]);
                scales.extend(&block[80..84]);
                quarters(&block[16..80], codes);
            }
            Q3K => {
                scales.extend(&block[96..110]);
                quarters(&block[32..96], codes);
                // The high bit says that the code is not negative.
                for (at, code) in codes.iter_mut().enumerate() {
                    let high = block[at % 32] >> (at / 32) & 1;
                    *code |= (high ^ 1) << 2;
                }
            }
            Q4K => {
                scales.extend(&block[..16]);
                quants(&block[16..], codes);
            }
            Q5K => {
                scales.extend(&block[..16]);
                quants(&block[48..], codes);
                for (at, code) in codes.iter_mut().enumerate() {
                    *code |= (block[16 + at % 32] >> (at / 32) & 1) << 4;
                }
            }
            Q6K => {
                scales.extend(&block[192..210]);
                for (at, code) in codes.iter_mut().enumerate() {
                    let (half, at) = (at / 128, at % 128);
                    let low = block[64 * half + at % 64] >> (4 * (at / 64)) & 15;
                    let high = block[128 + 32 * half + at % 32] >> (2 * (at / 32)) & 3;
                    *code = (low | high << 4) ^ 32;
                }
            }
            Iq4Xs => {
                scales.extend(&block[..8]);
                let bytes = block[8..].chunks_exact(16);
                codes.chunks_exact_mut(32).zip(bytes).for_each(|(codes, bytes)| halves(bytes, codes));
            }
            Tq1_0 => {
                scales.extend(&block[52..]);
                let (first, rest) = codes.split_at_mut(160);
                let (second, last) = rest.split_at_mut(80);
                trits(&block[..32], first);
                trits(&block[32..48], second);
                trits(&block[48..52], last);
            }
            Tq2_0 => {
                scales.extend(&block[64..]);
                quarters(&block[..64], codes);
            }
        }
    }
}

/// The low nibbles of all bytes, then the high ones.
fn halves(bytes: &[u8], codes: &mut [u8]) {
    let (low, high) = codes.split_at_mut(bytes.len());
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// The fifth bits of 32 codes.
fn fifth_bits(bits: &[u8], codes: &mut [u8]) {
    codes.iter_mut().enumerate().for_each(|(at, code)| *code |= (bits[at / 8] >> (at % 8) & 1) << 4);
}

/// 32 low nibbles and 32 high ones of 32 bytes at a time.
fn quants(bytes: &[u8], codes: &mut [u8]) {
    codes.chunks_exact_mut(64).zip(bytes.chunks_exact(32)).for_each(|(codes, bytes)| halves(bytes, codes));
}

/// The lowest two bits of 32 bytes at a time, then the next two, and so on.
fn quarters(bytes: &[u8], codes: &mut [u8]) {
    for (codes, bytes) in codes.chunks_exact_mut(128).zip(bytes.chunks_exact(32)) {
        codes.iter_mut().enumerate().for_each(|(at, code)| *code = bytes[at % 32] >> (2 * (at / 32)) & 3);
    }
}

/// The first of five ternary digits of all bytes, then the second, and so on: a byte is the digits' fraction in 256ths.
fn trits(bytes: &[u8], codes: &mut [u8]) {
    let mut power = 1u8;
    for codes in codes.chunks_mut(bytes.len()) {
        for (code, &byte) in codes.iter_mut().zip(bytes) {
            *code = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as u8;
        }
        power = power.wrapping_mul(3);
    }
}
