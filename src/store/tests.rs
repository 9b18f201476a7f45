//! The whole store: format versions beside each other, both readers beside each other, and catalogues that claim what is
//! not so.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, BinaryArray, Float32Array, RecordBatch, StringArray};
use arrow::compute::{cast, concat_batches};
use safetensors::tensor::TensorView;

use super::append::append;
use super::catalogue;
use super::data::{Data, file_rows};
use super::format::{AddedColumn, Format, Formats};
use super::location::Location;
use super::reader::{Files, Reader};
use super::record::{ArtifactRecord, ErrorBasis, LayerRecord, RowLocations, RowRange, TableRows, artifacts_batch};
use super::remedy::Remedy;
use super::root::{Store, StoreOptions};
use super::schema::{ARTIFACTS, LAYERS};
use super::tables::to_batches;
use super::testing::Hooks;
use super::verify::VerifyDepth;
use crate::compress::{ImportOptions, import};
use crate::error::{Error, ErrorKind};
use crate::formats;
use crate::layer::parts::Tensor;
use crate::layer::{DType, Parts};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// Imports the small checkpoint.
async fn bring(store: &Store, model: &str, rules: Option<&Path>) {
    let (checkpoint, calibration) = (fixture("small.safetensors"), fixture("small-calibration.safetensors"));
    bring_from(store, model, &checkpoint, rules, rules.map(|_| calibration.as_path())).await;
}

async fn bring_from(store: &Store, model: &str, checkpoint: &Path, rules: Option<&Path>, calibration: Option<&Path>) {
    let options = ImportOptions::from_files(rules, calibration).unwrap();
    import(store, formats::open(checkpoint).unwrap(), model, options).await.unwrap();
}

/// Loads every layer of the latest version, and says how many there are.
async fn load_all(store: &Store) -> usize {
    let latest = store.latest().await.unwrap();
    let mut count = 0;
    for model in latest.models().await.unwrap() {
        for handle in latest.handles(&model.model).await.unwrap() {
            handle.load().await.unwrap();
            count += 1;
        }
    }
    count
}

async fn sound(store: &Store) {
    assert_eq!(store.verify(|_, _| ()).await.unwrap().corrupt, []);
}

/// A copy of the store that was kept as format 1 wrote it.
fn kept_store(folder: &Path) -> String {
    fn copy(from: &Path, to: &Path) {
        std::fs::create_dir_all(to).unwrap();
        for entry in std::fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            let to = to.join(path.file_name().unwrap());
            if path.is_dir() { copy(&path, &to) } else { std::fs::copy(&path, &to).map(|_| ()).unwrap() }
        }
    }
    let place = folder.join("layers");
    copy(&fixture("store-v1/layers"), &place);
    place.display().to_string()
}

/// Imports layers of every method, key–value layers of every backend and of every kind of keys and values among them.
async fn bring_every_method(store: &Store, folder: &Path) {
    bring(store, "dense", None).await;
    for rules in ["int4", "keys", "keys-int8", "backends"] {
        bring(store, rules, Some(&fixture(&format!("{rules}.toml")))).await;
    }
    let rules = |name: &str, text: &str| {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let ternary = "[[rule]]\nlayers = 'blocks\\..*'\nmethod = 'ternary'\nrank = 4\nnorm = true\n";
    bring(store, "ternary", Some(&rules("ternary.toml", ternary))).await;
    let half = "[[rule]]\nlayers = 'blocks\\..*'\nmethod = 'key_value'\nbackend = { type = 'flat', keys = 'f16' }\n\
                values = 'f16'\n";
    bring(store, "half", Some(&rules("half.toml", half))).await;
    let factors = "[[rule]]\nlayers = 'blocks\\..*'\nmethod = 'low_rank'\nrank = 4\nfactors = 'int8'\n\
                   bias_correction = true\nweight = { type = 'int8', group = 'channel' }\n";
    bring(store, "factors", Some(&rules("factors.toml", factors))).await;
    let exact = factors.replace("factors = 'int8'", "factors = 'f32'");
    bring(store, "exact", Some(&rules("exact.toml", &exact))).await;
    let keras = formats::open(fixture("keras/functional.keras")).unwrap();
    import(store, keras, "keras", ImportOptions::default()).await.unwrap();
    let attention = "[[rule]]\nlayers = 'attention'\nmethod = 'vq_attention'\nmechanism = 'vq_qk'\nn_head = 2\n\
                     n_code = 6\nblock_len = 8\nquery = 'q'\nkey = 'k'\nvalue = 'v'\noutput = 'out'\n";
    let names = ["q", "k", "v", "out"].map(|name| format!("attention.{name}"));
    let array = |name: &str, rows: usize, seed: usize| {
        let numbers = (0..rows * 8).map(|i| ((i * 7919 + seed * 613) % 1009) as f32 / 500.0 - 1.0);
        (name.to_owned(), vec![rows, 8], numbers.flat_map(f32::to_le_bytes).collect::<Vec<u8>>())
    };
    let file = |name: &str, arrays: Vec<(String, Vec<usize>, Vec<u8>)>| {
        let views = arrays
            .iter()
            .map(|(name, shape, bytes)| (name.as_str(), TensorView::new(DType::F32, shape.clone(), bytes).unwrap()));
        let path = folder.join(name);
        safetensors::serialize_to_file(views, None, &path).unwrap();
        path
    };
    let weights = names.iter().enumerate().map(|(i, name)| array(&format!("{name}.weight"), 8, i)).collect();
    let inputs = names.iter().map(|name| array(name, 40, 9)).collect();
    let (weights, inputs) = (file("attention.safetensors", weights), file("inputs.safetensors", inputs));
    bring_from(store, "attention", &weights, Some(&rules("attention.toml", attention)), Some(&inputs)).await;
}

/// Every table of a store that holds every method, read directly and through Lance.
#[tokio::test(flavor = "multi_thread")]
async fn both_readers_read_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let uri = folder.path().join("layers").display().to_string();
    let opened = |reader| StoreOptions { reader: Some(reader), ..StoreOptions::default() };
    let store = Store::create_with(&uri, opened(Reader::Direct)).await.unwrap();
    bring_every_method(&store, folder.path()).await;
    let deep = store.verify_with(VerifyDepth::Deep, |_, _| ()).await.unwrap();
    assert_eq!((deep.corrupt, deep.damaged), (vec![], vec![]));
    let through_lance = Store::open_with(&uri, opened(Reader::Lance)).await.unwrap();
    let files = |reader| Arc::new(Files::new(store.shared().location.clone(), reader));
    let (direct, lance) = (files(Reader::Direct), files(Reader::Lance));
    let (mut tables, mut methods) = (BTreeSet::new(), BTreeSet::new());
    for record in store.shared().data.records().await.unwrap() {
        let wanted = file_rows(&record.locations);
        let found = direct.direct_rows(&wanted).unwrap();
        let found = found.unwrap_or_else(|| panic!("{:?} are not read directly", record.locations));
        assert!(lance.direct_rows(&wanted).unwrap().is_none());
        let expected = lance.decoded_rows(&wanted).await.unwrap();
        assert_eq!(found.len(), expected.len());
        for ((rows, found), expected) in wanted.iter().zip(&found).zip(expected) {
            let expected = concat_batches(&expected[0].schema(), &expected).unwrap();
            assert_eq!(found.num_columns(), expected.num_columns(), "{rows:?}");
            for (field, found) in found.schema().fields().iter().zip(found.columns()) {
                // Lance calls the items of every list nullable.
                let expected = cast(expected.column_by_name(field.name()).unwrap(), found.data_type()).unwrap();
                assert_eq!(found, &expected, "{} of {rows:?}", field.name());
            }
            tables.insert(rows.table.trim_end_matches(|c: char| c.is_ascii_digit()).to_owned());
        }
        methods.insert(record.method.to_string());
        let parts = store.shared().data.parts(&record).await.unwrap();
        assert_eq!(parts, through_lance.shared().data.parts(&record).await.unwrap());
        assert_eq!(parts.id(), record.artifact);
    }
    let all = ["codebooks_d", "codes_m", "factors_d", "keys_d", "tensors", "values_d", "weights"];
    assert_eq!(tables.iter().collect::<Vec<_>>(), all);
    let all = ["dense", "key_value", "low_rank", "module", "ternary", "vq_attention"];
    assert_eq!(methods.iter().collect::<Vec<_>>(), all);
    assert_eq!(load_all(&store).await, load_all(&through_lance).await);
}

/// A format that is not released: the next one, with a column more in each kind of table.
static NEXT: Formats = Formats(&[
    Format { version: 1, added: &[] },
    Format {
        version: 2,
        added: &[
            AddedColumn { table: LAYERS, name: "license", default: |rows| texts("unknown", rows) },
            AddedColumn { table: ARTIFACTS, name: "origin", default: |rows| texts("here", rows) },
            AddedColumn {
                table: "keys_d",
                name: "weight",
                default: |rows| Arc::new(Float32Array::from(vec![1.0; rows])),
            },
            AddedColumn {
                table: "weights",
                name: "outliers",
                default: |rows| Arc::new(BinaryArray::from_iter_values(vec![b""; rows])),
            },
        ],
    },
]);

fn texts(text: &str, rows: usize) -> ArrayRef {
    Arc::new(StringArray::from(vec![text; rows]))
}

fn next() -> StoreOptions {
    StoreOptions { hooks: Hooks { formats: &NEXT, ..Hooks::default() }, ..StoreOptions::default() }
}

async fn columns(store: &Store, table: &str) -> Vec<String> {
    let dataset = store.shared().location.open_table(table, None).await.unwrap();
    dataset.schema().fields.iter().map(|field| field.name.clone()).collect()
}

/// A build that knows a second version reads and writes stores of the first as they are.
#[tokio::test(flavor = "multi_thread")]
async fn a_later_format_reads_and_writes_an_older_store() {
    let folder = tempfile::tempdir().unwrap();
    let uri = kept_store(folder.path());
    let store = Store::open_with(&uri, next()).await.unwrap();
    assert_eq!(store.format().await.unwrap(), 1);
    assert_eq!(load_all(&store).await, 30);
    sound(&store).await;
    bring(&store, "new", Some(&fixture("backends.toml"))).await;
    sound(&store).await;
    for table in ["layers", "artifacts", "keys_d48", "weights"] {
        let found = columns(&store, table).await;
        assert!(!found.iter().any(|c| ["license", "origin", "weight", "outliers"].contains(&c.as_str())), "{found:?}");
    }
    // This build reads what it wrote.
    let now = Store::open(&uri).await.unwrap();
    assert_eq!((now.format().await.unwrap(), load_all(&now).await), (1, 40));
    sound(&now).await;
    assert_eq!(now.upgrade().await.unwrap(), 1);
    assert_eq!(now.latest().await.unwrap().version(), store.latest().await.unwrap().version());
    // A value for a column that the store's tables do not have is not dropped.
    let location = &store.shared().location;
    let dataset = location.open_table("keys_d48", None).await.unwrap();
    let rows: RecordBatch = dataset.scan().limit(Some(2), None).unwrap().try_into_batch().await.unwrap();
    let weighted = NEXT.completed("keys_d48", rows).unwrap();
    let refused = append((location, &NEXT.0[0]), "keys_d48", vec![weighted]).await.unwrap_err();
    assert!(matches!(&refused, Error::OlderFormat { column, found: 1, .. } if column == "weight"), "{refused}");
    assert_eq!(refused.kind(), ErrorKind::Incompatible);
}

/// A store that was upgraded has the columns everywhere, is read as before, and is closed to builds that do not know them.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_store_is_upgraded() {
    let folder = tempfile::tempdir().unwrap();
    let uri = kept_store(folder.path());
    let before = Store::open(&uri).await.unwrap();
    let store = Store::open_with(&uri, next()).await.unwrap();
    assert_eq!(store.upgrade().await.unwrap(), 2);
    assert_eq!((store.upgrade().await.unwrap(), store.format().await.unwrap()), (2, 2));
    assert_eq!(store.log().await.unwrap()[0].operation, "upgrade to format 2");
    for (table, column) in
        [("layers", "license"), ("artifacts", "origin"), ("keys_d96", "weight"), ("weights", "outliers")]
    {
        assert!(columns(&store, table).await.iter().any(|c| c == column), "{table}");
    }
    assert_eq!(load_all(&store).await, 30);
    sound(&store).await;
    // Rows that were written without a column have its default.
    let catalogue = catalogue::open(&store.shared().location, None).await.unwrap();
    let rows = catalogue.scan().try_into_batch().await.unwrap();
    let rows = NEXT.completed(LAYERS, rows).unwrap();
    assert_eq!(rows.column_by_name("license").unwrap(), &texts("unknown", 30));
    // Old and new tables take new rows, and a collected store is whole.
    bring_every_method(&store, folder.path()).await;
    assert!(columns(&store, "keys_d48").await.contains(&"weight".to_owned()));
    sound(&store).await;
    store.restore("first").await.unwrap();
    assert_eq!(store.format().await.unwrap(), 2);
    let collected = store.gc(Duration::ZERO, true).await.unwrap();
    assert!(collected.artifacts > 0 && collected.applied, "{collected:?}");
    sound(&store).await;
    assert_eq!(load_all(&store).await, 30);
    let error = Store::open(&uri).await.unwrap_err();
    assert!(matches!(&error, Error::Format { found, known, .. } if found == "2" && known == "version 1"), "{error}");
    // Nor does one that was open already go on.
    assert!(matches!(before.latest().await.unwrap_err(), Error::Format { .. }));
    assert!(matches!(before.writer().await.unwrap_err(), Error::Format { .. }));
}

/// What hashes to its name may still be no layer, and what is one may not be what the catalogue says.
#[tokio::test(flavor = "multi_thread")]
async fn verification_builds_layers_and_runs_them() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::create(&folder.path().join("layers").display().to_string()).await.unwrap();
    bring(&store, "m", None).await;
    let location = store.shared().location.clone();
    let format = location.format_of(&catalogue::open(&location, None).await.unwrap()).unwrap();
    let mut parts = Parts::new("low_rank", serde_json::json!({"rank": 1}));
    parts.tensors.push(Tensor::vector("bias", &[1.0]));
    let id = parts.id();
    let mut locations = RowLocations::default();
    for (table, batches) in to_batches(id, &parts).unwrap() {
        let files = append((&location, format), &table.name(), batches).await.unwrap();
        let ranges = files.into_iter().map(|(file, rows)| RowRange { file, offset: 0, rows }).collect();
        locations.0.insert(table.name(), TableRows { rows: 1, ranges });
    }
    let record = ArtifactRecord {
        artifact: id,
        method: parts.method.clone(),
        config: parts.config.clone(),
        locations,
        stored_bytes: parts.stored_bytes(),
        recipe: id.0,
        relative_error: None,
        error_basis: ErrorBasis::Weights,
        created_at: chrono::Utc::now(),
    };
    append((&location, format), ARTIFACTS, vec![artifacts_batch(&[record]).unwrap()]).await.unwrap();
    assert!(store.verify_with(VerifyDepth::Quick, |_, _| ()).await.unwrap().is_sound());
    let found = store.verify(|_, _| ()).await.unwrap().corrupt;
    assert_eq!(found.len(), 1);
    assert!(found[0].reason.contains("no layer can be built"), "{found:?}");
    assert_eq!((found[0].help.as_slice(), found[0].layers.len()), (&[Remedy::Gc][..], 0));
    store.gc(Duration::ZERO, true).await.unwrap();
    sound(&store).await;

    let mut rows = store.latest().await.unwrap().layers("m").await.unwrap();
    let embedding = rows.iter_mut().find(|row| row.layer == "embedding").unwrap();
    embedding.in_features = 47;
    store.writer().await.unwrap().commit("m", &rows, None).await.unwrap();
    sound(&store).await;
    let found = store.verify_with(VerifyDepth::Deep, |_, _| ()).await.unwrap().corrupt;
    assert_eq!(found.len(), 1);
    assert!(
        found[0].reason.contains("layer 'embedding' of model 'm'") && found[0].reason.contains("(64, 47)"),
        "{found:?}"
    );
}

/// Rows that a catalogue claims and no file has are told as such, and nothing is asked of memory for them.
#[tokio::test(flavor = "multi_thread")]
async fn claimed_rows_that_are_not_there_are_corrupt() {
    let folder = tempfile::tempdir().unwrap();
    let location = Location::new(&kept_store(folder.path()), &Hooks::default()).unwrap();
    for reader in [Reader::Direct, Reader::Lance] {
        let data = Arc::new(Data::new(location.clone(), reader));
        for record in data.records().await.unwrap() {
            let lie = |change: fn(&mut TableRows)| {
                let mut lying = record.clone();
                lying.locations.0.values_mut().for_each(change);
                lying
            };
            let lies: [ArtifactRecord; 5] = [
                lie(|table| table.rows = 1 << 60),
                lie(|table| {
                    table.rows = 1 << 40;
                    table.ranges.iter_mut().for_each(|range| range.rows = 1 << 40);
                }),
                lie(|table| {
                    table.rows = u64::MAX;
                    table.ranges.iter_mut().for_each(|range| (range.offset, range.rows) = (u64::MAX, u64::MAX));
                }),
                lie(|table| {
                    table.rows = 1 << 33;
                    let one = table.ranges[0].clone();
                    table.ranges = vec![one; 3];
                }),
                lie(|table| table.rows += 1),
            ];
            for lying in lies {
                let error = data.parts(&lying).await.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Corrupt, "{reader:?} {:?}: {error}", lying.locations);
            }
            // Where rows are is a hint: they are looked for where it is wrong.
            let moved = lie(|table| table.ranges.iter_mut().for_each(|range| range.file = "none.lance".into()));
            assert_eq!(data.parts(&moved).await.unwrap().id(), record.artifact);
        }
        // A layer's own locations are a hint, too: the list of artifacts knows better.
        let dataset = catalogue::open(&location, None).await.unwrap();
        let rows: Vec<LayerRecord> = catalogue::rows(&location, &dataset, None).await.unwrap();
        for mut layer in rows.into_iter().take(5) {
            for table in layer.locations.0.values_mut() {
                table.rows = 1 << 50;
                table.ranges.iter_mut().for_each(|range| range.rows = 1 << 50);
            }
            assert!(data.local_parts(&layer).is_none());
            assert_eq!(data.layer_parts(&layer).await.unwrap().id(), layer.artifact);
        }
    }
}
