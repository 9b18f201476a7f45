//! What the rows of keys and values are kept as.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{IntoDeserializer, MapAccess, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::product::ProductFormat;

/// What the numbers of a row are kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowType {
    /// Single precision, as they come.
    #[default]
    F32,
    /// Half precision.
    F16,
    /// −127 … 127, times a scale of the row's own.
    Int8,
}

impl RowType {
    /// Returns the bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            RowType::F32 => 4,
            RowType::F16 => 2,
            RowType::Int8 => 1,
        }
    }
}

/// What the rows of a matrix are kept as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RowFormat {
    /// Each number by itself.
    Plain(RowType),
    /// Codes of a product quantiser.
    Product(ProductFormat),
}

impl Default for RowFormat {
    fn default() -> Self {
        RowFormat::Plain(RowType::F32)
    }
}

impl Serialize for RowFormat {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match self {
            RowFormat::Plain(kind) => kind.serialize(serializer),
            RowFormat::Product(format) => TaggedFormat::Pq(*format).serialize(serializer),
        }
    }
}

/// A name, or `{ type = "pq", … }`.
impl<'de> Deserialize<'de> for RowFormat {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = RowFormat;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(r#""f32", "f16", "int8" or a table { type = "pq" }"#)
            }
            fn visit_str<E: serde::de::Error>(self, name: &str) -> std::result::Result<RowFormat, E> {
                let plain = RowType::deserialize(name.into_deserializer()).map(RowFormat::Plain);
                plain.map_err(|_: E| E::invalid_value(Unexpected::Str(name), &self))
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<RowFormat, A::Error> {
                TaggedFormat::deserialize(MapAccessDeserializer::new(map))
                    .map(|TaggedFormat::Pq(format)| RowFormat::Product(format))
                    .map_err(|e| match e.to_string() {
                        of if of.starts_with("unknown variant") => {
                            serde::de::Error::custom(format!("{of}; other formats are written without a table"))
                        }
                        _ => e,
                    })
            }
        }
        deserializer.deserialize_any(Either)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum TaggedFormat {
    Pq(ProductFormat),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_names_or_tables() {
        let read = |text: &str| serde_json::from_str::<RowFormat>(text);
        assert_eq!(read(r#""int8""#).unwrap(), RowFormat::Plain(RowType::Int8));
        let product = RowFormat::Product(ProductFormat { subvectors: 4, ..ProductFormat::default() });
        assert_eq!(read(r#"{"type":"pq","subvectors":4}"#).unwrap(), product);
        assert_eq!(read(&serde_json::to_string(&product).unwrap()).unwrap(), product);
        for (text, says) in [
            (r#""int3""#, r#"string "int3", expected "f32", "f16", "int8" or a table { type = "pq" }"#),
            (r#""pq""#, r#"a table { type = "pq" }"#),
            (r#"{"type":"int8"}"#, "without a table"),
            (r#"{"type":"opq"}"#, "pq"),
            (r#"{"type":"pq","words":3}"#, "codewords"),
            ("7", "a table"),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
        }
    }
}
