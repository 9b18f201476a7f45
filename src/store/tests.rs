//! The whole store: format versions beside each other, both readers beside each other, and catalogues that claim what is
//! not so.

mod copies;
mod many;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, BinaryArray, Float32Array, RecordBatch, StringArray};
use arrow::compute::{cast, concat_batches};
use proptest::prelude::*;
use safetensors::tensor::TensorView;

use super::append::{append_rows, write};
use super::batches::{ArtifactRows, Layout};
use super::catalogue;
use super::data::{Data, file_rows};
use super::format::{AddedColumn, BLOCKS, FIRST, FORMATS, Format, Formats};
use super::listing::{data_tables, disk_bytes};
use super::location::Location;
use super::reader::{Files, Reader};
use super::record::{ArtifactRecord, ErrorBasis, LayerRecord, artifacts_batches};
use super::remedy::Remedy;
use super::root::{Store, StoreOptions};
use super::row_locations::{RowLocations, RowRange, TableRows};
use super::rows;
use super::s3::StorageOptions;
use super::schema::{ARTIFACTS, LAYERS};
use super::testing::Hooks;
use super::update::list;
use super::verify::VerifyDepth;
use super::writer::Provenance;
use crate::compress::{ImportOptions, RepairOptions, RepairSource, import, repair};
use crate::error::{Error, ErrorKind};
use crate::formats;
use crate::layer::parts::Tensor;
use crate::layer::{ArtifactId, DType, DenseLayer, Layer, Parts};

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
    for formats in [&OLD, &FORMATS] {
        let version = formats.newest().version;
        let uri = folder.path().join(format!("layers-{version}")).display().to_string();
        Store::create_with(&uri, knowing(formats)).await.unwrap();
        check_readers(&uri, folder.path(), version).await;
    }
}

async fn check_readers(uri: &str, folder: &Path, version: u32) {
    let store = Store::open_with(uri, reading(Reader::Direct)).await.unwrap();
    bring_every_method(&store, folder).await;
    assert_eq!(store.format().await.unwrap(), version);
    let deep = store.verify_with(VerifyDepth::Deep, |_, _| ()).await.unwrap();
    assert_eq!((deep.corrupt, deep.damaged), (vec![], vec![]));
    let through_lance = Store::open_with(uri, reading(Reader::Lance)).await.unwrap();
    let files = |reader| Arc::new(Files::new(store.shared().location.clone(), reader, None));
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
    let others = ["factors_d", "keys_d", "tensors", "values_d"];
    let all = others.into_iter().chain(if version == 1 { ROW_KINDS } else { BLOCK_KINDS });
    assert_eq!(tables, all.map(str::to_owned).collect());
    let all = ["dense", "key_value", "low_rank", "module", "ternary", "vq_attention"];
    assert_eq!(methods.iter().collect::<Vec<_>>(), all);
    assert_eq!(load_all(&store).await, load_all(&through_lance).await);
}

/// A format that is not released: the next one, with a column more in each kind of table.
static NEXT: Formats = Formats(&[
    FIRST,
    BLOCKS,
    Format {
        version: 3,
        tables: &[],
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

/// What the build knew that made the kept store.
static OLD: Formats = Formats(&[FIRST]);

fn knowing(formats: &'static Formats) -> StoreOptions {
    StoreOptions { hooks: Hooks { formats, ..Hooks::default() }, ..StoreOptions::default() }
}

fn reading(reader: Reader) -> StoreOptions {
    StoreOptions { reader: Some(reader), ..StoreOptions::default() }
}

/// The data tables that the store has, without widths.
async fn kinds(store: &Store) -> BTreeSet<String> {
    let tables = data_tables(&store.shared().location).await.unwrap();
    tables.into_iter().map(|(name, _)| name.trim_end_matches(|c: char| c.is_ascii_digit()).to_owned()).collect()
}

const BLOCK_KINDS: [&str; 3] = ["codebook_blocks", "code_blocks", "weight_blocks"];
const ROW_KINDS: [&str; 3] = ["codebooks_d", "codes_m", "weights"];

async fn columns(store: &Store, table: &str) -> Vec<String> {
    let dataset = store.shared().location.open_table(table, None).await.unwrap();
    dataset.schema().fields.iter().map(|field| field.name.clone()).collect()
}

/// A build that knows later versions reads and writes stores of the first as they are.
#[tokio::test(flavor = "multi_thread")]
async fn a_later_format_reads_and_writes_an_older_store() {
    let folder = tempfile::tempdir().unwrap();
    let uri = kept_store(folder.path());
    let store = Store::open_with(&uri, knowing(&NEXT)).await.unwrap();
    assert_eq!(store.format().await.unwrap(), 1);
    assert_eq!(load_all(&store).await, 30);
    sound(&store).await;
    bring(&store, "new", Some(&fixture("backends.toml"))).await;
    sound(&store).await;
    for table in ["layers", "artifacts", "keys_d48", "weights"] {
        let found = columns(&store, table).await;
        assert!(!found.iter().any(|c| ["license", "origin", "weight", "outliers"].contains(&c.as_str())), "{found:?}");
    }
    let found = kinds(&store).await;
    assert!(ROW_KINDS.iter().all(|kind| found.contains(*kind)), "{found:?}");
    assert!(!BLOCK_KINDS.iter().any(|kind| found.contains(*kind)), "{found:?}");
    // Builds from before read what it wrote.
    for formats in [&FORMATS, &OLD] {
        let now = Store::open_with(&uri, knowing(formats)).await.unwrap();
        assert_eq!((now.format().await.unwrap(), load_all(&now).await), (1, 40));
        sound(&now).await;
    }
    let old = Store::open_with(&uri, knowing(&OLD)).await.unwrap();
    assert_eq!(old.upgrade().await.unwrap(), 1);
    assert_eq!(old.latest().await.unwrap().version(), store.latest().await.unwrap().version());
    // A value for a column that the store's tables do not have is not dropped.
    let location = &store.shared().location;
    let dataset = location.open_table("keys_d48", None).await.unwrap();
    let rows: RecordBatch = dataset.scan().limit(Some(2), None).unwrap().try_into_batch().await.unwrap();
    let weighted = NEXT.completed("keys_d48", rows).unwrap();
    let dataset = Arc::new(dataset);
    let refused = write((location, &NEXT.0[0]), ("keys_d48", &dataset), vec![weighted]).await.unwrap_err();
    assert!(matches!(&refused, Error::OlderFormat { column, found: 1, .. } if column == "weight"), "{refused}");
    assert_eq!(refused.kind(), ErrorKind::Incompatible);
}

/// A store that was upgraded has the columns everywhere, is read as before, and is closed to builds that do not know them.
#[tokio::test(flavor = "multi_thread")]
async fn an_older_store_is_upgraded() {
    let folder = tempfile::tempdir().unwrap();
    let uri = kept_store(folder.path());
    let before = Store::open(&uri).await.unwrap();
    let store = Store::open_with(&uri, knowing(&NEXT)).await.unwrap();
    assert_eq!(store.upgrade().await.unwrap(), 3);
    assert_eq!((store.upgrade().await.unwrap(), store.format().await.unwrap()), (3, 3));
    assert_eq!(store.log().await.unwrap()[0].operation, "upgrade to format 3");
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
    assert_eq!(store.format().await.unwrap(), 3);
    let collected = store.gc(Duration::ZERO, true).await.unwrap();
    assert!(collected.artifacts > 0 && collected.applied, "{collected:?}");
    sound(&store).await;
    assert_eq!(load_all(&store).await, 30);
    let error = Store::open(&uri).await.unwrap_err();
    assert!(
        matches!(&error, Error::Format { found, known, .. } if found == "3" && known == "versions 1 to 2"),
        "{error}"
    );
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
    let rows = Arc::new(vec![ArtifactRows::new(id, parts.clone(), Layout::Blocks).unwrap()]);
    for (table, count) in rows[0].tables() {
        let files = append_rows((&location, format), table, &rows).await.unwrap().files;
        let ranges = files.into_iter().map(|(file, rows)| RowRange { file, offset: 0, rows }).collect();
        locations.0.insert(table.name(), TableRows { rows: count, ranges });
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
    list((&location, format), artifacts_batches(&[record]).unwrap()).await.unwrap();
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

/// A store of format 1 that was upgraded has its old artifacts row by row and new ones in blocks; one that its table has lost is
/// written again as it was, with as many rows as the catalogue says.
#[tokio::test(flavor = "multi_thread")]
async fn an_upgraded_store_has_both_layouts() {
    let folder = tempfile::tempdir().unwrap();
    let uri = kept_store(folder.path());
    let store = Store::open(&uri).await.unwrap();
    assert_eq!(store.upgrade().await.unwrap(), 2);
    bring_every_method(&store, folder.path()).await;
    let found = kinds(&store).await;
    assert!(ROW_KINDS[1..].iter().chain(&BLOCK_KINDS).all(|kind| found.contains(*kind)), "{found:?}");
    sound(&store).await;
    let refused = Store::open_with(&uri, knowing(&OLD)).await.unwrap_err();
    assert!(
        matches!(&refused, Error::Format { found, known, .. } if found == "2" && known == "version 1"),
        "{refused}"
    );
    for table in ["weights", "codes_m48", "weight_blocks", "code_blocks"] {
        let before = row_counts(&store).await;
        let mut manifests: Vec<PathBuf> = std::fs::read_dir(Path::new(&uri).join(format!("{table}.lance/_versions")))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "manifest"))
            .collect();
        manifests.sort();
        std::fs::remove_file(&manifests[0]).unwrap();
        let again = Store::open(&uri).await.unwrap();
        drop(again.writer().await.unwrap());
        sound(&again).await;
        // Neither refuses, and only what the table had lost is there once more.
        again.gc(Duration::ZERO, true).await.unwrap();
        sound(&again).await;
        let after = row_counts(&again).await;
        assert!(after.iter().all(|(artifact, rows)| before[artifact] == *rows), "{table}");
    }
    for reader in [Reader::Direct, Reader::Lance] {
        assert_eq!(load_all(&Store::open_with(&uri, reading(reader)).await.unwrap()).await, load_all(&store).await);
    }
}

/// How many rows of which tables each artifact has.
async fn row_counts(store: &Store) -> BTreeMap<ArtifactId, Vec<(String, u64)>> {
    let tables = |r: ArtifactRecord| r.locations.0.into_iter().map(|(table, rows)| (table, rows.rows)).collect();
    store.shared().data.records().await.unwrap().into_iter().map(|r| (r.artifact, tables(r))).collect()
}

/// What takes the place of damaged rows lies as they did, also in a store that was upgraded and where the list is lost as well: versions
/// say how many rows of which tables there are, and where.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_rows_are_replaced_as_they_lay() {
    for list_is_lost in [false, true] {
        let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (uri, whole) = (kept_store(folder.path()), kept_store(other.path()));
        let store = Store::open(&uri).await.unwrap();
        assert_eq!(store.upgrade().await.unwrap(), 2);
        let before = row_counts(&store).await;
        drop(store);
        for table in ["weights", "codes_m48"] {
            for entry in std::fs::read_dir(Path::new(&uri).join(format!("{table}.lance/data"))).unwrap() {
                let file = entry.unwrap().path();
                let mut bytes = std::fs::read(&file).unwrap();
                let at = bytes.len() / 3;
                bytes[at] ^= 0x40;
                std::fs::write(&file, bytes).unwrap();
            }
        }
        if list_is_lost {
            std::fs::remove_dir_all(Path::new(&uri).join("artifacts.lance")).unwrap();
        }
        let store = Store::open(&uri).await.unwrap();
        assert!(!store.verify(|_, _| ()).await.unwrap().is_sound());
        let sources = vec![RepairSource::open(&whole).await.unwrap()];
        let repaired = repair(&store, RepairOptions { sources, ..RepairOptions::default() }).await.unwrap();
        assert!(repaired.is_sound() && !repaired.mended.is_empty(), "{repaired:?}");
        sound(&store).await;
        let after = row_counts(&store).await;
        assert!(after.iter().all(|(artifact, rows)| before[artifact] == *rows));
        let latest = store.latest().await.unwrap();
        for model in latest.models().await.unwrap() {
            for handle in latest.handles(&model.model).await.unwrap() {
                assert_eq!(handle.load().await.unwrap().to_parts().id(), handle.record().artifact);
            }
        }
    }
}

/// Any tensor, in stores of both formats, through both readers.
#[test]
fn tensors_of_any_shape_come_back() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let shape = (prop_oneof![1usize..5, 1usize..1500], prop_oneof![1usize..4, 1usize..200], 0usize..3);
    let shapes = proptest::collection::vec(shape, 1..7);
    proptest!(ProptestConfig::with_cases(8), |(shapes in shapes, wide in prop_oneof![Just(0usize), 70_000usize..200_000])| {
        let folder = tempfile::tempdir().unwrap();
        let dtypes = [DType::U8, DType::F16, DType::F32];
        let mut layers: Vec<Parts> = shapes.iter().enumerate().map(|(i, &(rows, columns, dtype))| {
            tensor(dtypes[dtype], vec![rows, columns], i as u64)
        }).collect();
        // Rows that are longer than a block, and a matrix of a single value.
        if wide > 0 {
            layers.push(tensor(DType::U8, vec![3, wide], 99));
            layers.push(DenseLayer::new(DType::U8, vec![wide, 2], vec![7; 2 * wide].into(), None).unwrap().to_parts());
        }
        for (name, formats) in [("old", &OLD), ("new", &FORMATS)] {
            let uri = folder.path().join(name).display().to_string();
            runtime.block_on(async {
                Store::create_with(&uri, knowing(formats)).await.unwrap();
                let store = Store::open(&uri).await.unwrap();
                let mut writer = store.writer().await.unwrap();
                for (i, parts) in layers.iter().enumerate() {
                    writer.add(parts, provenance(i as u8)).await.unwrap();
                }
                writer.flush().await.unwrap();
            });
            for reader in [Reader::Direct, Reader::Lance] {
                let found = runtime.block_on(async {
                    let store = Store::open_with(&uri, reading(reader)).await.unwrap();
                    let data = &store.shared().data;
                    let mut found = BTreeMap::new();
                    for record in data.records().await.unwrap() {
                        let files = Files::new(store.shared().location.clone(), reader, None);
                        let direct = files.direct_rows(&file_rows(&record.locations)).unwrap();
                        assert_eq!(direct.is_some(), reader == Reader::Direct, "{:?}", record.locations);
                        found.insert(record.artifact, data.parts(&record).await.unwrap());
                    }
                    found
                });
                for parts in &layers {
                    prop_assert_eq!(&found[&parts.id()], parts, "{:?} of format {}", reader, name);
                }
            }
        }
    });
}

/// The parts of a dense layer of made-up bytes.
fn tensor(dtype: DType, shape: Vec<usize>, seed: u64) -> Parts {
    let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
    let mut state = seed | 1;
    let raw = (0..bytes).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    });
    DenseLayer::new(dtype, shape, raw.collect::<Vec<u8>>().into(), None).unwrap().to_parts()
}

fn provenance(recipe: u8) -> Provenance {
    Provenance { recipe: [recipe; 32], relative_error: Some(0.0), error_basis: ErrorBasis::Weights }
}

/// Rows of one byte take about a byte each.
#[tokio::test(flavor = "multi_thread")]
async fn narrow_rows_take_their_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("narrow.safetensors");
    let parts = tensor(DType::U8, vec![200_000, 1], 5);
    let raw = &parts.weights.as_ref().unwrap().packed;
    let view = TensorView::new(DType::U8, vec![200_000, 1], raw).unwrap();
    safetensors::serialize_to_file([("blocks.weight", view)], None, &checkpoint).unwrap();
    let uri = folder.path().join("layers").display().to_string();
    let store = Store::create(&uri).await.unwrap();
    bring_from(&store, "narrow", &checkpoint, None, None).await;
    let bytes = disk_bytes(&store.shared().location).await.unwrap();
    assert!(bytes < 260_000, "{bytes} bytes");
    let layer = store.latest().await.unwrap().handles("narrow").await.unwrap().remove(0).load().await.unwrap();
    assert_eq!(layer.to_parts(), parts);
}

/// Rows that a catalogue claims and no file has are told as such, and nothing is asked of memory for them.
#[tokio::test(flavor = "multi_thread")]
async fn claimed_rows_that_are_not_there_are_corrupt() {
    let folder = tempfile::tempdir().unwrap();
    let location = Location::new(&kept_store(folder.path()), &Hooks::default(), &StorageOptions::new()).unwrap();
    for reader in [Reader::Direct, Reader::Lance] {
        let data = Arc::new(Data::new(location.clone(), reader, None));
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
        let rows: Vec<LayerRecord> = rows::rows(&location, &dataset, None).await.unwrap();
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
