//! GGUF files, written: metadata, a list of tensors, then their bytes.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::header;
use super::types::TensorType;
use crate::error::{Error, Result};

/// Bytes that tensors' places are multiples of, unless the metadata say otherwise.
const ALIGNMENT: usize = 32;

/// Metadata, as they lie in a file.
#[derive(Debug, Clone, Default)]
pub struct Pairs {
    count: u64,
    bytes: Vec<u8>,
}

impl Pairs {
    /// Returns the metadata of a file without tensors, as they are.
    ///
    /// # Errors
    /// When it is none.
    pub fn of_file(file: &[u8]) -> std::result::Result<Self, String> {
        let header = header::read(file)?;
        let mut pairs = Pairs::default();
        for (_, bytes) in &header.pairs {
            pairs.count += 1;
            pairs.bytes.extend(&file[bytes.clone()]);
        }
        Ok(pairs)
    }

    fn pair(&mut self, key: &str, kind: u32) {
        self.count += 1;
        self.text_bytes(key);
        self.bytes.extend(kind.to_le_bytes());
    }

    fn text_bytes(&mut self, text: &str) {
        self.bytes.extend((text.len() as u64).to_le_bytes());
        self.bytes.extend(text.as_bytes());
    }

    /// Adds a whole number.
    pub fn number(&mut self, key: &str, value: usize) {
        self.pair(key, 4);
        self.bytes.extend(u32::try_from(value).unwrap_or(u32::MAX).to_le_bytes());
    }

    /// Adds a number with a fraction.
    pub fn float(&mut self, key: &str, value: f64) {
        self.pair(key, 6);
        self.bytes.extend((value as f32).to_le_bytes());
    }

    /// Adds a truth value.
    pub fn flag(&mut self, key: &str, value: bool) {
        self.pair(key, 7);
        self.bytes.push(value.into());
    }

    /// Adds a text.
    pub fn text(&mut self, key: &str, value: &str) {
        self.pair(key, 8);
        self.text_bytes(value);
    }

    /// Adds a list of texts.
    pub fn texts<'a>(&mut self, key: &str, values: impl ExactSizeIterator<Item = &'a str>) {
        self.pair(key, 9);
        self.bytes.extend(8u32.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        values.for_each(|value| self.text_bytes(value));
    }

    /// Adds a list of numbers with fractions.
    pub fn floats(&mut self, key: &str, values: &[f32]) {
        self.pair(key, 9);
        self.bytes.extend(6u32.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| self.bytes.extend(value.to_le_bytes()));
    }

    /// Adds a list of whole numbers.
    pub fn numbers(&mut self, key: &str, values: &[i32]) {
        self.pair(key, 9);
        self.bytes.extend(5u32.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| self.bytes.extend(value.to_le_bytes()));
    }

    /// Returns a file of these metadata, and no tensor.
    pub fn to_file(&self) -> Vec<u8> {
        self.beginning(0)
    }

    fn beginning(&self, tensors: usize) -> Vec<u8> {
        let mut all = b"GGUF".to_vec();
        all.extend(3u32.to_le_bytes());
        all.extend((tensors as u64).to_le_bytes());
        all.extend(self.count.to_le_bytes());
        all.extend(&self.bytes);
        all
    }
}

/// A tensor to write.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorToWrite {
    /// llama.cpp's name.
    pub name: String,
    /// Its dimensions, the last of which is the one whose elements lie side by side.
    pub shape: Vec<usize>,
    /// Its type.
    pub tensor_type: TensorType,
}

impl TensorToWrite {
    /// Returns the bytes that it takes.
    ///
    /// # Errors
    /// When rows are no whole blocks.
    pub fn byte_len(&self) -> Result<usize> {
        let (weights, bytes) = self.tensor_type.block();
        let elements = self.shape.iter().try_fold(1usize, |all, &n| all.checked_mul(n));
        let whole = self.shape.last().is_none_or(|row| row.is_multiple_of(weights));
        elements.filter(|_| whole).and_then(|elements| (elements / weights).checked_mul(bytes)).ok_or_else(|| {
            let found = format!("{:?} of {:?}", self.shape, self.tensor_type);
            Error::expected(format!("shape of tensor '{}'", self.name), found, "rows of whole blocks")
        })
    }
}

/// Writes a file of these tensors; `read` gives the bytes of one after another.
///
/// # Errors
/// That of `read`, or when the file cannot be written.
pub fn write(
    path: &Path,
    pairs: &Pairs,
    tensors: &[TensorToWrite],
    mut read: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let alignment = alignment(pairs)?;
    let mut beginning = pairs.beginning(tensors.len());
    let mut offset = 0usize;
    for tensor in tensors {
        beginning.extend((tensor.name.len() as u64).to_le_bytes());
        beginning.extend(tensor.name.as_bytes());
        beginning.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|length| beginning.extend((*length as u64).to_le_bytes()));
        let number = tensor.tensor_type.number().ok_or_else(|| {
            let what = format!("type of tensor '{}'", tensor.name);
            Error::expected(what, format!("{:?}", tensor.tensor_type), "one that GGUF has")
        })?;
        beginning.extend(number.to_le_bytes());
        beginning.extend((offset as u64).to_le_bytes());
        offset = (offset + tensor.byte_len()?).next_multiple_of(alignment);
    }
    beginning.resize(beginning.len().next_multiple_of(alignment), 0);
    let failed = |e| Error::io(path, e);
    let mut file = BufWriter::new(File::create(path).map_err(failed)?);
    file.write_all(&beginning).map_err(failed)?;
    for (place, tensor) in tensors.iter().enumerate() {
        let bytes = read(place)?;
        let expected = tensor.byte_len()?;
        if bytes.len() != expected {
            return Err(Error::expected(format!("bytes of tensor '{}'", tensor.name), bytes.len(), expected));
        }
        file.write_all(&bytes).map_err(failed)?;
        let padding = expected.next_multiple_of(alignment) - expected;
        file.write_all(&vec![0; padding]).map_err(failed)?;
    }
    file.flush().map_err(failed)
}

fn alignment(pairs: &Pairs) -> Result<usize> {
    let wrong = |e| Error::expected("metadata to write", e, "those of GGUF");
    let header = header::read(&pairs.to_file()).map_err(wrong)?;
    Ok(header.metadata.get("general.alignment").and_then(header::Value::as_usize).unwrap_or(ALIGNMENT))
}
