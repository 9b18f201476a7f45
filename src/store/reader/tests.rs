//! The two readers beside each other.

use std::fs::File;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, FixedSizeBinaryArray, FixedSizeListArray, Float32Array, LargeBinaryArray, RecordBatch,
    StringArray, UInt8Array, UInt32Array,
};
use arrow::datatypes::DataType;
use proptest::prelude::*;

use super::data_file::DataFile;
use super::{FileRows, Files, Reader};
use crate::store::append::{open_or_create, write};
use crate::store::format::FORMATS;
use crate::store::location::Location;
use crate::store::s3::StorageOptions;
use crate::store::schema::Table;
use crate::store::testing::Hooks;

/// Rows of wide values of both kinds, some pages of them, and any run of these: as the decoder reads them.
#[test]
fn reads_what_the_decoder_reads() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let location = Location::new(folder.path().to_str().unwrap(), &Hooks::default(), &StorageOptions::new()).unwrap();
    let files = Arc::new(Files::new(location.clone(), Reader::Direct, None));
    let rows = 3000usize;
    let keys = {
        let names = FixedSizeBinary::new(rows);
        let values: Vec<f32> = (0..rows * 700).map(|i| (i as f32).sin()).collect();
        let DataType::FixedSizeList(item, length) = Table::Keys(700).schema().field(3).data_type().clone() else {
            panic!()
        };
        let vectors = FixedSizeListArray::try_new(item, length, Arc::new(Float32Array::from(values)), None).unwrap();
        let scales = Float32Array::from_iter_values((0..rows).map(|i| i as f32));
        RecordBatch::try_new(
            Table::Keys(700).schema(),
            vec![names.0, counted(rows), Arc::new(scales), Arc::new(vectors)],
        )
        .unwrap()
    };
    let weights = {
        let packed: Vec<Vec<u8>> =
            (0..rows).map(|i| (0..2000 + i % 3).map(|j| (((i * 2003 + j) * 40_503) >> 7) as u8).collect()).collect();
        let few: Vec<Vec<u8>> = (0..rows).map(|i| vec![i as u8; 4]).collect();
        let bytes = |rows: &[Vec<u8>]| -> ArrayRef { Arc::new(BinaryArray::from_iter_values(rows)) };
        RecordBatch::try_new(
            Table::Weights.schema(),
            vec![FixedSizeBinary::new(rows).0, counted(rows), bytes(&packed), bytes(&few), bytes(&few)],
        )
        .unwrap()
    };
    let one = |bytes: &[u8]| -> ArrayRef {
        Arc::new(FixedSizeBinaryArray::try_from_iter(std::iter::repeat_n(bytes, rows)).unwrap())
    };
    let same = |text: &str| -> ArrayRef { Arc::new(StringArray::from_iter_values(vec![text; rows])) };
    let list = |kind: &Table, values: ArrayRef, column: usize| -> ArrayRef {
        let DataType::FixedSizeList(item, length) = kind.schema().field(column).data_type().clone() else { panic!() };
        Arc::new(FixedSizeListArray::try_new(item, length, values, None).unwrap())
    };
    let factors = {
        let table = Table::Factors(3);
        let vectors = Float32Array::from_iter_values((0..rows * 3).map(|i| i as f32));
        let columns = vec![
            one(&[9; 32]),
            same("a"),
            counted(rows),
            Arc::new(Float32Array::from(vec![0.5; rows])),
            list(&table, Arc::new(vectors), 4),
        ];
        RecordBatch::try_new(table.schema(), columns).unwrap()
    };
    let codes = {
        let table = Table::Codes(5);
        let roles = StringArray::from_iter_values((0..rows).map(|i| ["keys", "values"][i * 2 / rows]));
        let codes = UInt8Array::from_iter_values((0..rows * 5).map(|i| (i * i) as u8));
        let columns = vec![one(&[7; 32]), Arc::new(roles) as ArrayRef, counted(rows), list(&table, Arc::new(codes), 3)];
        RecordBatch::try_new(table.schema(), columns).unwrap()
    };
    let blocks = {
        let table = Table::WeightBlocks;
        // Two weights: of long blocks, a shorter one last; and of short ones. Then blocks of all lengths.
        let length = |i: usize| match i {
            0..1500 => 2000 - 1700 * usize::from(i == 1499),
            1500..2000 => 40,
            _ => i * 7 % 1100,
        };
        let packed: Vec<Vec<u8>> =
            (0..rows).map(|i| (0..length(i)).map(|j| ((i * 1009 + j) * 31) as u8).collect()).collect();
        let scales: Vec<Vec<u8>> = (0..rows).map(|i| vec![i as u8; length(i) / 8]).collect();
        let counts = UInt32Array::from_iter_values((0..rows).map(|i| length(i) as u32));
        let bytes = |rows: &[Vec<u8>]| -> ArrayRef { Arc::new(LargeBinaryArray::from_iter_values(rows)) };
        let columns = vec![
            one(&[5; 32]),
            counted(rows),
            Arc::new(counts) as ArrayRef,
            bytes(&packed),
            bytes(&scales),
            bytes(&vec![vec![]; rows]),
        ];
        RecordBatch::try_new(table.schema(), columns).unwrap()
    };
    let mut written = vec![];
    for (table, batch) in [
        (Table::Keys(700), &keys),
        (Table::Weights, &weights),
        (Table::Factors(3), &factors),
        (Table::Codes(5), &codes),
        (Table::WeightBlocks, &blocks),
    ] {
        let name = table.name();
        let place = (&location, FORMATS.newest());
        let file = runtime.block_on(async {
            let dataset = Arc::new(open_or_create(place, &name).await.unwrap());
            let (transaction, mut files) = write(place, (&name, &dataset), vec![batch.clone()]).await.unwrap().unwrap();
            lance::dataset::CommitBuilder::new(dataset).execute(transaction).await.unwrap();
            files.remove(0).0
        });
        written.push((table, batch, file));
    }
    proptest!(ProptestConfig::with_cases(40), |(start in 0usize..2999, length in 1usize..3000)| {
        let run = start..(start + length).min(rows);
        for (table, batch, file) in &written {
            let range = run.start as u64..run.end as u64;
            let expected = batch.slice(run.start, run.len());
            let joined = |batches: Vec<RecordBatch>| {
                arrow::compute::concat_batches(&batches[0].schema(), &batches).unwrap()
            };
            let run = FileRows { table: table.name(), file: file.clone(), rows: range };
            let fast = joined(files.direct_rows(std::slice::from_ref(&run)).unwrap().unwrap());
            let slow = joined(runtime.block_on(files.decoded_rows(&[run])).unwrap().remove(0));
            for (slow, fast) in slow.columns().iter().zip(fast.columns()) {
                // Lance calls the items of every list nullable.
                prop_assert_eq!(&arrow::compute::cast(slow, fast.data_type()).unwrap(), fast);
            }
            for (expected, fast) in expected.columns().iter().zip(fast.columns()) {
                // Offsets of bytes have 64 bits where they are read directly.
                prop_assert_eq!(&arrow::compute::cast(expected, fast.data_type()).unwrap(), fast);
            }
        }
    });
    for (table, _, file) in &written {
        let run = |rows| [FileRows { table: table.name(), file: file.clone(), rows }];
        assert!(files.direct_rows(&run(2990..3001)).unwrap().is_none());
        assert!(runtime.block_on(files.decoded_rows(&run(2990..3001))).is_err());
        // Pages that are not there any more, or a description that is cut off, are no panic.
        let path = folder.path().join(format!("{}.lance/data/{file}", table.name()));
        let bytes = std::fs::read(&path).unwrap();
        let cut = File::options().write(true).open(&path).unwrap();
        cut.set_len(5000).unwrap();
        assert!(files.direct_rows(&run(0..3000)).is_err());
        for length in (0..bytes.len()).rev().step_by(97).take(60).chain(0..45) {
            std::fs::write(&path, &bytes[..length]).unwrap();
            assert!(DataFile::open(&path, &table.schema()).is_err(), "{length} of {} bytes", bytes.len());
        }
        // Nor is a byte that is not what was written, wherever in the description it is.
        for place in (bytes.len().saturating_sub(4000)..bytes.len()).step_by(7) {
            let mut flipped = bytes.clone();
            flipped[place] ^= 0x55;
            std::fs::write(&path, &flipped).unwrap();
            let _ = Files::new(location.clone(), Reader::Direct, None).direct_rows(&run(0..3000));
        }
    }
}

struct FixedSizeBinary(ArrayRef);

impl FixedSizeBinary {
    fn new(rows: usize) -> Self {
        let names = (0..rows).map(|i| [i as u8; 32]);
        FixedSizeBinary(Arc::new(FixedSizeBinaryArray::try_from_iter(names).unwrap()))
    }
}

fn counted(rows: usize) -> ArrayRef {
    Arc::new(UInt32Array::from_iter_values(0..rows as u32))
}
