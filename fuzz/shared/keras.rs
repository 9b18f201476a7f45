//! `.keras` archives that Keras did not write: those that it wrote, with the text or the weights in them changed, and the
//! archive's sums made right again, so that what is behind them is read.

use std::path::Path;

use layerstore::formats::{KERAS_ROOT, KerasSource, TensorSource};
use layerstore::layer::Accuracy;
use ndarray::{ArrayD, IxDyn};

use super::choices::Choices;

/// The parts of one archive, by name.
pub struct Archive(Vec<(String, Vec<u8>)>);

impl Archive {
    /// Reads an archive whose parts are stored as they are, as Keras writes them.
    ///
    /// # Panics
    /// When it is none.
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let number =
            |at: usize, length: usize| bytes[at..at + length].iter().rev().fold(0, |n, &b| n << 8 | usize::from(b));
        let end = bytes.windows(4).rposition(|w| w == b"PK\x05\x06").expect("an end of the archive's directory");
        let (count, mut entry) = (number(end + 10, 2), number(end + 16, 4));
        let mut parts = vec![];
        for _ in 0..count {
            assert_eq!((&bytes[entry..entry + 4], number(entry + 10, 2)), (&b"PK\x01\x02"[..], 0), "a stored entry");
            let (length, name, start) = (number(entry + 24, 4), number(entry + 28, 2), number(entry + 42, 4));
            let text = String::from_utf8_lossy(&bytes[entry + 46..entry + 46 + name]).into_owned();
            let data = start + 30 + number(start + 26, 2) + number(start + 28, 2);
            parts.push((text, bytes[data..data + length].to_vec()));
            entry += 46 + name + number(entry + 30, 2) + number(entry + 32, 2);
        }
        Archive(parts)
    }

    /// The archive with other bytes in some part, chosen by `choices`.
    pub fn changed(&self, choices: &mut Choices) -> Vec<u8> {
        let mut parts: Vec<(&str, Vec<u8>)> = self.0.iter().map(|(name, part)| (name.as_str(), part.clone())).collect();
        for _ in 0..=choices.below(2) {
            // Hardly ever the one that nobody reads.
            let at = if choices.below(32) == 0 { 0 } else { parts.len() - 1 - choices.below(2) };
            let part = &mut parts[at].1;
            match choices.below(3) {
                0 => change_number(choices, part),
                _ => choices.mutate(part),
            }
        }
        zipped(&parts)
    }
}

/// Another number in the place of one that is written in digits, where there is one.
fn change_number(choices: &mut Choices, text: &mut Vec<u8>) {
    let from = choices.below(text.len());
    let Some(start) = text.iter().skip(from).position(u8::is_ascii_digit).map(|at| at + from) else { return };
    let length = text[start..].iter().take_while(|b| b.is_ascii_digit()).count();
    let numbers = ["0", "1", "3", "-1", "65537", "4294967296", "18446744073709551615", "1e300", "null", "\"a\"", "[2]"];
    text.splice(start..start + length, numbers[choices.below(numbers.len())].bytes());
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 };
    !bytes.iter().fold(!0u32, |crc, &byte| (0..8).fold(crc ^ u32::from(byte), |crc, _| step(crc)))
}

fn zipped(parts: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let (mut bytes, mut directory) = (vec![], vec![]);
    for (name, part) in parts {
        let start = (bytes.len() as u32).to_le_bytes();
        // Version, flags, method, time and date; then the sum, both lengths, the name's length, and that of no more.
        let mut head = vec![20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0];
        head.extend(crc32(part).to_le_bytes());
        head.extend((part.len() as u32).to_le_bytes());
        head.extend((part.len() as u32).to_le_bytes());
        head.extend((name.len() as u16).to_le_bytes());
        head.extend([0, 0]);
        bytes.extend(b"PK\x03\x04");
        bytes.extend(&head);
        bytes.extend(name.bytes());
        bytes.extend(part);
        directory.extend(b"PK\x01\x02\x14\0");
        directory.extend(&head);
        directory.extend([0; 10]);
        directory.extend(start);
        directory.extend(name.bytes());
    }
    let count = (parts.len() as u16).to_le_bytes();
    let (length, start) = ((directory.len() as u32).to_le_bytes(), (bytes.len() as u32).to_le_bytes());
    bytes.extend(directory);
    bytes.extend(b"PK\x05\x06\0\0\0\0");
    bytes.extend(count);
    bytes.extend(count);
    bytes.extend(length);
    bytes.extend(start);
    bytes.extend([0, 0]);
    bytes
}

/// Opens the archive `bytes` through a file at `path`, and runs it where it is one; returns whether it is.
///
/// # Panics
/// When opening or running panics, or an error says nothing.
pub fn run(bytes: &[u8], path: &Path) -> bool {
    std::fs::write(path, bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let source = match KerasSource::open(path) {
        Ok(source) => source,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return false;
        }
    };
    assert!(!source.layers().is_empty());
    for (name, layer) in source.module().to_layers(KERAS_ROOT) {
        assert!(name.starts_with(KERAS_ROOT));
        let _id = layer.to_parts().id();
    }
    for shape in [&[1, 6, 8][..], &[2, 5], &[1, 8, 8, 3]] {
        let x = ArrayD::from_elem(IxDyn(shape), 1.0f32);
        let _y = source.module().forward(x.view(), Accuracy::Approximate).map_err(|e| e.to_string());
    }
    true
}
