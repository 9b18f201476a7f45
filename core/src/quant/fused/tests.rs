use proptest::prelude::*;

use super::*;
use crate::quant::{Clipping, Group, ScaleType, WeightFormat};

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

/// All that this machine has.
fn machines() -> Vec<Machine> {
    let mut all = vec![Machine::Portable];
    #[cfg(target_arch = "x86_64")]
    all.extend(avx2::available().then_some(Machine::Avx2));
    #[cfg(target_arch = "x86_64")]
    all.extend(avx512::available().then_some(Machine::Avx512));
    all
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
        rows in 1usize..11,
        groups in 1usize..6,
        batch in prop::sample::select(vec![1usize, 2, 4, 5, 13]),
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
        let inputs = if packed.column_scales.is_empty() { x.clone() } else { &x * &ArrayView1::from(&packed.column_scales) };
        let coarse = format.weight_type == WeightType::Nf4;
        for machine in machines() {
            for activations in [Activations::F32, Activations::Int8, Activations::Int8Absmax] {
                if activations.rounds() && format.weight_type.is_float() {
                    continue;
                }
                let y = packed.products_on(machine, x.view(), activations, false, || ()).0;
                let (expected, size) = match activations {
                    Activations::F32 => slow(&inputs, &weight),
                    rounding => slow(&as_rounded(inputs.view(), rounding), &weight),
                };
                // NF4's levels as bytes are off by half of a 127th of the scale.
                let levels = if coarse && activations.rounds() { 0.5 / 127.0 } else { 0.0 };
                let largest = packed.scales.iter().fold(0f32, |most, s| most.max(s.abs()));
                for ((i, j), &found) in y.indexed_iter() {
                    let sum: f64 = inputs.row(i).iter().map(|v| f64::from(v.abs())).sum();
                    let allowed = 1e-6 + 4e-6 * size[[i, j]] + 2e-6 * sum * f64::from(largest)
                        + 1.01 * levels * sum * f64::from(largest);
                    let off = (f64::from(found) - expected[[i, j]]).abs();
                    prop_assert!(off <= allowed, "{:?} {:?} {}: {} for {}", machine, activations, format.weight_type, found, expected[[i, j]]);
                }
            }
        }
    }

    /// No input is further off than half a step, and what is whole already stays.
    #[test]
    fn rounding_to_bytes(values in proptest::collection::vec(-9f32..9.0, 1..40)) {
        let most = values.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (activations, steps) in [(Activations::Int8, 255.0), (Activations::Int8Absmax, 254.0)] {
            let (scale, whole) = rounded(&values, activations);
            for (v, w) in values.iter().zip(&whole) {
                prop_assert!((v - f32::from(*w) * scale).abs() <= most.max(1e-5) / steps * 1.0001);
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
            let first = packed.products_on(Machine::Portable, x.view(), Activations::Int8Absmax, false, || ()).0;
            for machine in machines() {
                let found = packed.products_on(machine, x.view(), Activations::Int8Absmax, batch == 3, || ()).0;
                assert_eq!(found, first, "{machine:?}");
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
        for (activations, allowed) in [(Activations::F32, 1e-3), (Activations::Int8, 0.5)] {
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
    assert_eq!(packed(0, 8).products(Array2::zeros((2, 8)).view(), Activations::F32).dim(), (2, 0));
    assert_eq!(packed(3, 8).products(Array2::zeros((0, 8)).view(), Activations::Int8).dim(), (0, 3));
    assert_eq!(packed(3, 0).products(Array2::zeros((1, 0)).view(), Activations::Int8), Array2::<f32>::zeros((1, 3)));
}
