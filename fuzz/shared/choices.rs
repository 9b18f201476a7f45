//! Choices read from a fuzzer's bytes.

/// Bytes that say what to do next. When they end, every further choice is 0.
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    /// Returns the choices that `bytes` make.
    pub fn new(bytes: &'a [u8]) -> Self {
        Choices(bytes)
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((&first, rest)) => {
                self.0 = rest;
                first
            }
            None => 0,
        }
    }

    /// A number below `n`, of one byte where that is enough, else of four; 0 where `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        let value = match n {
            0..=256 => usize::from(self.byte()),
            _ => u32::from_le_bytes(std::array::from_fn(|_| self.byte())) as usize,
        };
        value.checked_rem(n).unwrap_or(0)
    }

    /// Any number.
    #[allow(dead_code)] // Not every harness draws numbers.
    pub fn number(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// Changes some bytes: flips one, overwrites a few, cuts the end off, adds to it, or repeats a piece.
    pub fn mutate(&mut self, bytes: &mut Vec<u8>) {
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            match self.below(6) {
                0 => bytes.iter_mut().skip(at).take(1).for_each(|b| *b ^= 1 << self.below(8)),
                1 => {
                    let count = 1 + self.below(8);
                    bytes.iter_mut().skip(at).take(count).for_each(|b| *b = self.byte());
                }
                2 => {
                    let fill = [0, 0xff, 0x7f, 0x80][self.below(4)];
                    let count = [1, 2, 4, 8][self.below(4)];
                    bytes.iter_mut().skip(at).take(count).for_each(|b| *b = fill);
                }
                3 => bytes.truncate(at),
                4 => {
                    let more = 1 + self.below(16);
                    bytes.extend((0..more).map(|_| self.byte()));
                }
                _ => {
                    let end = (at + 1 + self.below(64)).min(bytes.len());
                    let piece = bytes[at.min(end)..end].to_vec();
                    let to = self.below(bytes.len());
                    bytes.splice(to..to, piece);
                }
            }
        }
    }
}
