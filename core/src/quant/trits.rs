//! Ternary codes as they are stored: five to a byte, 1.6 bits each.
//!
//! A byte is `c₀ + 3 c₁ + 9 c₂ + 27 c₃ + 81 c₄` for the codes 0, 1 and 2 of −1, 0 and 1, the earlier code first. A row
//! begins with a byte of its own; what fills its last byte up is 0.

use bytes::Bytes;
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Codes of a byte.
pub const TRITS: usize = 5;

/// Bytes that codes can make: 3⁵.
const VALUES: usize = 243;

/// Codes of two bits that a byte's five become.
const CRUMBS: [u16; VALUES] = {
    let mut all = [0; VALUES];
    let mut byte = 0;
    while byte < VALUES {
        let (mut rest, mut place) = (byte, 0);
        while place < TRITS {
            all[byte] |= ((rest % 3) as u16) << (2 * place);
            rest /= 3;
            place += 1;
        }
        byte += 1;
    }
    all
};

/// Rows of codes of two bits, each row padded to whole bytes, as they are stored.
pub fn to_trits(packed: &[u8], columns: usize) -> Vec<u8> {
    let (row_bytes, stored) = (columns.div_ceil(4), columns.div_ceil(TRITS));
    if columns == 0 {
        return vec![];
    }
    let mut out = vec![0; packed.len() / row_bytes * stored];
    let rows = packed.par_chunks(row_bytes).zip(out.par_chunks_mut(stored));
    rows.for_each(|(row, out)| {
        let code = |place: usize| match place < columns {
            true => (row[place / 4] >> (2 * (place % 4))) & 3,
            false => 0,
        };
        for (number, byte) in out.iter_mut().enumerate() {
            *byte = (0..TRITS).rev().fold(0, |sum, i| 3 * sum + code(TRITS * number + i));
        }
    });
    out
}

/// Returns what [`to_trits`] was given, from a cache line on.
///
/// # Errors
/// When a byte is none that codes make.
pub fn from_trits(stored: &[u8], rows: usize, columns: usize) -> Result<Bytes> {
    let (row_bytes, stored_row) = (columns.div_ceil(4), columns.div_ceil(TRITS));
    if let Some(place) = stored.iter().position(|&byte| usize::from(byte) >= VALUES) {
        let found = format!("{} at byte {place}", stored[place]);
        return Err(Error::expected("byte of five ternary codes", found, "at most 242"));
    }
    let mut packed: Vec<u8> = Vec::with_capacity(rows * row_bytes + 64);
    let start = packed.as_ptr().align_offset(64).min(64);
    packed.resize(start + rows * row_bytes, 0);
    let targets = packed[start..].par_chunks_mut(row_bytes.max(1));
    stored.par_chunks(stored_row.max(1)).zip(targets).for_each(|(from, to)| {
        // Four bytes are twenty codes, of five bytes.
        for (some, to) in from.chunks(4).zip(to.chunks_mut(5)) {
            let crumbs = some.iter().rev().fold(0, |all, &byte| all << 10 | u64::from(CRUMBS[usize::from(byte)]));
            to.copy_from_slice(&crumbs.to_le_bytes()[..to.len()]);
        }
        // Whatever filled the row's last byte up where it was stored.
        if let (Some(last), rest @ 1..) = (to.last_mut(), columns % 4) {
            *last &= (1 << (2 * rest)) - 1;
        }
    });
    Ok(Bytes::from(packed).slice(start..))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{pack, unpack};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn five_to_a_byte_and_back(rows in 0usize..4, columns in 0usize..67, seed in any::<u64>()) {
            let codes: Vec<u8> = (0..rows * columns).map(|i| ((seed.rotate_left(i as u32) ^ i as u64) % 3) as u8).collect();
            let mut packed = vec![];
            codes.chunks(columns.max(1)).for_each(|row| pack(row, 2, &mut packed));
            let stored = to_trits(&packed, columns);
            prop_assert_eq!(stored.len(), rows * columns.div_ceil(5));
            let back = from_trits(&stored, rows, columns).unwrap();
            prop_assert_eq!(&back[..], &packed[..]);
            let mut again = vec![0; columns];
            for (row, codes) in back.chunks(columns.div_ceil(4).max(1)).zip(codes.chunks(columns.max(1))) {
                unpack(row, 2, &mut again);
                prop_assert_eq!(&again[..], codes);
            }
        }
    }

    #[test]
    fn bytes_that_no_codes_make() {
        assert_eq!(to_trits(&[0b10_01_00_10, 0b01], 5), [2 + 9 + 2 * 27 + 81]);
        let message = from_trits(&[1, 243], 2, 4).unwrap_err().to_string();
        assert!(message.contains("243 at byte 1"), "{message}");
    }
}
