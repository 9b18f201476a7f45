//! The tables: their names, and their Arrow schemas in the format version that brought them. What later versions add is in
//! `format.rs`.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};

/// The catalogue: which artifact is which model's which layer.
pub const LAYERS: &str = "layers";
/// The list of complete artifacts.
pub const ARTIFACTS: &str = "artifacts";
/// Rows of weight matrices, in format 1.
pub const WEIGHTS: &str = "weights";
/// Small arrays by name.
pub const TENSORS: &str = "tensors";
/// Consecutive rows of weight matrices.
pub const WEIGHT_BLOCKS: &str = "weight_blocks";
/// Consecutive vectors of codes.
pub const CODE_BLOCKS: &str = "code_blocks";
/// Consecutive codewords.
pub const CODEBOOK_BLOCKS: &str = "codebook_blocks";

/// A data table, by what its rows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Table {
    /// Keys of this length.
    Keys(usize),
    /// Values of this length.
    Values(usize),
    /// Codewords of this length.
    Codebooks(usize),
    /// Vectors of this many codes.
    Codes(usize),
    /// Components of this length.
    Factors(usize),
    /// Rows of weight matrices, in format 1.
    Weights,
    /// Small arrays by name.
    Tensors,
    /// Consecutive rows of weight matrices.
    WeightBlocks,
    /// Consecutive vectors of codes.
    CodeBlocks,
    /// Consecutive codewords.
    CodebookBlocks,
}

impl Table {
    /// Returns the table's name: its directory less `.lance`.
    pub fn name(self) -> String {
        match self {
            Table::Keys(d) => format!("keys_d{d}"),
            Table::Values(d) => format!("values_d{d}"),
            Table::Codebooks(d) => format!("codebooks_d{d}"),
            Table::Codes(m) => format!("codes_m{m}"),
            Table::Factors(d) => format!("factors_d{d}"),
            Table::Weights => WEIGHTS.into(),
            Table::Tensors => TENSORS.into(),
            Table::WeightBlocks => WEIGHT_BLOCKS.into(),
            Table::CodeBlocks => CODE_BLOCKS.into(),
            Table::CodebookBlocks => CODEBOOK_BLOCKS.into(),
        }
    }

    /// Returns the table of that name, if it is one.
    pub fn named(name: &str) -> Option<Table> {
        match name {
            WEIGHTS => return Some(Table::Weights),
            TENSORS => return Some(Table::Tensors),
            WEIGHT_BLOCKS => return Some(Table::WeightBlocks),
            CODE_BLOCKS => return Some(Table::CodeBlocks),
            CODEBOOK_BLOCKS => return Some(Table::CodebookBlocks),
            _ => {}
        }
        let (kind, width) = name.split_once("_d").or_else(|| name.split_once("_m"))?;
        let width: usize = width.parse().ok()?;
        let table = match kind {
            "keys" => Table::Keys(width),
            "values" => Table::Values(width),
            "codebooks" => Table::Codebooks(width),
            "codes" => Table::Codes(width),
            "factors" => Table::Factors(width),
            _ => return None,
        };
        (table.name() == name).then_some(table)
    }

    /// Returns whether a row of the table holds consecutive rows of a matrix.
    pub fn is_blocks(self) -> bool {
        matches!(self, Table::WeightBlocks | Table::CodeBlocks | Table::CodebookBlocks)
    }

    /// Returns the columns of the format version that brought the table.
    pub fn schema(self) -> SchemaRef {
        let mut fields = vec![plain(artifact())];
        fields.extend(match self {
            Table::Keys(d) => vec![number("key"), plain(required("scale", DataType::Float32)), vector("vector", d)],
            Table::Values(d) => vec![number("key"), vector("vector", d)],
            Table::Codebooks(d) => vec![text("role"), number("subspace"), number("code"), vector("vector", d)],
            Table::Codes(m) => vec![text("role"), number("key"), fixed_list("codes", DataType::UInt8, m)],
            Table::Factors(d) => vec![
                text("side"),
                number("component"),
                plain(required("singular_value", DataType::Float32)),
                vector("vector", d),
            ],
            Table::Weights => vec![number("row"), bytes("packed"), bytes("scales"), bytes("zeros")],
            Table::Tensors => vec![
                text("name"),
                text("dtype"),
                // As JSON: a list column does not lie plainly.
                text("shape"),
                large_bytes("data"),
            ],
            Table::WeightBlocks => vec![
                number("first_row"),
                number("rows"),
                large_bytes("packed"),
                large_bytes("scales"),
                large_bytes("zeros"),
            ],
            Table::CodeBlocks => vec![text("role"), number("first_row"), number("rows"), large_bytes("codes")],
            Table::CodebookBlocks => {
                vec![text("role"), number("subspace"), number("first_row"), number("rows"), large_bytes("codewords")]
            }
        });
        Arc::new(Schema::new(fields))
    }
}

/// Returns the catalogue's columns in format version 1.
pub fn layers() -> SchemaRef {
    let key = |field: Field, position: &str| {
        let metadata =
            HashMap::from([("lance-schema:unenforced-primary-key:position".to_owned(), position.to_owned())]);
        field.with_metadata(metadata)
    };
    let fields = vec![
        artifact(),
        key(required("model", DataType::Utf8), "1"),
        key(required("layer", DataType::Utf8), "2"),
        required("method", DataType::Utf8),
        required("in_features", DataType::UInt64),
        required("out_features", DataType::UInt64),
        required("config", DataType::Utf8),
        required("source", DataType::Utf8),
        required("dense_bytes", DataType::UInt64),
        required("stored_bytes", DataType::UInt64),
        Field::new("relative_error", DataType::Float64, true),
        required("error_basis", DataType::Utf8),
        required("created_at", time()),
        required("places", DataType::Utf8),
    ];
    Arc::new(Schema::new(fields))
}

/// Returns the columns of the list of complete artifacts in format version 1.
pub fn artifacts() -> SchemaRef {
    Arc::new(Schema::new(vec![
        artifact(),
        required("method", DataType::Utf8),
        required("config", DataType::Utf8),
        required("places", DataType::Utf8),
        required("stored_bytes", DataType::UInt64),
        required("recipe", DataType::FixedSizeBinary(32)),
        Field::new("relative_error", DataType::Float64, true),
        required("error_basis", DataType::Utf8),
        required("created_at", time()),
    ]))
}

fn artifact() -> Field {
    required("artifact", DataType::FixedSizeBinary(32))
}

fn required(name: &str, kind: DataType) -> Field {
    Field::new(name, kind, false)
}

fn time() -> DataType {
    DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
}

// Child fields are required too: nullable ones take a slow path through Lance.
fn fixed_list(name: &str, item: DataType, length: usize) -> Field {
    let length = i32::try_from(length).unwrap_or(i32::MAX);
    plain(required(name, DataType::FixedSizeList(Arc::new(required("item", item)), length)))
}

fn vector(name: &str, length: usize) -> Field {
    fixed_list(name, DataType::Float32, length)
}

fn number(name: &str) -> Field {
    plain(required(name, DataType::UInt32))
}

fn text(name: &str) -> Field {
    plain(required(name, DataType::Utf8))
}

fn bytes(name: &str) -> Field {
    plain(required(name, DataType::Binary))
}

/// A column of bytes whose offsets have 64 bits, so that rows read together may be of any size.
fn large_bytes(name: &str) -> Field {
    plain(required(name, DataType::LargeBinary))
}

/// Returns a column whose values lie one after another as they are, so that a layer's are one read. The vectors and packed
/// numbers that make up nearly all of a table would not compress, and the rest is too small to matter.
fn plain(field: Field) -> Field {
    let settings = [
        ("lance-encoding:structural-encoding", "fullzip"),
        ("lance-encoding:compression", "none"),
        // The smallest that Lance takes: no dictionaries.
        ("lance-encoding:dict-size-ratio", "1e-9"),
    ];
    let settings = settings.map(|(key, value)| (key.to_owned(), value.to_owned()));
    field.with_metadata(HashMap::from(settings))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_tables() {
        for table in [
            Table::Keys(3),
            Table::Values(4),
            Table::Codebooks(5),
            Table::Codes(6),
            Table::Factors(7),
            Table::Weights,
            Table::Tensors,
            Table::WeightBlocks,
            Table::CodeBlocks,
            Table::CodebookBlocks,
        ] {
            assert_eq!(Table::named(&table.name()), Some(table));
        }
        for other in ["layers", "artifacts", "keys_d", "keys_d03", "keys_m3", "codes_d4", "notes", "x_d4"] {
            assert_eq!(Table::named(other), None, "{other}");
        }
    }
}
