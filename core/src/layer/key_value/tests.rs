use ndarray::{Array1, Array2, ArrayView1, Axis, s};
use proptest::prelude::*;

use super::forward::PRODUCT_FROM;
use super::*;
use crate::calibration::Calibration;
use crate::error::{Error, ErrorKind};
use crate::index::GraphType;
use crate::layer::{Accuracy, Layer, MethodConfig, SearchReport, SharedLayer, compress, configured, layer_from_parts};
use crate::linalg::relative_error;
use crate::quant::RowFormat;

fn sample(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    Array2::from_shape_fn((rows, columns), |(_, j)| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Columns of different spread and a common offset, so that whitening has something to do.
        ((state >> 33) as f32 / (1u32 << 31) as f32 * 2.0 - 1.0) * (1.0 + (j % 5) as f32) + 0.3
    })
}

/// Asserts that an error is about input, and that its message says all of this.
#[track_caller]
fn refused<T>(result: Result<T, Error>, says: &[&str]) {
    let Err(error) = result else { panic!("nothing was refused; expected {says:?}") };
    let message = error.to_string();
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{message}");
    assert!(says.iter().all(|part| message.contains(part)), "'{message}' does not say {says:?}");
}

fn configs() -> impl Strategy<Value = KeyValueConfig> {
    (any::<bool>(), any::<bool>(), prop_oneof![Just(1.0), Just(0.9)]).prop_map(|(whitened, by_score, energy_keep)| {
        KeyValueConfig {
            decomposition: if whitened { Decomposition::WhitenedSvd } else { Decomposition::Svd },
            ranking: if by_score { Ranking::Score } else { Ranking::Contribution },
            energy_keep,
            expected_keys_per_query: Some(2.0),
            ..KeyValueConfig::default()
        }
    })
}

fn formats() -> impl Strategy<Value = RowFormat> {
    use crate::quant::{ProductFormat, RowType};
    prop_oneof![
        prop_oneof![Just(RowType::F32), Just(RowType::F16), Just(RowType::Int8)].prop_map(RowFormat::Plain),
        (1usize..6, 1usize..20).prop_map(|(subvectors, codewords)| {
            RowFormat::Product(ProductFormat { subvectors, codewords, seed: 3 })
        }),
    ]
}

fn backends() -> impl Strategy<Value = Backend> {
    (formats(), any::<bool>()).prop_map(|(format, store_float_keys)| match format {
        RowFormat::Plain(keys) => Backend::Flat { keys },
        RowFormat::Product(f) => {
            Backend::Pq { subvectors: f.subvectors, codewords: f.codewords, seed: f.seed, store_float_keys }
        }
    })
}

fn build(config: &KeyValueConfig, w: &Array2<f32>, b: Option<&Array1<f32>>, x: Option<&Array2<f32>>) -> KeyValueLayer {
    let calibration = x.map(|x| Calibration::of(x.clone()).unwrap());
    compress(config, w.view(), b.map(|b| b.view()), calibration.as_ref()).unwrap()
}

proptest! {
    /// With every key and nothing cut, the layer is the dense layer; parts bring it back as it was.
    #[test]
    fn exact_with_every_key(config in configs(), out in 2usize..12, inputs in 2usize..12, calibrated in any::<bool>(), seed in 0u64..200) {
        let config = KeyValueConfig { energy_keep: 1.0, ..config };
        let w = sample(out, inputs, seed);
        let b = Array1::from_shape_fn(out, |i| i as f32);
        let calibration = sample(3 * inputs, inputs, seed + 1);
        let layer = build(&config, &w, Some(&b), calibrated.then_some(&calibration));
        let x = sample(10, inputs, seed + 2);
        let exact = x.dot(&w.t()) + &b;
        let all = layer.clone().shared();
        let full = all.forward(x.view(), Accuracy::Full).unwrap();
        prop_assert!(relative_error(full.y.view(), exact.view()) < 1e-5);
        prop_assert!(full.relative_error_bound.unwrap() < 1e-3);
        prop_assert!(relative_error(all.weight().unwrap().view(), w.view()) < 1e-5);
        let back = configured(&layer_from_parts(all.to_parts()).unwrap(), &all.config()).unwrap();
        prop_assert_eq!(back.to_parts(), all.to_parts());
        prop_assert_eq!(back.config(), all.config());
        let (a, b) = (back.forward(x.view(), Accuracy::Approximate).unwrap(), all.forward(x.view(), Accuracy::Approximate).unwrap());
        prop_assert_eq!(a.y, b.y);
    }

    /// Keys and values of fewer bits or in codes: near the exact layer, with a bound that holds, and the same again from their parts.
    #[test]
    fn rounded_keys_and_values(
        config in configs(),
        backend in backends(),
        values in formats(),
        calibrated in any::<bool>(),
        shape in (3usize..12, 3usize..12),
        seed in 0u64..200,
    ) {
        let (out, inputs) = shape;
        let rounded = |f: RowFormat| matches!(f, RowFormat::Product(_));
        let coarse = rounded(backend.format()) || rounded(values);
        let config = KeyValueConfig { backend, values, ..config };
        let w = sample(out, inputs, seed);
        let calibration = sample(3 * inputs, inputs, seed + 1);
        let layer = build(&config, &w, None, calibrated.then_some(&calibration));
        let x = sample(PRODUCT_FROM, inputs, seed + 2);
        let exact = x.mapv(f64::from).dot(&w.mapv(f64::from).t());
        for accuracy in [Accuracy::Approximate, Accuracy::Full] {
            for batch in [1, PRODUCT_FROM] {
                let out = layer.linear(x.slice(s![..batch, ..]), accuracy).unwrap();
                for (i, y) in out.y.rows().into_iter().enumerate() {
                    let difference = (&y.mapv(f64::from) - &exact.row(i)).mapv(|v| v * v).sum().sqrt();
                    let relative = difference / exact.row(i).mapv(|v| v * v).sum().sqrt();
                    if let Some(bound) = out.relative_error_bound {
                        prop_assert!(relative <= bound, "true {} certified {}", relative, bound);
                    }
                }
                if accuracy == Accuracy::Full && config.energy_keep == 1.0 && !coarse {
                    let exact = exact.slice(s![..batch, ..]).mapv(|v| v as f32);
                    prop_assert!(relative_error(out.y.view(), exact.view()) < 0.15);
                    prop_assert!(out.relative_error_bound.is_some());
                }
            }
        }
        let layer = layer.shared();
        let back = configured(&layer_from_parts(layer.to_parts()).unwrap(), &layer.config()).unwrap();
        prop_assert_eq!(back.to_parts(), layer.to_parts());
        let run = |l: &SharedLayer| l.forward(x.view(), Accuracy::Approximate).unwrap().y;
        prop_assert_eq!(run(&back), run(&layer));
    }

    /// The bound is above the true error, and close to it where nothing was truncated.
    #[test]
    fn certified_error_holds(config in configs(), out in 3usize..12, inputs in 3usize..12, seed in 0u64..200) {
        let w = sample(out, inputs, seed);
        let calibration = sample(3 * inputs, inputs, seed + 1);
        let layer = build(&config, &w, None, Some(&calibration));
        for batch in [1, PRODUCT_FROM] {
            let x = sample(batch, inputs, seed + 2);
            let out = layer.linear(x.view(), Accuracy::Approximate).unwrap();
            let exact = x.mapv(f64::from).dot(&w.mapv(f64::from).t());
            let hits = layer.search(x.view(), None).unwrap();
            prop_assert_eq!(hits.len(), batch);
            // Every key is looked at: where nothing was cut off, the output's length is known, and so is a bound.
            let bounded = hits.iter().filter(|answer| answer.certified_error.is_some()).count();
            prop_assert!(config.energy_keep < 1.0 || bounded == batch, "{} of {}", bounded, batch);
            for (i, answer) in hits.iter().enumerate() {
                let difference = (&out.y.row(i).mapv(f64::from) - &exact.row(i)).mapv(|v| v * v).sum().sqrt();
                let relative = difference / exact.row(i).mapv(|v| v * v).sum().sqrt();
                if let Some(bound) = answer.certified_error {
                    prop_assert!(relative <= bound, "true {} certified {}", relative, bound);
                    if config.energy_keep == 1.0 && relative > 1e-2 {
                        prop_assert!(bound <= relative * 1.01);
                    }
                    prop_assert!(out.relative_error_bound.is_none_or(|b| b >= bound * 0.999));
                }
            }
        }
    }

    /// A demanded error is met with as few of the highest ranked keys as meet it.
    #[test]
    fn demanded_error_is_met(by_score in any::<bool>(), max_error in 0.05f64..0.9, seed in 0u64..200) {
        let config = KeyValueConfig { ranking: if by_score { Ranking::Score } else { Ranking::Contribution }, ..KeyValueConfig::default() };
        let w = sample(10, 8, seed);
        let layer = build(&config, &w, None, Some(&sample(40, 8, seed + 1)));
        let x = sample(6, 8, seed + 2);
        let answers = layer.search(x.view(), Some(Limit::MaxError(max_error))).unwrap();
        prop_assert_eq!(answers.len(), x.nrows());
        prop_assert!(answers.iter().any(|answer| !answer.hits.is_empty()));
        for (x, answer) in x.rows().into_iter().zip(answers) {
            prop_assert!(answer.certified_error.unwrap() <= max_error * (1.0 + 1e-9));
            if let Some(weakest) = answer.hits.last() {
                let fewer = layer.search(x.insert_axis(Axis(0)), Some(Limit::Threshold(answer.threshold * 1.0001 + f32::MIN_POSITIVE))).unwrap();
                prop_assert!(fewer[0].hits.iter().all(|h| h.key != weakest.key));
                prop_assert!(fewer[0].certified_error.unwrap() > max_error);
            }
        }
    }

    /// One row at a time and a batch give the same.
    #[test]
    fn gather_equals_product(config in configs(), seed in 0u64..200) {
        let w = sample(7, 9, seed);
        let layer = build(&config, &w, None, Some(&sample(30, 9, seed + 1)));
        let x = sample(PRODUCT_FROM, 9, seed + 2);
        let together = layer.linear(x.view(), Accuracy::Approximate).unwrap().y;
        for i in 0..x.nrows() {
            let alone = layer.linear(x.slice(s![i..=i, ..]), Accuracy::Approximate).unwrap().y;
            prop_assert!(relative_error(alone.view(), together.slice(s![i..=i, ..])) < 1e-5);
        }
    }
}

#[test]
fn expected_keys_are_met_on_the_calibration_inputs() {
    let calibration = sample(400, 12, 5);
    let layer = build(
        &KeyValueConfig { expected_keys_per_query: Some(3.0), ..KeyValueConfig::default() },
        &sample(20, 12, 4),
        None,
        Some(&calibration),
    );
    let hits: usize = layer.search(calibration.view(), None).unwrap().iter().map(|q| q.hits.len()).sum();
    assert!((hits as f64 / 400.0 - 3.0).abs() < 0.05, "{hits}");
}

#[test]
fn capacity_keeps_the_highest_ranked() {
    let layer = build(
        &KeyValueConfig { expected_keys_per_query: Some(12.0), max_ids_capacity: Some(2), ..KeyValueConfig::default() },
        &sample(20, 12, 4),
        None,
        None,
    );
    let x = sample(3, 12, 9);
    let all = layer.with_search(SearchSettings { max_ids_capacity: None, ..layer.settings().clone() }).unwrap();
    let (few, many) = (layer.search(x.view(), None).unwrap(), all.search(x.view(), None).unwrap());
    assert_eq!((few.len(), many.len()), (3, 3));
    for (few, many) in few.iter().zip(many) {
        assert_eq!(few.hits, many.hits[..2]);
        assert_eq!(many.hits.len(), 12);
    }
}

#[test]
fn zero_weights_and_bad_queries() {
    let layer = build(&KeyValueConfig::default(), &Array2::zeros((3, 4)), None, None);
    let y = layer.linear(sample(2, 4, 1).view(), Accuracy::Approximate).unwrap();
    assert_eq!(y.y, Array2::<f32>::zeros((2, 3)));
    assert_eq!(y.relative_error_bound, None);
    refused(layer.search(sample(1, 5, 1).view(), None), &["found 5", "4"]);
    refused(layer.search(sample(1, 4, 1).view(), Some(Limit::Keys(99.0))), &["99"]);
    let config = KeyValueConfig { min_singular_value: 9.0, ..KeyValueConfig::default() };
    let eye = Array2::<f32>::eye(3);
    refused(MethodConfig::from(config).compress(eye.view(), None, None), &["min_singular_value", "9", "at most 1"]);
}

/// Eight pieces of 33 numbers, 256 codewords for 20 keys: what the config says of it.
#[test]
fn what_does_not_fit_is_adapted_or_refused() {
    let w = sample(20, 33, 1);
    let pq: Backend = serde_json::from_str(r#"{"type":"pq"}"#).unwrap();
    let config = KeyValueConfig { backend: pq, expected_keys_per_query: Some(4.0), ..KeyValueConfig::default() };
    let layer = build(&config, &w, None, None);
    assert_eq!(
        layer.clone().shared().config()["adapted"],
        serde_json::json!(["backend subvectors: 8 to 11", "backend codewords: 256 to 20"])
    );
    assert_eq!(layer.shared().config()["backend"]["subvectors"], 11);
    let strict = MethodConfig::from(KeyValueConfig { on_misfit: OnMisfit::Error, ..config.clone() });
    refused(strict.compress(w.view(), None, None), &["subvectors: found 8", "1, 3, 11, 33"]);
    let fits: Backend = serde_json::from_str(r#"{"type":"pq","subvectors":3,"codewords":20}"#).unwrap();
    let strict = MethodConfig::from(KeyValueConfig { on_misfit: OnMisfit::Error, backend: fits, ..config });
    let layer = strict.compress(w.view(), None, None).unwrap();
    assert_eq!(
        (&layer.config()["adapted"], &layer.config()["backend"]["codewords"]),
        (&serde_json::Value::Null, &20.into())
    );
}

/// Float keys beside the codes: hits are those of the exact layer, all but a few.
#[test]
fn float_keys_refine_the_scores_of_codes() {
    let (w, calibration, x) = (sample(64, 48, 1), sample(300, 48, 2), sample(100, 48, 3));
    let with = |backend: &str| {
        let backend: Backend = serde_json::from_str(backend).unwrap();
        let config = KeyValueConfig { backend, expected_keys_per_query: Some(12.0), ..KeyValueConfig::default() };
        let answers = build(&config, &w, None, Some(&calibration)).search(x.view(), None).unwrap();
        answers.into_iter().map(|q| q.hits.iter().map(|h| h.key).collect::<Vec<_>>()).collect::<Vec<_>>()
    };
    let exact = with(r#"{"type":"flat"}"#);
    let recall = |found: &[Vec<u32>]| {
        let all: usize = exact.iter().map(Vec::len).sum();
        let both = exact.iter().zip(found).map(|(e, f)| e.iter().filter(|k| f.contains(k)).count()).sum::<usize>();
        both as f64 / all as f64
    };
    let codes = recall(&with(r#"{"type":"pq","subvectors":12,"codewords":16}"#));
    let refined = recall(&with(r#"{"type":"pq","subvectors":12,"codewords":16,"store_float_keys":true}"#));
    assert!(refined > 0.95 && refined > codes, "{codes} without, {refined} with float keys");
}

fn proposing() -> impl Strategy<Value = Backend> {
    let graph = prop_oneof![Just(GraphType::F32), Just(GraphType::F16), Just(GraphType::Bf16)];
    prop_oneof![
        (1usize..6, 1usize..4, any::<bool>()).prop_map(|(clusters, probes, store_float_keys)| Backend::IvfPq {
            clusters,
            probes: probes.min(clusters),
            subvectors: 2,
            bits: 3,
            seed: 1,
            store_float_keys,
        }),
        (graph, any::<bool>()).prop_map(|(vectors, store_float_keys)| Backend::Hnsw {
            vectors,
            connectivity: 4,
            expansion_add: 16,
            expansion_search: 4,
            store_float_keys,
        }),
    ]
}

proptest! {
    /// What a backend that looks at some keys finds is what one that looks at all of them finds, with the same scores,
    /// less what it missed; no error is promised of it; and it comes back from its parts.
    #[test]
    fn proposed_keys_are_hits(backend in proposing(), out in 2usize..12, inputs in 2usize..12, calibrated in any::<bool>(), two_sided in any::<bool>(), seed in 0u64..200) {
        let config = KeyValueConfig {
            backend,
            sides: if two_sided { Sides::Both } else { Sides::Positive },
            expected_keys_per_query: Some(1.5),
            ..KeyValueConfig::default()
        };
        let (w, calibration) = (sample(out, inputs, seed), sample(3 * inputs, inputs, seed + 1));
        let layer = build(&config, &w, None, calibrated.then_some(&calibration));
        let x = sample(6, inputs, seed + 2);
        let found = layer.search(x.view(), None).unwrap();
        prop_assert_eq!(found.len(), x.nrows());
        // Float keys beside codes are what scores come from.
        let keys = layer.core.float_keys.as_ref().map_or_else(|| layer.keys().to_owned(), Clone::clone);
        let scores = |x: &Array2<f32>| (x - &layer.core.mean).dot(&keys.t());
        let ranks = |scores: &Array2<f32>| {
            let contributions = scores * &ArrayView1::from(layer.scales());
            if two_sided { contributions.mapv(f32::abs) } else { contributions }
        };
        let threshold = found[0].threshold;
        if calibrated {
            // The threshold lies between those of one key and of two keys an input of the calibration.
            let all = ranks(&scores(&calibration));
            let mean = all.iter().filter(|&&rank| rank >= threshold).count() as f64 / all.nrows() as f64;
            let slack = 2.0 / all.nrows() as f64;
            prop_assert!((1.0 - slack..=2.0 + slack).contains(&mean), "{} keys an input", mean);
        }
        let scores = scores(&x);
        let ranks = ranks(&scores);
        for (row, answer) in found.iter().enumerate() {
            prop_assert_eq!(answer.certified_error, None);
            prop_assert_eq!(answer.threshold, threshold);
            let mut keys: Vec<u32> = answer.hits.iter().map(|hit| hit.key).collect();
            for hit in &answer.hits {
                let contribution = if two_sided { hit.contribution.abs() } else { hit.contribution };
                prop_assert!(contribution >= threshold);
                let expected = scores[[row, hit.key as usize]];
                prop_assert!((hit.score - expected).abs() <= 1e-4 * (1.0 + expected.abs()), "{} for {}", hit.score, expected);
            }
            keys.sort_unstable();
            keys.dedup();
            prop_assert_eq!(keys.len(), answer.hits.len(), "a key is hit twice");
            // A search of all cells misses nothing, but for scores that rounding moves over the threshold.
            if matches!(backend, Backend::IvfPq { clusters, probes, store_float_keys: false, .. } if probes == clusters) {
                let clear = threshold + 1e-4 * (1.0 + threshold.abs());
                let missed = (0u32..).zip(ranks.row(row)).find(|(key, rank)| **rank > clear && !keys.contains(key));
                prop_assert!(missed.is_none(), "{:?} over {}", missed, threshold);
            }
        }
        let all = layer.clone().shared();
        let back = configured(&layer_from_parts(all.to_parts()).unwrap(), &all.config()).unwrap();
        prop_assert_eq!(back.to_parts(), all.to_parts());
        prop_assert_eq!(back.config(), all.config());
        let y = |layer: &SharedLayer| layer.forward(x.view(), Accuracy::Approximate).unwrap().y;
        prop_assert_eq!(y(&back), y(&all));
        // With every key: exact from float keys, and within its bound from others.
        let full = all.forward(x.view(), Accuracy::Full).unwrap();
        let exact = x.dot(&w.t());
        let error = relative_error(full.y.view(), exact.view());
        if backend.stores_float_keys() {
            prop_assert!(error < 1e-4, "{}", error);
        }
        if let Some(bound) = full.relative_error_bound {
            prop_assert!(error <= bound);
        }
    }

    /// A walk that may look at every key finds every hit.
    #[test]
    fn wide_walks_miss_little(seed in 0u64..40) {
        let (w, x) = (sample(40, 48, seed), sample(150, 48, seed + 1));
        let config = |backend| KeyValueConfig { backend, expected_keys_per_query: Some(8.0), ..KeyValueConfig::default() };
        let graph = Backend::Hnsw { vectors: GraphType::F32, connectivity: 16, expansion_add: 64, expansion_search: 40, store_float_keys: true };
        let exact = build(&config(Backend::default()), &w, None, Some(&x)).search(x.view(), None).unwrap();
        let found = build(&config(graph), &w, None, Some(&x)).search(x.view(), None).unwrap();
        let (mut hits, mut missed) = (0, 0);
        for (exact, found) in exact.iter().zip(&found) {
            hits += exact.hits.len();
            missed += exact.hits.iter().filter(|hit| !found.hits.iter().any(|f| f.key == hit.key)).count();
        }
        prop_assert!(hits > 500 && missed * 20 <= hits, "{} of {} missed", missed, hits);
    }
}

#[test]
fn changed_graphs_are_refused() {
    let (w, x) = (sample(8, 6, 1), sample(30, 6, 2));
    let backend = Backend::Hnsw {
        vectors: GraphType::F32,
        connectivity: 4,
        expansion_add: 16,
        expansion_search: 8,
        store_float_keys: false,
    };
    let layer = build(&KeyValueConfig { backend, ..KeyValueConfig::default() }, &w, None, Some(&x));
    let mut parts = layer.to_parts();
    let graph = parts.tensors.iter_mut().find(|t| t.name == "graph").unwrap();
    let mut bytes = graph.data.to_vec();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    graph.data = bytes.into();
    refused(layer_from_parts(parts), &["hash"]);
    refused(layer.search(x.view(), Some(Limit::MaxError(0.1))), &["max_relative_error", "flat"]);
}

/// The same error whatever the size of inputs and weights, in every format of keys and values; what f32 cannot hold is refused.
#[test]
fn sizes_do_not_matter() {
    let normal = |rows, seed| crate::linalg::normal_matrix(rows, 32, seed).mapv(|v| v as f32);
    let (w, x) = (normal(32, 1), normal(200, 2) + 0.5);
    for (backend, values) in [
        (r#"{"type": "flat"}"#, r#""f32""#),
        (r#"{"type": "flat", "keys": "f16"}"#, r#""f16""#),
        (r#"{"type": "flat", "keys": "int8"}"#, r#""int8""#),
        (r#"{"type": "pq", "subvectors": 16}"#, r#"{"type": "pq"}"#),
        (r#"{"type": "ivf_pq", "clusters": 4, "probes": 4, "subvectors": 16}"#, r#""f32""#),
        (r#"{"type": "hnsw"}"#, r#""f32""#),
        (r#"{"type": "hnsw", "vectors": "f16"}"#, r#""f32""#),
    ] {
        let config = format!(r#"{{"expected_keys_per_query": 32, "backend": {backend}, "values": {values}}}"#);
        let config: KeyValueConfig = serde_json::from_str(&config).unwrap();
        let error = |weights: f32, inputs: f32| {
            let (w, x) = (&w * weights, &x * inputs);
            let layer = compress(&config, w.view(), None, Some(&Calibration::of(x.clone())?))?;
            let y = layer_from_parts(layer.to_parts())?.linear(x.view(), Accuracy::Approximate)?.y;
            Ok::<_, Error>(relative_error(y.view(), x.dot(&w.t()).view()))
        };
        let plain = error(1.0, 1.0).unwrap();
        for (weights, inputs) in [
            (1.0, 1e7),
            (1.0, 1e-7),
            (1.0, 1e4),
            (1.0, 1e-4),
            (1.0, 1e5),
            (1.0, 1e12),
            (1e20, 1e-10),
            (1e20, 1.0),
            (1e-15, 1e-10),
            (1e-20, 1.0),
        ] {
            let found = error(weights, inputs).unwrap_or_else(|e| panic!("{backend} × {weights}, × {inputs}: {e}"));
            assert!(found < 1.25 * plain + 1e-5, "{backend} × {weights}, × {inputs}: {found} {plain}");
        }
    }
    let huge = &normal(32, 1).mapv(|v| v.clamp(-3.0, 3.0)) * 1e38;
    refused_as(compress(&KeyValueConfig::default(), huge.view(), None, None), "only finite numbers");
    let steep = KeyValueConfig { ridge_relative: 1e300, ..KeyValueConfig::default() };
    refused_as(compress(&steep, w.view(), None, Some(&Calibration::of(x).unwrap())), "only finite numbers");
}

/// An output that is far shorter than the terms that cancel to it has a bound that holds, or none.
#[test]
fn outputs_that_cancel_have_no_bound_that_does_not_hold() {
    let w = sample(24, 32, 1);
    let w64 = w.mapv(f64::from);
    let inverse = crate::linalg::regularized_inverse(w64.dot(&w64.t()).view(), 0.0).unwrap();
    let to_null_space = Array2::<f64>::eye(32) - w64.t().dot(&inverse).dot(&w64);
    let inputs = sample(40, 32, 7).mapv(f64::from);
    let norm = |v: Array1<f64>| v.dot(&v).sqrt();
    let mut bounded = 0;
    for mean in [0.0, 5.0] {
        // Every key is used.
        let layer = build(&KeyValueConfig::default(), &w, None, Some(&(sample(128, 32, 3) + mean)));
        for share in [0.0, 1e-9, 1e-6, 1e-3, 1.0] {
            for length in [0.0, 1e-8, 1e-3, 1.0] {
                let x = ((inputs.dot(&to_null_space) + &inputs * share) * length).mapv(|v| v as f32);
                let exact = x.mapv(f64::from).dot(&w64.t());
                let y = layer.linear(x.view(), Accuracy::Approximate).unwrap().y.mapv(f64::from);
                for (i, answer) in layer.search(x.view(), None).unwrap().iter().enumerate() {
                    let Some(bound) = answer.certified_error else { continue };
                    bounded += 1;
                    let relative = norm(&y.row(i) - &exact.row(i)) / norm(exact.row(i).to_owned());
                    assert!(relative <= bound, "mean {mean}, {share}, {length}: true {relative} certified {bound}");
                }
            }
        }
    }
    assert!(bounded > 40, "{bounded}");
}

#[track_caller]
fn refused_as<T>(result: Result<T, Error>, says: &str) {
    let Err(error) = result else { panic!("nothing was refused; expected {says}") };
    assert!(error.to_string().contains(says), "{error}");
}

/// Inputs that say nothing leave the layer as it is without them, and it says so.
#[test]
fn statistics_that_vanish_are_not_used() {
    let normal = |rows, seed| crate::linalg::normal_matrix(rows, 32, seed).mapv(|v| v as f32);
    let w = normal(24, 1);
    let config = KeyValueConfig::default();
    let plain = compress(&config, w.view(), None, None).unwrap();
    let of = |config: &KeyValueConfig, x: Array2<f32>| {
        let layer = compress(config, w.view(), None, Some(&Calibration::of(x).unwrap())).unwrap();
        (layer.config()["adapted"].clone(), layer_from_parts(layer.to_parts()).unwrap().to_parts())
    };
    for x in [Array2::zeros((16, 32)), Array2::ones((100, 32)), Array2::ones((1, 32))] {
        let (adapted, parts) = of(&config, x);
        assert!(adapted[0].as_str().unwrap().starts_with("calibration: not used"), "{adapted}");
        assert_eq!(
            (parts.keys, parts.values, parts.tensors),
            (plain.to_parts().keys, plain.to_parts().values, plain.to_parts().tensors)
        );
    }
    let bare = KeyValueConfig { ridge_regularization: 0.0, ridge_relative: 0.0, ..config.clone() };
    let (adapted, _) = of(&bare, normal(8, 2));
    assert!(adapted[0].as_str().unwrap().starts_with("ridge_relative: 0 to"), "{adapted}");
    assert!(of(&config, normal(8, 2)).0.is_null());
}

/// A bound that rounding does not let a layer certify: how many inputs miss it, and why.
#[test]
fn promises_that_are_not_kept_say_so() {
    let normal = |rows, seed| crate::linalg::normal_matrix(rows, 32, seed).mapv(|v| v as f32);
    let (w, x) = (normal(32, 1), normal(128, 2));
    let of = |values: &str, asked: f64, capacity: Option<usize>, calibrated: bool| {
        let values: RowFormat = serde_json::from_str(values).unwrap();
        let config = KeyValueConfig {
            values,
            max_relative_error: Some(asked),
            max_ids_capacity: capacity,
            ..KeyValueConfig::default()
        };
        let calibration = calibrated.then(|| Calibration::of(x.clone()).unwrap());
        let layer = compress(&config, w.view(), None, calibration.as_ref()).unwrap();
        let report = layer.search_report(x.view()).unwrap();
        let answers = layer.search(x.view(), None).unwrap();
        let above = answers.iter().filter(|a| a.certified_error.is_none_or(|bound| bound > asked)).count();
        assert_eq!(report.missed_queries, Some(above));
        if capacity.is_none() {
            let floors = layer.search(x.view(), Some(Limit::Threshold(0.0))).unwrap();
            let floor = floors.iter().map(|a| a.certified_error.unwrap()).fold(0.0, f64::max);
            assert!((report.error_floor.unwrap() - floor).abs() < 1e-5, "{report:?} {floor}");
        }
        (layer.unkept_promise(128, &report), layer.unkept_promise(0, &SearchReport::default()), report)
    };
    let (note, known, report) = of(r#""f32""#, 0.05, None, true);
    assert_eq!((note, known, report.missed_queries), (None, None, Some(0)));
    for calibrated in [true, false] {
        let (note, _, report) = of(r#""int8""#, 1e-3, None, calibrated);
        assert_eq!(report.missed_queries, Some(128));
        assert!(note.unwrap().contains("missed by 128 of 128 inputs: rounded keys and values alone leave up to 0.0"));
    }
    assert!(of(r#""int8""#, 1e-3, None, false).1.unwrap().contains("every input"));
    assert!(of(r#""f32""#, 0.05, Some(2), true).0.unwrap().contains("max_ids_capacity"));
    let few = KeyValueConfig { expected_keys_per_query: Some(4.0), ..KeyValueConfig::default() };
    let layer = compress(&few, w.view(), None, None).unwrap();
    let report = layer.search_report(x.view()).unwrap();
    assert_eq!((report.missed_queries, report.error_floor, layer.unkept_promise(128, &report)), (None, None, None));
}
