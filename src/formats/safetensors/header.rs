//! The header of a safetensors file, read strictly: what is given twice is refused, since readers differ in which they take.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::marker::PhantomData;

use safetensors::SafeTensors;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::super::regular;
use crate::layer::DType;

/// A tensor as a header has it.
pub struct HeaderTensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// Where its bytes begin in the file.
    pub start: usize,
    pub end: usize,
}

/// What a header says.
pub struct Header {
    pub tensors: Vec<HeaderTensor>,
    pub metadata: BTreeMap<String, String>,
}

/// A JSON object, its entries in order; one that has a key twice is refused.
pub struct Unique<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Entries<V> {
            type Value = Unique<V>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                unique_entries(map, |map, _| map.next_value()).map(Unique)
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

/// Reads the entries of an object, the value of each by `read`. An error names the entry; a key that comes twice is one.
fn unique_entries<'de, A: MapAccess<'de>, V>(
    mut map: A,
    read: impl Fn(&mut A, &str) -> Result<V, A::Error>,
) -> Result<Vec<(String, V)>, A::Error> {
    let (mut entries, mut seen) = (Vec::new(), HashSet::new());
    while let Some(key) = map.next_key::<String>()? {
        if !seen.insert(key.clone()) {
            return Err(A::Error::custom(format!("'{key}' is given twice")));
        }
        let value = read(&mut map, &key);
        let value = value.map_err(|e| A::Error::custom(format!("entry '{key}' is malformed: {e}")))?;
        entries.push((key, value));
    }
    Ok(entries)
}

/// An entry of the header: the metadata, or where a tensor lies. The crate looks at the rest.
enum Entry {
    Metadata,
    Tensor { start: u64, end: u64 },
}

struct Entries(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All;
        /// A field that is given twice is an error of the derived code.
        #[derive(Deserialize)]
        struct Claim {
            #[serde(rename = "dtype")]
            _dtype: IgnoredAny,
            #[serde(rename = "shape")]
            _shape: IgnoredAny,
            data_offsets: (u64, u64),
        }
        impl<'de> Visitor<'de> for All {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                let entry = |map: &mut A, key: &str| match key {
                    "__metadata__" => map.next_value::<Option<Unique<String>>>().map(|_| Entry::Metadata),
                    _ => map.next_value::<Claim>().map(|claim| {
                        let (start, end) = claim.data_offsets;
                        Entry::Tensor { start, end }
                    }),
                };
                unique_entries(map, entry).map(Entries)
            }
        }
        deserializer.deserialize_map(All)
    }
}

/// Reads and checks the header of a whole file.
///
/// # Errors
/// The reason why it cannot be used.
pub fn read(bytes: &[u8]) -> Result<Header, String> {
    let size = bytes.len();
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(format!("the file has {size} bytes; a safetensors file has at least 8"));
    };
    let length = u64::from_le_bytes(*length);
    let Some(header) = usize::try_from(length).ok().and_then(|n| rest.get(..n)) else {
        return Err(match regular::taken_for_safetensors(bytes) {
            Some(what) => format!("the file is {what}; expected safetensors"),
            None => format!(
                "the header claims {length} bytes in a file of {size}: the file is truncated, or not safetensors"
            ),
        });
    };
    let Entries(entries) = serde_json::from_slice(header).map_err(|e| match e.is_data() {
        true => format!("in the header, {e}"),
        false => format!("the header is not JSON: {e}"),
    })?;
    // The library adds offsets without a check for overflow, so hold them to the file first.
    let data = (rest.len() - header.len()) as u64;
    for (name, entry) in &entries {
        if let Entry::Tensor { start, end } = entry
            && (start > end || *end > data)
        {
            return Err(format!(
                "tensor '{name}' lies at bytes {start} to {end}, but the file holds {data} bytes of data"
            ));
        }
    }
    let parsed = SafeTensors::deserialize(bytes).map_err(|e| format!("not a valid safetensors file: {e}"))?;
    let mut tensors = Vec::with_capacity(parsed.len());
    for (name, view) in parsed.iter() {
        // A zero in a shape hides what the other numbers come to.
        let size = view.shape().iter().filter(|n| **n > 0).try_fold(8usize, |n, &d| n.checked_mul(d));
        if size.is_none() {
            return Err(format!("tensor '{name}' has shape {:?}, which overflows", view.shape()));
        }
        let start = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
        debug_assert!(start >= 8 + header.len() || view.data().is_empty());
        tensors.push(HeaderTensor {
            name: name.to_owned(),
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            start,
            end: start + view.data().len(),
        });
    }
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
    Ok(Header { tensors, metadata: metadata.metadata().clone().unwrap_or_default().into_iter().collect() })
}
