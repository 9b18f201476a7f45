//! Rows of the catalogue and of the table of artifacts, to and from Arrow.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, FixedSizeBinaryArray, Float64Array, RecordBatch, StringArray, TimestampMicrosecondArray,
    UInt64Array,
};
use arrow::datatypes::{Float64Type, TimestampMicrosecondType, UInt64Type};
use chrono::{DateTime, Utc};
use layerstore_core::layer::{bits_per_weight, registry};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::row_locations::{LOCATIONS, LocationsText, RowLocations};
use super::schema;
use crate::error::{Error, Result};
use crate::layer::{ArtifactId, MethodName, StoredAs};

/// The entry of a layer's config that says what was adapted to the layer, in a list of texts.
pub const ADAPTED: &str = "adapted";

/// What a relative error was measured over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorBasis {
    /// ‖ŷ − y‖ / ‖y‖ over inputs, bias left out.
    Activations,
    /// ‖Ŵ − W‖_F / ‖W‖_F.
    Weights,
}

impl ErrorBasis {
    /// Returns the name in tables and JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorBasis::Activations => "activations",
            ErrorBasis::Weights => "weights",
        }
    }
}

/// Where a tensor of a layer came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceTensor {
    /// The tensor's name in its checkpoint.
    pub tensor: String,
    /// Its safetensors dtype.
    pub dtype: String,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// BLAKE3 of dtype, shape and bytes, in hex.
    pub hash: String,
    /// How it lies in the tensor that the checkpoint holds, where that is another, or laid out in another way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_as: Option<StoredAs>,
}

/// Where a layer came from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Source {
    /// The checkpoint's file name.
    pub file: String,
    /// The layer's tensor, then its bias where it has one.
    pub tensors: Vec<SourceTensor>,
    /// The checkpoint's own metadata.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

/// A layer's full name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct LayerName {
    /// The model.
    pub model: String,
    /// The layer's name within it.
    pub layer: String,
}

/// One row of the catalogue: a layer of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerRecord {
    /// The model that the layer belongs to.
    pub model: String,
    /// The layer's name within its model.
    pub layer: String,
    /// How the layer is compressed.
    pub method: MethodName,
    /// Inputs of the layer: the product of all dimensions of its tensor but the first.
    pub in_features: u64,
    /// Outputs of the layer: the first dimension of its tensor.
    pub out_features: u64,
    /// The artifact that holds the layer's arrays.
    #[serde(serialize_with = "hex")]
    pub artifact: ArtifactId,
    /// How far the layer is from the dense one; `None` where no finite number describes it.
    pub relative_error: Option<f64>,
    /// What the error was measured over.
    pub error_basis: ErrorBasis,
    /// Bytes of the layer's tensors in its checkpoint.
    pub dense_bytes: u64,
    /// Bytes of the artifact's arrays.
    pub stored_bytes: u64,
    /// The artifact's settings, and how the layer runs.
    pub config: Value,
    /// The checkpoint and the tensors that the layer came from.
    pub source: Source,
    /// When the row was made.
    pub created_at: DateTime<Utc>,
    /// Where the artifact's rows are. The store fills this in when the row is committed.
    #[serde(skip)]
    pub locations: RowLocations,
}

fn hex<S: serde::Serializer>(id: &ArtifactId, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

/// Returns what a config says was adapted to its layer.
pub fn adapted(config: &Value) -> Vec<String> {
    let all = config[ADAPTED].as_array().map_or(&[][..], Vec::as_slice);
    all.iter().filter_map(|note| note.as_str().map(str::to_owned)).collect()
}

impl LayerRecord {
    /// Returns what was adapted to the layer when it was made: settings that did not fit it, and inputs that were not used.
    pub fn notes(&self) -> Vec<String> {
        adapted(&self.config)
    }

    /// Returns what the list of artifacts would say of the layer's artifact, with its own name as its recipe and the layer's
    /// settings, which may be more than the artifact's.
    pub(super) fn artifact_record(&self) -> ArtifactRecord {
        ArtifactRecord {
            artifact: self.artifact,
            method: self.method.clone(),
            config: self.config.clone(),
            locations: self.locations.clone(),
            stored_bytes: self.stored_bytes,
            recipe: self.artifact.0,
            relative_error: self.relative_error,
            error_basis: self.error_basis,
            created_at: self.created_at,
        }
    }

    /// Returns the bits that the layer is stored in for each weight: those of all its arrays, the bias included. `None` for layers
    /// that stand for no weight matrix.
    pub fn bits_per_weight(&self) -> Option<f64> {
        weight_bits(&self.method, self.stored_bytes, (self.out_features, self.in_features))
    }

    /// Returns whether both say the same of the layer, time and row locations aside.
    pub(crate) fn same_as(&self, other: &LayerRecord) -> bool {
        *self == LayerRecord { created_at: self.created_at, locations: self.locations.clone(), ..other.clone() }
    }
}

/// Returns the bits of each weight of a layer of this method and shape; `None` where the method's layers stand for none.
pub(crate) fn weight_bits(
    method: &MethodName,
    stored_bytes: u64,
    (out_features, in_features): (u64, u64),
) -> Option<f64> {
    let bits = bits_per_weight(stored_bytes, out_features, in_features);
    bits.filter(|_| registry::is_linear(method))
}

/// One row of the table of artifacts: its data rows are all there.
#[derive(Debug, Clone, PartialEq)]
pub struct ArtifactRecord {
    /// The artifact's name.
    pub artifact: ArtifactId,
    /// How it is compressed.
    pub method: MethodName,
    /// What is needed to read its arrays.
    pub config: Value,
    /// Where its rows are.
    pub locations: RowLocations,
    /// Bytes of its arrays.
    pub stored_bytes: u64,
    /// What it was made from and how: BLAKE3 of source, settings and calibration inputs.
    pub recipe: [u8; 32],
    /// How far it is from its source, as measured when it was made.
    pub relative_error: Option<f64>,
    /// What the error was measured over.
    pub error_basis: ErrorBasis,
    /// When it was written.
    pub created_at: DateTime<Utc>,
}

fn ids<'a>(names: impl Iterator<Item = &'a [u8]> + Clone) -> Result<ArrayRef> {
    // try_from_iter cannot tell the width of nothing.
    let array = if names.clone().next().is_none() {
        FixedSizeBinaryArray::try_new(32, Default::default(), None)
    } else {
        FixedSizeBinaryArray::try_from_iter(names)
    };
    array.map(|a| Arc::new(a) as ArrayRef).map_err(|e| Error::Numeric(e.to_string()))
}

fn strings<'a>(values: impl Iterator<Item = &'a str>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

fn numbers(values: impl Iterator<Item = u64>) -> ArrayRef {
    Arc::new(UInt64Array::from_iter_values(values))
}

fn times(values: impl Iterator<Item = DateTime<Utc>>) -> ArrayRef {
    Arc::new(TimestampMicrosecondArray::from_iter_values(values.map(|t| t.timestamp_micros())).with_timezone("UTC"))
}

fn json_texts<'a, T: Serialize + 'a>(values: impl Iterator<Item = &'a T>) -> Result<ArrayRef> {
    let texts = values.map(json_text).collect::<Result<Vec<String>>>()?;
    Ok(strings(texts.iter().map(String::as_str)))
}

fn json_text(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::Numeric(format!("the record is no JSON: {e}")))
}

/// Bytes of the texts in a batch: few enough that 32-bit offsets address them, also where Lance joins some batches.
const BATCH_BYTES: usize = 64 << 20;

/// The most bytes of a row's texts.
const ROW_BYTES: usize = i32::MAX as usize;

/// Splits records so that the texts of those that go together have `most` bytes, unless a single one has more.
fn split<R>(records: &[R], most: usize, text_bytes: impl Fn(&R) -> Result<usize>) -> Result<Vec<&[R]>> {
    let (mut all, mut start, mut bytes) = (vec![], 0, 0);
    for (row, record) in records.iter().enumerate() {
        let more = text_bytes(record)?;
        if more > ROW_BYTES {
            return Err(Error::expected("bytes of the texts in a row", more, format!("at most {ROW_BYTES}")));
        }
        if row > start && bytes + more > most {
            all.push(&records[start..row]);
            (start, bytes) = (row, 0);
        }
        bytes += more;
    }
    all.push(&records[start..]);
    Ok(all)
}

fn json_bytes(value: &impl Serialize) -> Result<usize> {
    json_text(value).map(|text| text.len())
}

/// Returns catalogue rows as batches, one at least.
///
/// # Errors
/// When a record's texts are longer than 2³¹ − 1 bytes.
pub fn layers_batches(records: &[LayerRecord]) -> Result<Vec<RecordBatch>> {
    layers_of(records, BATCH_BYTES)
}

fn layers_of(records: &[LayerRecord], most: usize) -> Result<Vec<RecordBatch>> {
    let text_bytes = |r: &LayerRecord| {
        let names = r.model.len() + r.layer.len() + r.method.as_str().len();
        Ok(names + json_bytes(&r.config)? + json_bytes(&r.source)? + json_bytes(&r.locations)?)
    };
    split(records, most, text_bytes)?.into_iter().map(layers_batch).collect()
}

/// Returns rows of the table of artifacts as batches, one at least.
///
/// # Errors
/// As [`layers_batches`].
pub fn artifacts_batches(records: &[ArtifactRecord]) -> Result<Vec<RecordBatch>> {
    let text_bytes =
        |r: &ArtifactRecord| Ok(r.method.as_str().len() + json_bytes(&r.config)? + json_bytes(&r.locations)?);
    split(records, BATCH_BYTES, text_bytes)?.into_iter().map(artifacts_batch).collect()
}

fn layers_batch(records: &[LayerRecord]) -> Result<RecordBatch> {
    let columns = vec![
        ids(records.iter().map(|r| r.artifact.0.as_slice()))?,
        strings(records.iter().map(|r| r.model.as_str())),
        strings(records.iter().map(|r| r.layer.as_str())),
        strings(records.iter().map(|r| r.method.as_str())),
        numbers(records.iter().map(|r| r.in_features)),
        numbers(records.iter().map(|r| r.out_features)),
        json_texts(records.iter().map(|r| &r.config))?,
        json_texts(records.iter().map(|r| &r.source))?,
        numbers(records.iter().map(|r| r.dense_bytes)),
        numbers(records.iter().map(|r| r.stored_bytes)),
        Arc::new(Float64Array::from_iter(records.iter().map(|r| r.relative_error))),
        strings(records.iter().map(|r| r.error_basis.as_str())),
        times(records.iter().map(|r| r.created_at)),
        json_texts(records.iter().map(|r| &r.locations))?,
    ];
    RecordBatch::try_new(schema::layers(), columns).map_err(|e| Error::Numeric(e.to_string()))
}

fn artifacts_batch(records: &[ArtifactRecord]) -> Result<RecordBatch> {
    let columns = vec![
        ids(records.iter().map(|r| r.artifact.0.as_slice()))?,
        strings(records.iter().map(|r| r.method.as_str())),
        json_texts(records.iter().map(|r| &r.config))?,
        json_texts(records.iter().map(|r| &r.locations))?,
        numbers(records.iter().map(|r| r.stored_bytes)),
        ids(records.iter().map(|r| r.recipe.as_slice()))?,
        Arc::new(Float64Array::from_iter(records.iter().map(|r| r.relative_error))),
        strings(records.iter().map(|r| r.error_basis.as_str())),
        times(records.iter().map(|r| r.created_at)),
    ];
    RecordBatch::try_new(schema::artifacts(), columns).map_err(|e| Error::Numeric(e.to_string()))
}

/// The columns of a batch of one table, by name and type; a column of another type is one of another program's table.
struct Columns<'a> {
    table: &'static str,
    batch: &'a RecordBatch,
}

impl<'a> Columns<'a> {
    fn wrong(&self, column: &str, found: impl ToString) -> Error {
        Error::expected(format!("column '{column}' of the {} table", self.table), found, "what this version writes")
    }

    fn column(&self, name: &str) -> Result<&'a ArrayRef> {
        self.batch.column_by_name(name).ok_or_else(|| self.wrong(name, "no such column"))
    }

    fn text(&self, name: &str, row: usize) -> Result<&'a str> {
        let array = self.column(name)?.as_string_opt::<i32>().ok_or_else(|| self.wrong(name, "another type"))?;
        Ok(array.value(row))
    }

    fn parsed<T: serde::de::DeserializeOwned>(&self, name: &str, row: usize) -> Result<T> {
        serde_json::from_str(self.text(name, row)?).map_err(|e| self.wrong(name, e))
    }

    fn locations(&self, row: usize) -> Result<LocationsText> {
        LocationsText::read(self.text(LOCATIONS, row)?).map_err(|e| self.wrong(LOCATIONS, e))
    }

    fn number(&self, name: &str, row: usize) -> Result<u64> {
        let array =
            self.column(name)?.as_primitive_opt::<UInt64Type>().ok_or_else(|| self.wrong(name, "another type"))?;
        Ok(array.value(row))
    }

    fn hash(&self, name: &str, row: usize) -> Result<[u8; 32]> {
        let array = self.column(name)?.as_fixed_size_binary_opt().ok_or_else(|| self.wrong(name, "another type"))?;
        array.value(row).try_into().map_err(|_| self.wrong(name, format!("{} bytes", array.value_length())))
    }

    fn error(&self, row: usize) -> Result<Option<f64>> {
        let name = "relative_error";
        let array =
            self.column(name)?.as_primitive_opt::<Float64Type>().ok_or_else(|| self.wrong(name, "another type"))?;
        Ok(array.is_valid(row).then(|| array.value(row)))
    }

    fn basis(&self, row: usize) -> Result<ErrorBasis> {
        match self.text("error_basis", row)? {
            "activations" => Ok(ErrorBasis::Activations),
            "weights" => Ok(ErrorBasis::Weights),
            other => Err(self.wrong("error_basis", other)),
        }
    }

    fn time(&self, name: &str, row: usize) -> Result<DateTime<Utc>> {
        let array = self
            .column(name)?
            .as_primitive_opt::<TimestampMicrosecondType>()
            .ok_or_else(|| self.wrong(name, "another type"))?;
        DateTime::from_timestamp_micros(array.value(row)).ok_or_else(|| self.wrong(name, array.value(row)))
    }
}

/// Reads the catalogue rows of a batch; columns that are not known are left alone.
pub fn read_layers(batch: &RecordBatch) -> Result<Vec<LayerRecord>> {
    let r = Columns { table: schema::LAYERS, batch };
    (0..batch.num_rows())
        .map(|row| {
            Ok(LayerRecord {
                model: r.text("model", row)?.to_owned(),
                layer: r.text("layer", row)?.to_owned(),
                method: r.text("method", row)?.to_owned().into(),
                in_features: r.number("in_features", row)?,
                out_features: r.number("out_features", row)?,
                artifact: ArtifactId(r.hash("artifact", row)?),
                relative_error: r.error(row)?,
                error_basis: r.basis(row)?,
                dense_bytes: r.number("dense_bytes", row)?,
                stored_bytes: r.number("stored_bytes", row)?,
                config: r.parsed("config", row)?,
                source: r.parsed("source", row)?,
                created_at: r.time("created_at", row)?,
                locations: r.parsed(LOCATIONS, row)?,
            })
        })
        .collect()
}

/// Reads which artifact each row of the catalogue names, for which layer.
pub fn named_layers(batch: &RecordBatch) -> Result<Vec<(ArtifactId, LayerName)>> {
    let r = Columns { table: schema::LAYERS, batch };
    let named = |row| {
        let layer = LayerName { model: r.text("model", row)?.to_owned(), layer: r.text("layer", row)?.to_owned() };
        Ok((ArtifactId(r.hash("artifact", row)?), layer))
    };
    (0..batch.num_rows()).map(named).collect()
}

/// Reads where a row of the catalogue says that its artifact's rows are.
pub fn locations_of(batch: &RecordBatch, row: usize) -> Result<LocationsText> {
    Columns { table: schema::LAYERS, batch }.locations(row)
}

/// Reads the rows of the table of artifacts in a batch.
pub fn read_artifacts(batch: &RecordBatch) -> Result<Vec<ArtifactRecord>> {
    let r = Columns { table: schema::ARTIFACTS, batch };
    (0..batch.num_rows())
        .map(|row| {
            Ok(ArtifactRecord {
                artifact: ArtifactId(r.hash("artifact", row)?),
                method: r.text("method", row)?.to_owned().into(),
                config: r.parsed("config", row)?,
                locations: r.parsed(LOCATIONS, row)?,
                stored_bytes: r.number("stored_bytes", row)?,
                recipe: r.hash("recipe", row)?,
                relative_error: r.error(row)?,
                error_basis: r.basis(row)?,
                created_at: r.time("created_at", row)?,
            })
        })
        .collect()
}

/// Where the rows of an artifact are, as the table of artifacts says, and since when.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The artifact's name.
    pub artifact: ArtifactId,
    /// Where its rows are.
    pub locations: LocationsText,
    /// When it was written.
    pub created_at: DateTime<Utc>,
}

impl Listing {
    /// The columns that it is read from.
    pub const COLUMNS: [&str; 3] = ["artifact", LOCATIONS, "created_at"];
}

/// Reads [`Listing::COLUMNS`] of the table of artifacts in a batch.
pub fn read_listings(batch: &RecordBatch) -> Result<Vec<Listing>> {
    let r = Columns { table: schema::ARTIFACTS, batch };
    let listing = |row| {
        let artifact = ArtifactId(r.hash("artifact", row)?);
        Ok(Listing { artifact, locations: r.locations(row)?, created_at: r.time("created_at", row)? })
    };
    (0..batch.num_rows()).map(listing).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Texts of any number and length come in batches that are short enough, in their order; a row by itself may be longer.
    #[test]
    fn long_texts_are_split() {
        let record = |i: usize, length: usize| LayerRecord {
            model: "m".into(),
            layer: format!("layer.{i}"),
            method: "dense".into(),
            in_features: 1,
            out_features: 1,
            artifact: ArtifactId([i as u8; 32]),
            relative_error: None,
            error_basis: ErrorBasis::Weights,
            dense_bytes: 1,
            stored_bytes: 1,
            config: Value::String("x".repeat(length)),
            source: Source::default(),
            created_at: DateTime::UNIX_EPOCH,
            locations: RowLocations::default(),
        };
        let lengths = [10, 2000, 10, 10, 400, 400, 400, 0];
        let records: Vec<LayerRecord> = lengths.into_iter().enumerate().map(|(i, n)| record(i, n)).collect();
        let batches = layers_of(&records, 1000).unwrap();
        assert_eq!(batches.iter().map(RecordBatch::num_rows).collect::<Vec<_>>(), [1, 1, 4, 2]);
        let back: Vec<LayerRecord> = batches.iter().flat_map(|batch| read_layers(batch).unwrap()).collect();
        assert_eq!(back, records);
        assert_eq!(layers_of(&[], 1000).unwrap()[0].num_rows(), 0);
        let artifacts: Vec<ArtifactRecord> = records.iter().map(LayerRecord::artifact_record).collect();
        let one = artifacts_batches(&artifacts).unwrap();
        assert_eq!((one.len(), read_artifacts(&one[0]).unwrap()), (1, artifacts));
    }
}
