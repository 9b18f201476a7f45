//! Format versions: what each adds to the tables, and how rows of one version are read and written by another.
//!
//! A version may add columns to tables, and new tables; it changes and removes none. An added column is nullable, and a
//! null in it, like its absence, stands for the column's default. So a build reads stores of every version that it
//! knows, and stores whose tables have further columns that it does not know.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, RecordBatch, new_null_array};
use arrow::compute::is_not_null;
use arrow::compute::kernels::zip::zip;
use arrow::datatypes::{Field, Schema, SchemaRef};
use lance::Dataset;

use super::schema::{self, ARTIFACTS, CODE_BLOCKS, CODEBOOK_BLOCKS, LAYERS, Table, WEIGHT_BLOCKS};
use crate::error::{Error, Result};

/// The metadata key of the catalogue's schema under which a store names its format version.
pub const FORMAT_KEY: &str = "layerstore:format";

/// The format version of the stores that this build makes.
pub const FORMAT_VERSION: u32 = RELEASED[RELEASED.len() - 1].version;

/// The released format versions.
pub static FORMATS: Formats = Formats(&RELEASED);

const RELEASED: [Format; 2] = [FIRST, BLOCKS];

/// The first version.
pub(super) const FIRST: Format = Format { version: 1, tables: &[], added: &[] };

/// Version 2: weights, codes and codebooks lie in blocks of rows.
pub(super) const BLOCKS: Format =
    Format { version: 2, tables: &[WEIGHT_BLOCKS, CODE_BLOCKS, CODEBOOK_BLOCKS], added: &[] };

/// The format versions that a store may have, oldest first.
#[derive(Debug)]
pub struct Formats(pub(super) &'static [Format]);

/// A version of the format.
#[derive(Debug)]
pub struct Format {
    /// Its number.
    pub version: u32,
    /// The data tables that it adds to those of the version before, by name.
    pub tables: &'static [&'static str],
    /// The columns that it adds to those of the version before.
    pub added: &'static [AddedColumn],
}

/// A column that a format version adds to a table.
#[derive(Debug)]
pub struct AddedColumn {
    /// The table: `layers`, `artifacts`, a data table, such as `tensors` or `weight_blocks`, or its name without its width, such as
    /// `keys_d`.
    pub table: &'static str,
    /// The column's name.
    pub name: &'static str,
    /// Returns the values that this many rows have which were written without the column. Their type is the column's.
    pub default: fn(usize) -> ArrayRef,
}

impl AddedColumn {
    fn field(&self) -> Field {
        // Nullable: no row has to be written anew when the column is added to a table.
        Field::new(self.name, (self.default)(0).data_type().clone(), true)
    }
}

impl Formats {
    /// Returns the newest version, which new stores have.
    pub fn newest(&self) -> &'static Format {
        &self.0[self.0.len() - 1]
    }

    /// Returns the version of this number, if it is known.
    pub fn numbered(&self, version: u32) -> Option<&'static Format> {
        self.0.iter().find(|format| format.version == version)
    }

    /// Returns the version that the catalogue of the store at this address names.
    ///
    /// # Errors
    /// [`Error::Format`] when it is none of these, and [`Error::NotAStore`] when there is none.
    pub fn of(&self, store: &str, catalogue: &Dataset) -> Result<&'static Format> {
        let Some(found) = catalogue.schema().metadata.get(FORMAT_KEY) else {
            return Err(Error::NotAStore {
                path: store.to_owned(),
                reason: format!("its table '{LAYERS}' does not name a format version: another program made it"),
            });
        };
        let known = found.parse().ok().and_then(|version| self.numbered(version));
        known.ok_or_else(|| Error::Format {
            store: store.to_owned(),
            found: found.clone(),
            known: match (self.0[0].version, self.newest().version) {
                (first, last) if first == last => format!("version {first}"),
                (first, last) => format!("versions {first} to {last}"),
            },
        })
    }

    /// Returns the schema of a table, by its name, in a format version: the columns that it first had, and those that were
    /// added up to that version. `None` when the version has no table of that name.
    pub fn schema(&self, table: &str, version: u32) -> Option<SchemaRef> {
        match table {
            LAYERS => Some(self.catalogue(version)),
            ARTIFACTS => Some(Arc::new(self.with_added(ARTIFACTS, &schema::artifacts(), version))),
            _ => {
                let known = Table::named(table)?;
                let later = self.0.iter().filter(|format| format.version > version);
                let not_yet = later.flat_map(|format| format.tables).any(|added| *added == table);
                (!not_yet).then(|| Arc::new(self.with_added(table, &known.schema(), version)))
            }
        }
    }

    /// Returns the schema of the catalogue in a format version. Its metadata names the version.
    pub fn catalogue(&self, version: u32) -> SchemaRef {
        let schema = self.with_added(LAYERS, &schema::layers(), version);
        let metadata = HashMap::from([(FORMAT_KEY.to_owned(), version.to_string())]);
        Arc::new(schema.with_metadata(metadata))
    }

    fn with_added(&self, table: &str, base: &Schema, version: u32) -> Schema {
        let formats = self.0.iter().filter(|format| format.version <= version);
        let added = formats.flat_map(|format| format.added).filter(|column| column.table == kind(table));
        let fields = base.fields().iter().cloned().chain(added.map(|column| Arc::new(column.field())));
        Schema::new(fields.collect::<Vec<_>>())
    }

    /// Returns the columns of the newest version that a table has: what is read of it.
    pub fn known_columns(&self, table: &str, dataset: &Dataset) -> Vec<String> {
        let schema = self.schema(table, self.newest().version);
        let names = schema.iter().flat_map(|schema| schema.fields()).map(|field| field.name().clone());
        names.filter(|name| dataset.schema().field(name).is_some()).collect()
    }

    /// Returns rows with every column that the newest version adds to their table: with the column's default where rows
    /// were written without it.
    ///
    /// # Errors
    /// When a column is of another type than its default.
    pub fn completed(&self, table: &str, batch: RecordBatch) -> arrow::error::Result<RecordBatch> {
        let mut batch = batch;
        for column in self.0.iter().flat_map(|format| format.added).filter(|column| column.table == kind(table)) {
            let defaults = || (column.default)(batch.num_rows());
            let (mut fields, mut arrays) = (batch.schema().fields().to_vec(), batch.columns().to_vec());
            match batch.schema().index_of(column.name) {
                Ok(index) if arrays[index].null_count() == 0 => continue,
                Ok(index) => arrays[index] = zip(&is_not_null(&arrays[index])?, &arrays[index], &defaults())?,
                Err(_) => {
                    fields.push(Arc::new(column.field()));
                    arrays.push(defaults());
                }
            }
            batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays)?;
        }
        Ok(batch)
    }
}

/// A table's name without its width.
fn kind(table: &str) -> &str {
    table.trim_end_matches(|c: char| c.is_ascii_digit())
}

/// Returns rows without the columns that their table does not have, which is of an older format. Nulls are left out:
/// they stand for the column's default, as its absence does.
///
/// # Errors
/// [`Error::OlderFormat`] when such a column holds a value.
pub fn without_missing(
    batch: RecordBatch,
    (name, table): (&str, &Dataset),
    (store, format): (&str, &Format),
) -> Result<RecordBatch> {
    let mut kept = Vec::with_capacity(batch.num_columns());
    for (index, field) in batch.schema().fields().iter().enumerate() {
        if table.schema().field(field.name()).is_some() {
            kept.push(index);
        } else if batch.column(index).null_count() < batch.num_rows() {
            return Err(Error::OlderFormat {
                store: store.to_owned(),
                found: format.version,
                table: name.to_owned(),
                column: field.name().clone(),
            });
        }
    }
    batch.project(&kept).map_err(|e| Error::storage(format!("writing to table '{name}'"), e))
}

/// Returns rows with a column of nulls for every column that their table has and they have not: those that another
/// program, or a newer version of this one, has added.
///
/// # Errors
/// When such a column takes no nulls.
pub fn with_foreign(batch: RecordBatch, (name, table): (&str, &Dataset)) -> Result<RecordBatch> {
    let (mut fields, mut arrays) = (batch.schema().fields().to_vec(), batch.columns().to_vec());
    for field in Schema::from(table.schema()).fields() {
        if batch.schema().column_with_name(field.name()).is_none() {
            if !field.is_nullable() {
                let column = format!("column '{}' of table '{name}'", field.name());
                return Err(Error::expected(column, "a column that must have values", "one that takes nulls"));
            }
            fields.push(field.clone());
            arrays.push(new_null_array(field.data_type(), batch.num_rows()));
        }
    }
    let batch = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays);
    batch.map_err(|e| Error::storage(format!("writing to table '{name}'"), e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::{AsArray, StringArray, UInt32Array};
    use arrow::datatypes::{DataType, UInt32Type};
    use serde_json::{Value, json};
    use std::collections::{BTreeMap, BTreeSet};

    fn described(schema: &Schema) -> Value {
        let fields: Vec<Value> = schema
            .fields()
            .iter()
            .map(|f| {
                let mut field =
                    json!({"name": f.name(), "type": f.data_type().to_string(), "nullable": f.is_nullable()});
                if !f.metadata().is_empty() {
                    field["metadata"] = json!(f.metadata().iter().collect::<BTreeMap<_, _>>());
                }
                field
            })
            .collect();
        json!({"metadata": schema.metadata(), "fields": fields})
    }

    /// A released schema is frozen: a change here needs a new format version and a new file.
    #[test]
    fn schemas_are_as_released() {
        let tables = [
            "layers",
            "artifacts",
            "keys_d384",
            "values_d384",
            "codebooks_d8",
            "codes_m48",
            "factors_d384",
            "weights",
            "tensors",
        ];
        let blocks = [WEIGHT_BLOCKS, CODE_BLOCKS, CODEBOOK_BLOCKS];
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("schemas");
        let mut released = BTreeSet::new();
        for format in FORMATS.0 {
            for table in tables.iter().chain(&blocks) {
                let Some(schema) = FORMATS.schema(table, format.version) else { continue };
                let path = folder.join(format!("{table}.v{}.json", format.version));
                let now = json!({"table": table, "format": format.version, "schema": described(&schema)});
                if std::env::var_os("LAYERSTORE_WRITE_SCHEMAS").is_some() {
                    std::fs::write(&path, serde_json::to_string_pretty(&now).unwrap() + "\n").unwrap();
                }
                let found: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
                assert_eq!(found, now, "{table} is not what {} releases", path.display());
                released.insert(path);
            }
        }
        let files: BTreeSet<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(files, released, "schemas/ holds a file that no table of these formats has");
        // Tables of a later version are none of an earlier one.
        assert_eq!(blocks.map(|table| FORMATS.schema(table, 1).is_some()), [false; 3]);
    }

    /// Versions follow each other, every added table has a name that is known, and every added column is of a table that there is
    /// and new to it.
    #[test]
    fn versions_add_to_each_other() {
        for pair in FORMATS.0.windows(2) {
            assert_eq!(pair[1].version, pair[0].version + 1);
        }
        let tables = ["layers", "artifacts", "keys_d4", "values_d4", "codebooks_d4", "codes_m4", "factors_d4"];
        for format in FORMATS.0 {
            assert!(format.tables.iter().all(|table| Table::named(table).is_some()), "{format:?}");
            for column in format.added {
                let table = tables.iter().chain(&["weights", "tensors"]).find(|table| kind(table) == column.table);
                let table = table.unwrap_or_else(|| panic!("no table '{}'", column.table));
                let before = FORMATS.schema(table, format.version - 1).unwrap();
                assert!(before.field_with_name(column.name).is_err(), "{table}.{}", column.name);
            }
        }
        assert_eq!(FORMATS.newest().version, FORMAT_VERSION);
    }

    static SAMPLE: Formats = Formats(&[
        FIRST,
        Format {
            version: 2,
            tables: &[],
            added: &[AddedColumn {
                table: "keys_d",
                name: "weight",
                default: |rows| Arc::new(UInt32Array::from(vec![7; rows])),
            }],
        },
    ]);

    #[test]
    fn what_is_missing_has_its_default() {
        let rows =
            RecordBatch::try_from_iter([("key", Arc::new(UInt32Array::from(vec![0, 1, 2])) as ArrayRef)]).unwrap();
        let weights = |batch: &RecordBatch| {
            batch.column_by_name("weight").unwrap().as_primitive::<UInt32Type>().values().to_vec()
        };
        assert_eq!(weights(&SAMPLE.completed("keys_d12", rows.clone()).unwrap()), [7, 7, 7]);
        let some = UInt32Array::from(vec![Some(1), None, Some(3)]);
        let some = RecordBatch::try_from_iter([("weight", Arc::new(some) as ArrayRef)]).unwrap();
        assert_eq!(weights(&SAMPLE.completed("keys_d12", some).unwrap()), [1, 7, 3]);
        // Other tables are as they were, and other types are refused.
        assert_eq!(SAMPLE.completed("values_d12", rows.clone()).unwrap(), rows);
        let text = StringArray::from(vec![None::<&str>]);
        let text = RecordBatch::try_from_iter([("weight", Arc::new(text) as ArrayRef)]).unwrap();
        assert!(SAMPLE.completed("keys_d12", text).is_err());
        let two = SAMPLE.schema("keys_d12", 2).unwrap();
        assert_eq!(two.field_with_name("weight").unwrap().data_type(), &DataType::UInt32);
        assert!(SAMPLE.schema("keys_d12", 1).unwrap().field_with_name("weight").is_err());
    }
}
