//! Codes in 32-bit words.

/// Reads a tensor's bytes as words.
pub fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

/// Returns code `index` of `bits` of a run of codes without gaps: word `i` of the run is `word(i)`, and codes may lie in two of them.
pub fn dense(index: usize, bits: usize, word: impl Fn(usize) -> u32) -> u8 {
    let (first, shift) = (index * bits / 32, index * bits % 32);
    let low = word(first) >> shift;
    let high = if shift + bits > 32 { word(first + 1) << (32 - shift) } else { 0 };
    ((low | high) & mask(bits)) as u8
}

/// Returns code `index` of `bits` of a run of words that hold as many whole codes as fit.
pub fn whole(index: usize, bits: usize, word: impl Fn(usize) -> u32) -> u8 {
    let each = 32 / bits;
    (word(index / each) >> (index % each * bits) & mask(bits)) as u8
}

fn mask(bits: usize) -> u32 {
    (1 << bits) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_out_of_words() {
        let codes: Vec<u8> = (0..64u32).map(|i| ((i * 5 + 3) % 8) as u8).collect();
        let mut run = [0u32; 6];
        for (i, &code) in codes.iter().enumerate() {
            for bit in 0..3 {
                run[(3 * i + bit) / 32] |= u32::from(code >> bit & 1) << ((3 * i + bit) % 32);
            }
        }
        let found: Vec<u8> = (0..64).map(|i| dense(i, 3, |word| run[word])).collect();
        assert_eq!(found, codes);
        assert_eq!((0..4).map(|i| whole(i, 8, |_| 0x0403_0201)).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(whole(11, 3, |word| [0, 0b101_000][word]), 0b101);
    }
}
