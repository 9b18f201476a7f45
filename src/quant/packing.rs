//! Two 4-bit codes to a byte, the earlier one in the low nibble.

/// Packs codes (their low four bits); an odd count leaves the last high nibble zero.
pub fn pack_nibbles(codes: &[u8], packed: &mut Vec<u8>) {
    packed.extend(codes.chunks(2).map(|pair| (pair[0] & 0x0f) | (pair.get(1).map_or(0, |high| high & 0x0f) << 4)));
}

/// The first `codes.len()` codes of `packed`, each 0 to 15.
///
/// # Panics
/// When `packed` is shorter than `codes.len().div_ceil(2)` bytes.
pub fn unpack_nibbles(packed: &[u8], codes: &mut [u8]) {
    assert!(packed.len() >= codes.len().div_ceil(2), "packed codes are shorter than the row");
    for (pair, byte) in codes.chunks_mut(2).zip(packed) {
        pair[0] = byte & 0x0f;
        if let Some(high) = pair.get_mut(1) {
            *high = byte >> 4;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unpacking_undoes_packing(codes in proptest::collection::vec(0u8..16, 0..40)) {
            let mut packed = Vec::new();
            pack_nibbles(&codes, &mut packed);
            prop_assert_eq!(packed.len(), codes.len().div_ceil(2));
            let mut back = vec![0; codes.len()];
            unpack_nibbles(&packed, &mut back);
            prop_assert_eq!(back, codes);
        }
    }
}
