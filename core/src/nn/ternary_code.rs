//! The prefix code in which Keras-MatMulLess saves ternary kernels.
//!
//! A code is a stream of bits, the highest of a byte first, padded with zeros. Its header is the most common and the second
//! most common value, with `0` for 0, `10` for 1 and `11` for −1; then each value is `0` where it is the most common one, `10`
//! where it is the second, and `11` where it is the third.

use crate::error::{Error, Result};

/// The values in the order of their codes in the header; values that do not occur are ranked in this order.
const VALUES: [i8; 3] = [0, 1, -1];

/// Encodes ternary values by the prefix code of Keras-MatMulLess.
///
/// # Errors
/// When a value is none of −1, 0 and 1.
pub fn encode_ternary(values: &[i8]) -> Result<Vec<u8>> {
    let mut counts = [(0usize, usize::MAX); 3];
    for (index, value) in values.iter().enumerate() {
        let which = VALUES.iter().position(|v| v == value);
        let which = which.ok_or_else(|| Error::expected("ternary value", value, "-1, 0 or 1"))?;
        counts[which].0 += 1;
        counts[which].1 = counts[which].1.min(index);
    }
    // Ties go to the value that occurs first.
    let mut order = [0, 1, 2];
    order.sort_by_key(|&which| (std::cmp::Reverse(counts[which].0), counts[which].1));
    let mut bits = BitWriter::default();
    bits.push(order[0]);
    bits.push(order[1]);
    for value in values {
        let rank = order.iter().position(|&which| VALUES[which] == *value);
        bits.push(rank.unwrap_or_default());
    }
    Ok(bits.bytes)
}

/// Decodes `count` ternary values from the prefix code of Keras-MatMulLess.
///
/// # Errors
/// When the stream ends before them, or its header names one value twice.
pub fn decode_ternary(bytes: &[u8], count: usize) -> Result<Vec<i8>> {
    let ended = || {
        Error::expected("encoded ternary values", format!("{} bytes", bytes.len()), format!("those of {count} values"))
    };
    // Each value takes at least a bit.
    if count > 8 * bytes.len() {
        return Err(ended());
    }
    let mut bits = bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1 == 1));
    let mut next = || -> Result<usize> {
        match bits.next().ok_or_else(ended)? {
            false => Ok(0),
            true => Ok(1 + usize::from(bits.next().ok_or_else(ended)?)),
        }
    };
    let (first, second) = (next()?, next()?);
    if first == second {
        let found = format!("{} twice", VALUES[first]);
        return Err(Error::expected("most common values of encoded ternary values", found, "two that differ"));
    }
    let order = [VALUES[first], VALUES[second], VALUES[3 - first - second]];
    (0..count).map(|_| Ok(order[next()?])).collect()
}

/// Bytes that are filled bit by bit.
#[derive(Default)]
struct BitWriter {
    bytes: Vec<u8>,
    /// Bits written.
    length: u32,
}

impl BitWriter {
    /// Appends the code of a rank.
    fn push(&mut self, rank: usize) {
        match rank {
            0 => self.bit(0),
            _ => {
                self.bit(1);
                self.bit(u8::from(rank == 2));
            }
        }
    }

    fn bit(&mut self, bit: u8) {
        if self.length.is_multiple_of(8) {
            self.bytes.push(0);
        }
        if let Some(last) = self.bytes.last_mut() {
            *last |= bit << (7 - self.length % 8);
        }
        self.length += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn decoding_undoes_encoding(values in proptest::collection::vec(-1i8..2, 0..80)) {
            let bytes = encode_ternary(&values).unwrap();
            prop_assert_eq!(decode_ternary(&bytes, values.len()).unwrap(), values);
        }

        /// Whatever the bytes, values or an error.
        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..20), count in 0usize..200) {
            if let Ok(values) = decode_ternary(&bytes, count) {
                prop_assert_eq!(values.len(), count);
            }
        }
    }

    #[test]
    fn what_is_no_code() {
        assert!(encode_ternary(&[0, 2]).unwrap_err().to_string().contains("-1, 0 or 1"));
        assert!(decode_ternary(&[], 0).is_err());
        assert!(decode_ternary(&[0b0010_0000], 1).unwrap_err().to_string().contains("twice"));
        assert!(decode_ternary(&[0b0100_0000], usize::MAX).is_err());
    }
}
