//! Codes of 2 to 8 bits side by side: the first code in the lowest bits of the first byte.

/// Packs codes (their low `bits` bits); the last byte is filled up with zeros.
pub fn pack(codes: &[u8], bits: u32, packed: &mut Vec<u8>) {
    match bits {
        8 => packed.extend_from_slice(codes),
        4 => packed.extend(codes.chunks(2).map(|pair| (pair[0] & 15) | (pair.get(1).map_or(0, |high| high & 15) << 4))),
        _ => {
            let (mut waiting, mut held) = (0u32, 0);
            for &code in codes {
                waiting |= (u32::from(code) & ((1 << bits) - 1)) << held;
                held += bits;
                while held >= 8 {
                    packed.push(waiting as u8);
                    waiting >>= 8;
                    held -= 8;
                }
            }
            if held > 0 {
                packed.push(waiting as u8);
            }
        }
    }
}

/// The first `codes.len()` codes of `packed`.
///
/// # Panics
/// When `packed` is shorter than the codes.
pub fn unpack(packed: &[u8], bits: u32, codes: &mut [u8]) {
    assert!(8 * packed.len() >= codes.len() * bits as usize, "packed codes are shorter than the row");
    match bits {
        8 => codes.copy_from_slice(&packed[..codes.len()]),
        4 => {
            for (pair, byte) in codes.chunks_mut(2).zip(packed) {
                pair[0] = byte & 15;
                if let Some(high) = pair.get_mut(1) {
                    *high = byte >> 4;
                }
            }
        }
        _ => {
            let (mut waiting, mut held) = (0u32, 0);
            let mut bytes = packed.iter();
            for code in codes {
                while held < bits {
                    waiting |= u32::from(*bytes.next().expect("as many as was asserted")) << held;
                    held += 8;
                }
                *code = (waiting & ((1 << bits) - 1)) as u8;
                waiting >>= bits;
                held -= bits;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unpacking_undoes_packing(codes in proptest::collection::vec(any::<u8>(), 0..70), bits in 2u32..9) {
            let mut packed = Vec::new();
            pack(&codes, bits, &mut packed);
            prop_assert_eq!(packed.len(), (codes.len() * bits as usize).div_ceil(8));
            let mut back = vec![0; codes.len()];
            unpack(&packed, bits, &mut back);
            let kept: Vec<u8> = codes.iter().map(|c| c & (u8::MAX >> (8 - bits))).collect();
            prop_assert_eq!(back, kept);
        }
    }
}
