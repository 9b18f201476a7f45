//! The beginning of a GGUF file: metadata, and where tensors lie. Every length is held against the bytes that are left before
//! anything is made of it.

use std::collections::BTreeMap;

use super::types::TensorType;
use crate::error::Error;

/// What went wrong is a text, to which whoever opened the file adds its name.
type Result<T> = std::result::Result<T, String>;

/// Says what was found in the place of what.
fn expected(what: impl ToString, found: impl ToString, expected: impl ToString) -> String {
    Error::expected(what.to_string(), found.to_string(), expected.to_string()).to_string()
}

/// Bytes that tensors' places are multiples of where the metadata says nothing else.
const ALIGNMENT: usize = 32;

/// The largest alignment that is believed.
const MOST_ALIGNMENT: usize = 1 << 20;

/// Dimensions of a tensor, at most.
const MOST_DIMENSIONS: u32 = 4;

/// Values of an array that are kept.
const FEW: usize = 1024;

/// Arrays inside of arrays, at most.
const MOST_DEPTH: usize = 4;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A whole number that is not negative.
    Unsigned(u64),
    /// Any other whole number.
    Signed(i64),
    /// A number with a fraction.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// A text; where it is not UTF-8, with replacement characters.
    Text(String),
    /// Values of one type.
    Array(Vec<Value>),
    /// More than [`FEW`] values of one type, such as a tokenizer's, where they were not asked for.
    Long(usize),
}

impl Value {
    /// Returns the value as a whole number, if it is one of at least 0.
    pub fn as_usize(&self) -> Option<usize> {
        match self {
            Value::Unsigned(value) => usize::try_from(*value).ok(),
            Value::Signed(value) => usize::try_from(*value).ok(),
            _ => None,
        }
    }

    /// Returns the value as a number, if it is one.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Unsigned(value) => Some(*value as f64),
            Value::Signed(value) => Some(*value as f64),
            Value::Float(value) => Some(*value),
            _ => None,
        }
    }

    /// Returns the value as a truth value, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// Returns the values of an array, if it is one that was kept.
    pub fn as_array(&self) -> Option<&[Value]> {
        match self {
            Value::Array(values) => Some(values),
            _ => None,
        }
    }

    /// Returns the value as text, if it is that.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// A tensor, as the file lists it.
#[derive(Debug, Clone, PartialEq)]
pub struct ListedTensor {
    /// Its name in the file.
    pub name: String,
    /// Its dimensions, the last of which is the one whose elements lie side by side.
    pub shape: Vec<usize>,
    /// Its type.
    pub tensor_type: TensorType,
    /// Where it begins in the file, and ends.
    pub bytes: std::ops::Range<usize>,
}

/// What a file begins with.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Header {
    /// Values by their keys.
    pub metadata: BTreeMap<String, Value>,
    /// The keys in the file's order, and where each pair lies, from its key's length to the end of its value.
    pub pairs: Vec<(String, std::ops::Range<usize>)>,
    /// The tensors, in the file's order.
    pub tensors: Vec<ListedTensor>,
}

/// Reads what a file begins with.
///
/// # Errors
/// When it is no GGUF file of version 2 or 3, is cut short, or says what cannot be.
pub fn read(file: &[u8]) -> Result<Header> {
    read_with(Bytes { all: file, at: 0, keeps_long: false })
}

/// Reads what a file begins with, arrays of any length included.
///
/// # Errors
/// As [`read`].
pub fn read_all(file: &[u8]) -> Result<Header> {
    read_with(Bytes { all: file, at: 0, keeps_long: true })
}

fn read_with(mut bytes: Bytes) -> Result<Header> {
    let file = bytes.all;
    let magic = bytes.take(4)?;
    if magic != b"GGUF" {
        let found = String::from_utf8_lossy(magic).into_owned();
        return Err(expected("first bytes of the file", format!("{found:?}"), "\"GGUF\""));
    }
    let version = bytes.u32()?;
    if !matches!(version, 2 | 3) {
        let found = match version.swap_bytes() {
            2 | 3 => format!("{}, big-endian", version.swap_bytes()),
            _ => version.to_string(),
        };
        return Err(expected("version of GGUF", found, "2 or 3, little-endian"));
    }
    let (tensors, pairs) = (bytes.u64()?, bytes.u64()?);
    let (mut metadata, mut all) = (BTreeMap::new(), vec![]);
    // A pair takes 13 bytes at least, a tensor 24.
    for _ in 0..bytes.count(pairs, 13, "pairs of metadata")? {
        let start = bytes.at;
        let key = bytes.text()?;
        let kind = bytes.u32()?;
        let value = bytes.value(kind, 0).map_err(|e| format!("metadata '{key}': {e}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(expected("metadata", format!("key '{key}' twice"), "each key once"));
        }
        all.push((key, start..bytes.at));
    }
    let mut listed = Vec::new();
    for _ in 0..bytes.count(tensors, 24, "tensors")? {
        listed.push(bytes.tensor()?);
    }
    let alignment = match metadata.get("general.alignment") {
        None => ALIGNMENT,
        Some(value) => match value.as_usize() {
            Some(alignment) if alignment.is_power_of_two() && alignment <= MOST_ALIGNMENT => alignment,
            _ => return Err(expected("general.alignment", format!("{value:?}"), "a power of two")),
        },
    };
    let start = bytes.at.next_multiple_of(alignment);
    let tensors = listed.into_iter().map(|tensor| tensor.placed(start, alignment, file.len()));
    let tensors = tensors.collect::<Result<Vec<ListedTensor>>>()?;
    let mut in_order: Vec<&ListedTensor> = tensors.iter().filter(|tensor| !tensor.bytes.is_empty()).collect();
    in_order.sort_by_key(|tensor| tensor.bytes.start);
    if let Some([one, other]) = in_order.windows(2).find(|pair| pair[1].bytes.start < pair[0].bytes.end) {
        let found = format!("bytes {:?}, where tensor '{}' has {:?}", other.bytes, one.name, one.bytes);
        return Err(expected(format!("place of tensor '{}'", other.name), found, "bytes of its own"));
    }
    Ok(Header { metadata, pairs: all, tensors })
}

/// A tensor before it is known where data begin.
struct Unplaced {
    name: String,
    shape: Vec<usize>,
    tensor_type: TensorType,
    offset: u64,
}

impl Unplaced {
    fn placed(self, start: usize, alignment: usize, file: usize) -> Result<ListedTensor> {
        let Unplaced { name, shape, tensor_type, offset } = self;
        let (weights, bytes) = tensor_type.block();
        let row = shape.last().copied().unwrap_or(1);
        if !row.is_multiple_of(weights) {
            let multiple = format!("a multiple of {weights}, the weights of a block");
            return Err(expected(format!("length of the rows of tensor '{name}'"), row, multiple));
        }
        if matches!(tensor_type, TensorType::Blocks(_)) && shape.contains(&0) {
            return Err(expected(format!("shape of tensor '{name}'"), format!("{shape:?}"), "no dimension of 0"));
        }
        let elements = shape.iter().try_fold(1usize, |all, &n| all.checked_mul(n));
        let length = elements.and_then(|elements| (elements / weights).checked_mul(bytes));
        let first = usize::try_from(offset).ok().and_then(|offset| start.checked_add(offset));
        let end = first.zip(length).and_then(|(first, length)| first.checked_add(length)).filter(|end| *end <= file);
        let (Some(first), Some(end)) = (first, end) else {
            let found = format!("offset {offset} of shape {shape:?}");
            let place = format!("a place in the {} bytes behind the header", file.saturating_sub(start));
            return Err(expected(format!("place of tensor '{name}'"), found, place));
        };
        if !offset.is_multiple_of(alignment as u64) {
            let multiple = format!("a multiple of {alignment}, the file's alignment");
            return Err(expected(format!("offset of tensor '{name}'"), offset, multiple));
        }
        Ok(ListedTensor { name, shape, tensor_type, bytes: first..end })
    }
}

/// The bytes that have not been read.
struct Bytes<'a> {
    all: &'a [u8],
    at: usize,
    /// Whether arrays of more than [`FEW`] values are kept.
    keeps_long: bool,
}

impl<'a> Bytes<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.all.len());
        let Some(end) = end else {
            let left = self.all.len() - self.at;
            let what = format!("bytes at {} of the header", self.at);
            return Err(expected(what, format!("{left}, the file ends there"), count));
        };
        let taken = &self.all[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("as many bytes as were asked for"))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A number of things that take so many bytes each at least.
    fn count(&self, claimed: u64, least: usize, what: &str) -> Result<usize> {
        let most = (self.all.len() - self.at) / least;
        match usize::try_from(claimed).ok().filter(|count| *count <= most) {
            Some(count) => Ok(count),
            None => {
                Err(expected(format!("number of {what}"), claimed, format!("at most {most}, by the file's length")))
            }
        }
    }

    fn text(&mut self) -> Result<String> {
        let length = self.u64()?;
        let length = self.count(length, 1, "bytes of a text")?;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        let signed = |value: i64| if value < 0 { Value::Signed(value) } else { Value::Unsigned(value as u64) };
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            1 => signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => match self.array()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(expected("truth value", other, "0 or 1")),
            },
            8 => Value::Text(self.text()?),
            9 => {
                let (kind, count) = (self.u32()?, self.u64()?);
                let least = match kind {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    8 | 10..=12 => 8,
                    9 if depth < MOST_DEPTH => 12,
                    other => {
                        return Err(expected("type of an array's values", other, "0 to 12, and few arrays in arrays"));
                    }
                };
                let count = self.count(count, least, "an array's values")?;
                if count > FEW && !self.keeps_long {
                    let size = (kind != 8 && kind != 9).then_some(least);
                    match size {
                        Some(size) => _ = self.take(count * size)?,
                        None => (0..count).try_for_each(|_| self.value(kind, depth + 1).map(drop))?,
                    }
                    return Ok(Value::Long(count));
                }
                Value::Array((0..count).map(|_| self.value(kind, depth + 1)).collect::<Result<_>>()?)
            }
            10 => Value::Unsigned(self.u64()?),
            11 => signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(expected("type of a value", other, "0 to 12")),
        })
    }

    fn tensor(&mut self) -> Result<Unplaced> {
        let name = self.text()?;
        let dimensions = self.u32()?;
        if dimensions > MOST_DIMENSIONS {
            let most = format!("at most {MOST_DIMENSIONS}");
            return Err(expected(format!("dimensions of tensor '{name}'"), dimensions, most));
        }
        let mut shape = vec![];
        for _ in 0..dimensions {
            let length = self.u64()?;
            let length =
                usize::try_from(length).map_err(|_| expected(format!("length of tensor '{name}'"), length, "less"))?;
            shape.insert(0, length);
        }
        let number = self.u32()?;
        let tensor_type = TensorType::of(number).map_err(|e| format!("tensor '{name}': {e}"))?;
        Ok(Unplaced { name, shape, tensor_type, offset: self.u64()? })
    }
}
