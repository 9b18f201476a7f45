use ndarray::{Array2, Array4, s};
use proptest::prelude::*;

use super::super::{AttentionMask, HyperAttention, exact};
use super::{dot, naive, off, sample};

/// One part of HyperAttention by its definition, in f64: the scores of a query's own block, and of the samples of others.
fn estimated(hyper: &HyperAttention, q: &Array4<f32>, k: &Array4<f32>, v: &Array4<f32>, scale: f32) -> Array4<f64> {
    let sample = hyper.sample(q.view(), k.view(), false).unwrap();
    let (queries, keys, shared) = (q.dim().2, k.dim().2, q.dim().1 / k.dim().1);
    let (of_queries, of_keys) = (sample.hashes(q.view()), sample.hashes(k.view()));
    let blocks = keys.div_ceil(hyper.block_size).max(1);
    let block = |place: usize, tokens: usize| (0..blocks).find(|b| place < (b + 1) * tokens / blocks).unwrap();
    let mut output = Array4::zeros((q.dim().0, q.dim().1, queries, v.dim().3));
    for (b, h) in ndarray::indices((q.dim().0, q.dim().1)) {
        let order = |hashes: ndarray::ArrayView1<u32>| {
            let mut order: Vec<usize> = (0..hashes.len()).collect();
            order.sort_by_key(|&token| hashes[token]);
            order
        };
        let sorted = (order(of_queries.slice(s![b, h, ..])), order(of_keys.slice(s![b, h / shared, ..])));
        for (place, &query) in sorted.0.iter().enumerate() {
            let own = block(place, queries);
            let mut seen: Vec<(usize, f64)> = (0..keys).filter(|&p| block(p, keys) == own).map(|p| (p, 1.0)).collect();
            if blocks > 1 {
                let weight = keys as f64 / hyper.sample_size as f64;
                let sampled = sample.keys[0].slice(s![b, h, ..]);
                let others = sampled.iter().map(|&p| p as usize).filter(|&p| block(p, keys) != own);
                seen.extend(others.map(|p| (p, weight)));
            }
            let scored = seen.into_iter().map(|(p, weight)| {
                let key = sorted.1[p];
                let score = dot(q.slice(s![b, h, query, ..]), k.slice(s![b, h / shared, key, ..]));
                (key, weight * (f64::from(scale) * score).exp())
            });
            let scored: Vec<_> = scored.collect();
            let sum: f64 = scored.iter().map(|(_, weight)| weight).sum();
            for (key, weight) in scored {
                let value = v.slice(s![b, h / shared, key, ..]);
                let mut output = output.slice_mut(s![b, h, query, ..]);
                output.zip_mut_with(&value, |o, v| *o += weight / sum * f64::from(*v));
            }
        }
    }
    output
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Lengths that blocks do not divide, grouped heads, more or fewer keys than queries.
    #[test]
    fn a_part_is_the_definition(
        heads in prop::sample::select(vec![(1usize, 1usize), (4, 2)]),
        queries in prop::sample::select(vec![1usize, 7, 64, 150]),
        keys in prop::sample::select(vec![1usize, 16, 65, 200]),
        block_size in prop::sample::select(vec![1usize, 16, 50, 300]),
        sample_size in 1usize..40,
        projections in prop::sample::select(vec![0usize, 4, 24]),
        seed in any::<u64>(),
    ) {
        let (q, k, v) = (sample((2, heads.0, queries, 6), seed), sample((2, heads.1, keys, 6), seed ^ 1), sample((2, heads.1, keys, 5), seed ^ 2));
        let hyper = HyperAttention { block_size, sample_size, projections, min_seq_len: 1, seed };
        let found = hyper.attend(q.view(), k.view(), v.view(), 0.6, false).unwrap();
        let expected = estimated(&hyper, &q, &k, &v, 0.6);
        for (found, expected) in found.output.iter().zip(&expected) {
            prop_assert!((f64::from(*found) - expected).abs() < 2e-5, "{} for {}", found, expected);
        }
    }

    /// With room for all keys in a block nothing is estimated, whatever the halves are.
    #[test]
    fn one_block_is_exact(
        tokens in prop::sample::select(vec![1usize, 2, 33, 129, 250]),
        min_seq_len in prop::sample::select(vec![1usize, 3, 16, 64, 400]),
        causal in any::<bool>(),
        scale in prop::sample::select(vec![0.5f32, 60.0]),
        seed in any::<u64>(),
    ) {
        let (q, k, v) = (sample((2, 4, tokens, 6), seed), sample((2, 2, tokens, 6), seed ^ 1), sample((2, 2, tokens, 5), seed ^ 2));
        let hyper = HyperAttention { block_size: 512, sample_size: 8, projections: 5, min_seq_len, seed };
        let found = hyper.attend(q.view(), k.view(), v.view(), scale, causal).unwrap();
        let off = off(&found, &naive(&q, &k, &v, scale, &AttentionMask { causal, ..AttentionMask::default() }));
        prop_assert!(off < 2e-5 * (1.0 + f64::from(scale)), "{}", off);
    }
}

#[test]
fn samples_come_nearer_the_more_there_are() {
    let (q, k, v) = (sample((1, 1, 700, 8), 1), sample((1, 1, 700, 8), 2), sample((1, 1, 700, 8), 3));
    let reference =
        exact(q.view(), k.view(), v.view(), 1.0, &AttentionMask { causal: true, ..AttentionMask::default() }).unwrap();
    let error = |sample_size: usize| {
        let of_seed = |seed: u64| {
            let hyper = HyperAttention { block_size: 32, sample_size, projections: 6, min_seq_len: 64, seed };
            let found = hyper.attend(q.view(), k.view(), v.view(), 1.0, true).unwrap();
            assert_eq!(found.output, hyper.attend(q.view(), k.view(), v.view(), 1.0, true).unwrap().output);
            (&found.output - &reference.output).iter().map(|d| d * d).sum::<f32>()
        };
        (0..6).map(of_seed).sum::<f32>()
    };
    let errors = [8, 64, 512].map(error);
    assert!(errors[0] > 2.0 * errors[1] && errors[1] > 2.0 * errors[2], "{errors:?}");
}

#[test]
fn settings_and_draws_that_do_not_fit_are_refused() {
    let x = sample((1, 2, 40, 4), 1);
    let hyper = HyperAttention { block_size: 8, sample_size: 4, projections: 3, min_seq_len: 4, seed: 0 };
    let refuse = |hyper: HyperAttention, keys: usize, expected: &str| {
        let k = x.slice(s![.., .., ..keys, ..]);
        let message = hyper.attend(x.view(), k, k, 1.0, true).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    refuse(HyperAttention { block_size: 0, ..hyper }, 40, "at least 1");
    refuse(HyperAttention { projections: 25, ..hyper }, 40, "lsh_num_projs: found 25, expected at most 24");
    refuse(HyperAttention { min_seq_len: 0, ..hyper }, 40, "min_seq_len");
    refuse(hyper, 39, "40 for 39 keys");
    let mut sample = hyper.sample(x.view(), x.view(), false).unwrap();
    let run = |sample: &_| hyper.attend_with(x.view(), x.view(), x.view(), 1.0, false, sample);
    assert!(run(&sample).is_ok());
    sample.keys[0][[0, 1, 2]] = 40;
    assert!(run(&sample).unwrap_err().to_string().contains("found 40, expected below 40"));
    sample.directions = Array2::zeros((4, 2));
    assert!(run(&sample).unwrap_err().to_string().contains("shapes of the random sample"));
}
