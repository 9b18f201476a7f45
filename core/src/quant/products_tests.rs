//! Products with packed matrices on every instruction set, beside the dequantised weight.

use ndarray::{Array2, ArrayView1};
use proptest::prelude::*;

use super::{Clipping, Group, PackedMatrix, ScaleType, WeightFormat, WeightType};
use crate::kernels::{ActivationFormat, available, best, rounded};

fn formats() -> impl Strategy<Value = WeightFormat> {
    let kinds = (2u8..9).prop_flat_map(|bits| {
        prop_oneof![
            3 => Just(WeightType::Int(bits)),
            1 => Just(WeightType::MxInt(bits)),
            1 => Just(WeightType::Nf4),
            2 => Just(WeightType::Ternary),
            1 => prop::sample::select(vec![WeightType::F16, WeightType::Bf16]),
        ]
    });
    let groups = prop_oneof![
        Just(Group::Channel),
        Just(Group::Tensor),
        prop::sample::select(vec![2, 4, 6, 8, 12, 16, 24, 32, 64, 96, 128]).prop_map(Group::Size)
    ];
    (kinds, groups, any::<bool>()).prop_map(|(weight_type, group, symmetric)| WeightFormat {
        weight_type,
        group,
        symmetric,
        minimum: false,
        scales: ScaleType::F32,
    })
}

fn sample(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    Array2::from_shape_fn((rows, columns), |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 0.9
    })
}

/// `x · wᵀ` in f64, and beside it the sum of the products' sizes: what roundings are measured by.
fn slow(x: &Array2<f32>, w: &Array2<f32>) -> (Array2<f64>, Array2<f64>) {
    let (x, w) = (x.mapv(f64::from), w.mapv(f64::from));
    (x.dot(&w.t()), x.mapv(f64::abs).dot(&w.mapv(f64::abs).t()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Each instruction set gives what the dequantised weight does: up to f32 rounding with f32 activations, and with
    /// int8 ones what the rounded inputs and the rounded levels give.
    #[test]
    fn as_the_dequantized_weight(
        format in formats(),
        (rows, batch) in prop_oneof![
            3 => (1usize..11, prop::sample::select(vec![1usize, 2, 4, 5, 13])),
            1 => (30usize..80, 24usize..32),
        ],
        groups in 1usize..6,
        tail in 0usize..70,
        seed in any::<u64>(),
    ) {
        let columns = match format.group {
            Group::Size(n) => n * groups,
            _ => 1 + 61 * groups + tail,
        };
        let w = sample(rows, columns, seed);
        let mut packed = PackedMatrix::quantize(w.view(), format, Clipping::Absmax, None).unwrap();
        let mut x = sample(batch, columns, seed ^ 7) * 3.0;
        let weight = packed.dequantize();
        if seed % 2 == 0 {
            // Columns' scales are the same as scaled inputs.
            let scales: Vec<f32> = (0..columns).map(|j| [0.5, 1.0, 2.0][j % 3]).collect();
            x = &x / &ArrayView1::from(&scales);
            packed = packed.with_column_scales(scales).unwrap();
        }
        let inputs = if packed.column_scales().is_empty() { x.clone() } else { &x * &ArrayView1::from(packed.column_scales()) };
        let coarse = format.weight_type == WeightType::Nf4;
        for isa in available() {
            for activations in [ActivationFormat::F32, ActivationFormat::Int8, ActivationFormat::Int8Absmax] {
                if activations.rounds() && format.weight_type.is_float() {
                    continue;
                }
                let y = packed.products_on(isa, x.view(), activations, false);
                let (expected, size) = match activations {
                    ActivationFormat::F32 => slow(&inputs, &weight),
                    rounding => slow(&rounded(inputs.view(), rounding), &weight),
                };
                // NF4's levels as bytes are off by half of a 127th of the scale.
                let levels = if coarse && activations.rounds() { 0.5 / 127.0 } else { 0.0 };
                let largest = packed.scales().iter().fold(0f32, |most, s| most.max(s.abs()));
                for ((i, j), &found) in y.indexed_iter() {
                    let sum: f64 = inputs.row(i).iter().map(|v| f64::from(v.abs())).sum();
                    let allowed = 1e-6 + 4e-6 * size[[i, j]] + 2e-6 * sum * f64::from(largest)
                        + 1.01 * levels * sum * f64::from(largest);
                    let off = (f64::from(found) - expected[[i, j]]).abs();
                    prop_assert!(off <= allowed, "{} {:?} {}: {} for {}", isa.name(), activations, format.weight_type, found, expected[[i, j]]);
                }
            }
        }
    }
}

/// Sums of whole numbers are the same on every machine, to the bit, and so is what a row's one scale makes of them.
#[test]
fn whole_numbers_are_exact() {
    for (weight_type, columns) in [(WeightType::Ternary, 1000), (WeightType::Int(4), 333), (WeightType::Int(8), 130)] {
        let format = WeightFormat { weight_type, group: Group::Channel, ..WeightFormat::default() };
        let packed = PackedMatrix::quantize(sample(9, columns, 5).view(), format, Clipping::Mse, None).unwrap();
        for batch in [1, 3, 6] {
            let x = sample(batch, columns, 7) * 4.0;
            let first = packed.products_on(best(), x.view(), ActivationFormat::Int8Absmax, false);
            for isa in available() {
                let found = packed.products_on(isa, x.view(), ActivationFormat::Int8Absmax, batch == 3);
                assert_eq!(found, first, "{}", isa.name());
            }
        }
    }
}

/// Enough rows for several threads, each with its own part.
#[test]
fn threads_share_the_rows() {
    let w = sample(2100, 640, 3);
    let packed = PackedMatrix::quantize(w.view(), WeightFormat::default(), Clipping::Absmax, None).unwrap();
    for batch in [2, 6, 20] {
        let x = sample(batch, 640, 4);
        let (expected, _) = slow(&x, &packed.dequantize());
        for (activations, allowed) in [(ActivationFormat::F32, 1e-3), (ActivationFormat::Int8, 0.5)] {
            let y = packed.products(x.view(), activations);
            assert!(y.iter().zip(&expected).all(|(y, e)| (f64::from(*y) - e).abs() < allowed));
        }
    }
}

#[test]
fn nothing_to_do() {
    let packed = |rows, columns| {
        let format = WeightFormat { group: Group::Channel, ..WeightFormat::default() };
        PackedMatrix::quantize(Array2::zeros((rows, columns)).view(), format, Clipping::Absmax, None).unwrap()
    };
    assert_eq!(packed(0, 8).products(Array2::zeros((2, 8)).view(), ActivationFormat::F32).dim(), (2, 0));
    assert_eq!(packed(3, 8).products(Array2::zeros((0, 8)).view(), ActivationFormat::Int8).dim(), (0, 3));
    assert_eq!(
        packed(3, 0).products(Array2::zeros((1, 0)).view(), ActivationFormat::Int8),
        Array2::<f32>::zeros((1, 3))
    );
}

/// Sums of whole numbers beyond 32 bits: every code and every input as large as they come, and of one sign. They are exact, but
/// where floats are added up.
#[test]
fn sums_beyond_32_bits() {
    const COLUMNS: usize = 140_000;
    let integer = |bits, symmetric| WeightFormat {
        weight_type: WeightType::Int(bits),
        group: Group::Channel,
        symmetric,
        ..WeightFormat::default()
    };
    let ternary = WeightFormat { weight_type: WeightType::Ternary, ..integer(2, true) };
    let formats = [2, 3, 4, 7, 8].into_iter().flat_map(|bits| [integer(bits, true), integer(bits, false)]);
    for format in formats.chain([ternary]) {
        let bits = format.weight_type.bits();
        // Signed codes of two and of four bits are flipped in registers that hold several of them: their sums are floats.
        let whole_sums = !(format.symmetric && [2, 4].contains(&bits)) || format.weight_type == WeightType::Ternary;
        let top = ((1u32 << bits) - 1) as u8;
        // Unsigned codes: the largest, and the sign bit, which is the largest when it is flipped; some fewer in the last row.
        let rows = 5;
        let code = |row: usize, column: usize| match (row, format.weight_type) {
            (_, WeightType::Ternary) => [2, 0, 2, 1, 2][row] * u8::from(row < 4 || !column.is_multiple_of(3)),
            (0, _) => top,
            (1, _) => top >> 1,
            (2, _) => 1 << (bits - 1),
            (3, _) => 0,
            _ => {
                if !column.is_multiple_of(3) {
                    top
                } else {
                    0
                }
            }
        };
        let codes: Vec<u8> =
            (0..rows).flat_map(|row| (0..COLUMNS).map(move |column| (row, column))).map(|(r, c)| code(r, c)).collect();
        let mut packed = vec![];
        codes.chunks(COLUMNS).for_each(|row| super::pack(row, bits, &mut packed));
        let stored = match format.weight_type {
            WeightType::Ternary => super::trits::to_trits(&packed, COLUMNS),
            _ => packed,
        };
        let zero = if format.has_zeros() { [0, top, 1, 0, top / 2].to_vec() } else { vec![] };
        let scales = [1f32; 5];
        let matrix = PackedMatrix::from_fields(
            format,
            (rows, COLUMNS),
            stored.into(),
            bytemuck::cast_slice(&scales),
            zero.clone(),
        )
        .unwrap();
        let value = |row: usize, column: usize| -> i64 {
            let code = codes[row * COLUMNS + column];
            match format.weight_type {
                WeightType::Ternary => i64::from(code) - 1,
                _ if format.has_zeros() => i64::from(code) - i64::from(zero[row]),
                _ => i64::from(((code << (8 - bits)) as i8) >> (8 - bits)),
            }
        };
        for batch in [1, 5] {
            // The scale is 1 with 127.5 for the largest, and −128 is what all others become that are less than −127.5.
            let x = Array2::from_shape_fn((batch, COLUMNS), |(v, column)| match (v % 3, column) {
                (_, 0) => -127.5,
                (0, _) => -127.5,
                (1, _) => 127.5,
                _ => {
                    if column % 2 == 0 {
                        -127.5
                    } else {
                        127.5
                    }
                }
            });
            let whole = |v: usize, column: usize| -> i64 { if x[[v, column]] < 0.0 { -128 } else { 127 } };
            for isa in available() {
                let found = matrix.products_on(isa, x.view(), ActivationFormat::Int8, false);
                for ((v, row), &found) in found.indexed_iter() {
                    let exact: i64 = (0..COLUMNS).map(|column| value(row, column) * whole(v, column)).sum();
                    let what = format!("{} {format:?} row {row}, input {v}", isa.name());
                    if whole_sums {
                        assert_eq!(found, exact as f32, "{what}");
                    } else {
                        // A sum of floats in each lane, of flipped codes, and what flipping adds.
                        let half = 1i64 << (bits - 1);
                        let size = |column: usize| (value(row, column) + 2 * half) * whole(v, column).abs();
                        let size: i64 = (0..COLUMNS).map(size).sum();
                        let off = (f64::from(found) - exact as f64).abs();
                        assert!(off <= 1e-4 * size as f64, "{what}: {found} for {exact}");
                    }
                }
            }
        }
    }
}

/// Every format that only files of other programs have, of random bytes.
fn of_files(seed: u64, rows: usize) -> Vec<PackedMatrix> {
    use ScaleType::{Bf16, F16, F32, Iq4Xs, Q2K, Q3K, Q4K, Q6K};
    use WeightType::{F8E4M3, F8E5M2, Fp4, Int, Iq4Nl, MxFp4, Ternary};
    let formats = [
        (Int(4), 32, true, F16),
        (Int(5), 32, true, F16),
        (Int(4), 64, true, F32),
        (Int(8), 16, true, Bf16),
        (Int(4), 32, false, Bf16),
        (Int(2), 16, true, Q2K),
        (Int(3), 16, false, Q3K),
        (Int(4), 32, true, Q4K),
        (Int(5), 32, true, Q4K),
        (Int(6), 16, false, Q6K),
        (Iq4Nl, 32, false, Iq4Xs),
        (Iq4Nl, 32, false, F16),
        (MxFp4, 32, false, F32),
        (Fp4, 64, false, F32),
        (Ternary, 256, false, F16),
        (F8E4M3, 512, false, F16),
        (F8E5M2, 128, false, F32),
    ];
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    let matrix = |(weight_type, group, minimum, scales): (WeightType, usize, bool, ScaleType)| {
        let symmetric = !minimum;
        let format = WeightFormat { weight_type, group: Group::Size(group), symmetric, minimum, scales };
        let columns = 512;
        let (of_scales, of_zeros) = format.row_scale_bytes(columns).unwrap();
        let below = match weight_type {
            Ternary => 3,
            F8E4M3 | F8E5M2 => 100,
            _ => 255,
        };
        let codes: Vec<u8> = (0..rows * columns).map(|_| next() % below).collect();
        let mut number = |bytes: usize| -> Vec<u8> {
            let value = f32::from(next()) / 128.0 - 1.0;
            match (weight_type, scales) {
                (MxFp4, _) => vec![120 + next() % 10],
                (_, F32) => value.to_le_bytes().to_vec(),
                (_, Bf16) => half::bf16::from_f32(value).to_le_bytes().to_vec(),
                (_, F16) => half::f16::from_f32(value).to_le_bytes().to_vec(),
                _ => {
                    let mut block: Vec<u8> = (0..bytes).map(|_| next()).collect();
                    // Whatever is taken for the f16 numbers is small.
                    let halves: &[usize] = match scales {
                        Q2K => &[16, 18],
                        Q3K => &[12],
                        Q4K => &[0, 2],
                        Q6K => &[16],
                        _ => &[0],
                    };
                    let small = half::f16::from_f32(value / 16.0).to_le_bytes();
                    halves.iter().for_each(|&at| block[at..at + 2].copy_from_slice(&small));
                    block
                }
            }
        };
        let (count, bytes) = match scales.nested() {
            Some(nested) => (rows * columns / 256, nested.bytes),
            None => (rows * columns / group, 0),
        };
        let scale_bytes: Vec<u8> = (0..count).flat_map(|_| number(bytes)).collect();
        let zeros = if of_zeros > 0 { (0..count).flat_map(|_| number(bytes)).collect() } else { vec![] };
        assert_eq!(scale_bytes.len(), rows * of_scales);
        PackedMatrix::from_unpacked(format, (rows, columns), &codes, &scale_bytes, zeros).unwrap()
    };
    formats.map(matrix).into()
}

/// Formats of files run on every instruction set as their dequantised weights say, with columns in any order, and come back from
/// what is stored of them.
#[test]
fn formats_of_files_run() {
    for packed in of_files(3, 7).into_iter().chain(of_files(3, 33)) {
        let format = packed.format();
        let again = PackedMatrix::from_fields(
            format,
            (packed.nrows(), packed.ncols()),
            packed.stored_codes(),
            &packed.scale_bytes(),
            packed.zero_bytes().to_vec(),
        );
        assert_eq!(again.unwrap(), packed, "{format:?}");
        let bytes = packed.stored_codes().len() + packed.scale_bytes().len() + packed.zero_bytes().len();
        assert_eq!(format.stored_bytes(packed.nrows(), packed.ncols()).unwrap(), bytes, "{format:?}");
        let order: Vec<u32> = (0..512).map(|j| j * 37 % 512).collect();
        let ordered = packed.clone().with_order(order.clone()).unwrap();
        let (plain, moved) = (packed.dequantize(), ordered.dequantize());
        for (stored, &column) in order.iter().enumerate() {
            assert_eq!(plain.column(stored), moved.column(column as usize));
        }
        for (packed, weight) in [(&packed, plain), (&ordered, moved)] {
            for batch in [1, 3, 40] {
                let x = sample(batch, 512, 11) * 3.0;
                for (activations, levels) in [(ActivationFormat::F32, 0.0), (ActivationFormat::Int8, 1.0)] {
                    let inputs = if activations.rounds() { rounded(x.view(), activations) } else { x.clone() };
                    let (expected, size) = slow(&inputs, &weight);
                    let largest = packed.scales().iter().fold(0f64, |most, s| most.max(f64::from(s.abs())));
                    // fp4's levels are rounded to 127ths.
                    let coarse = if format.weight_type == WeightType::Fp4 { 0.5 / 127.0 * levels } else { 0.0 };
                    for isa in available() {
                        let y = packed.products_on(isa, x.view(), activations, false);
                        for ((i, j), &found) in y.indexed_iter() {
                            let sum: f64 = inputs.row(i).iter().map(|v| f64::from(v.abs())).sum();
                            let allowed = 1e-5 + 1e-5 * size[[i, j]] + (4e-6 * 256.0 + 1.01 * coarse) * sum * largest;
                            let off = (f64::from(found) - expected[[i, j]]).abs();
                            assert!(
                                off <= allowed,
                                "{} {activations:?} {format:?}: {found}, {}",
                                isa.name(),
                                expected[[i, j]]
                            );
                        }
                    }
                }
            }
        }
    }
}

/// What does not fit together is refused, and no rule can ask for a format of files.
#[test]
fn formats_that_contradict_themselves_are_refused() {
    let read = |text: &str| serde_json::from_str::<WeightFormat>(text).unwrap();
    for (text, columns) in [
        (r#"{"type":"int4","group":32,"scales":"q4_k"}"#, 256),
        (r#"{"type":"int4","group":32,"minimum":true,"scales":"q4_k"}"#, 32),
        (r#"{"type":"int4","group":16,"minimum":true,"scales":"q4_k"}"#, 256),
        (r#"{"type":"nf4","group":32,"minimum":true}"#, 256),
        (r#"{"type":"int4","group":32,"minimum":true,"symmetric":true}"#, 256),
        (r#"{"type":"f16","group":16,"scales":"q6_k"}"#, 256),
    ] {
        let refused = PackedMatrix::from_fields(read(text), (1, columns), vec![0; 128].into(), &[0; 16], vec![]);
        assert!(refused.unwrap_err().to_string().contains("weight format"), "{text}");
    }
    for text in [r#"{"type":"int4","minimum":true}"#, r#"{"type":"iq4_nl"}"#, r#"{"type":"int4","scales":"bf16"}"#] {
        assert!(read(text).check_made().unwrap_err().to_string().contains("not made"), "{text}");
    }
    let packed =
        PackedMatrix::quantize(sample(2, 4, 1).view(), read(r#"{"type":"int4","group":4}"#), Clipping::Mse, None)
            .unwrap();
    for order in [vec![0, 1, 2], vec![0, 1, 2, 2], vec![0, 1, 2, 4]] {
        assert!(packed.clone().with_order(order).is_err());
    }
}

/// The tables of 8-bit floats are those of the formats, by their definitions.
#[test]
fn eight_bit_floats_are_as_defined() {
    use super::quantizer::{F8_E4M3, F8_E5M2};
    for code in 0..=255u8 {
        // E5M2 is the upper half of an f16.
        let expected = half::f16::from_bits(u16::from(code) << 8).to_f32();
        let found = F8_E5M2[usize::from(code)];
        assert!(found == expected || (found.is_nan() && expected.is_nan()), "{code}: {found} {expected}");
    }
    for (code, expected) in [(0, 0.0), (1, 0.001953125), (7, 0.013671875), (8, 0.015625), (0x38, 1.0), (0x7e, 448.0)] {
        assert_eq!((F8_E4M3[code], F8_E4M3[code + 128]), (expected, -expected));
    }
    assert!(F8_E4M3[0x7f].is_nan() && F8_E4M3[0xff].is_nan());
    let format = WeightFormat { weight_type: WeightType::F8E4M3, group: Group::Channel, ..WeightFormat::default() };
    let of = |codes: [u8; 2]| PackedMatrix::from_unpacked(format, (1, 2), &codes, &1f32.to_le_bytes(), vec![]);
    assert!(of([0x38, 1]).is_ok() && of([0x38, 0x7f]).unwrap_err().to_string().contains("the weights"));
}
