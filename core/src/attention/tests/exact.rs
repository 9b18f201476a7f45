use ndarray::{Array2, Array4};
use proptest::prelude::*;

use super::super::{AttentionMask, exact};
use super::{naive, off, sample};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Several tiles and parts of one, grouped heads, padding and documents; queries that see nothing.
    #[test]
    fn exact_is_the_definition(
        heads in prop::sample::select(vec![(1usize, 1usize), (4, 2), (3, 1)]),
        queries in prop::sample::select(vec![1usize, 5, 128, 131, 300]),
        keys in prop::sample::select(vec![1usize, 7, 256, 257, 530]),
        dims in prop::sample::select(vec![(1usize, 3usize), (16, 16), (20, 8)]),
        causal in any::<bool>(),
        masked in any::<bool>(),
        documents in any::<bool>(),
        scale in prop::sample::select(vec![0.0f32, 0.25, 40.0]),
        seed in any::<u64>(),
    ) {
        let batch = 2;
        // Causal queries are those of the last keys.
        let keys = if causal { keys.max(queries) } else { keys };
        let q = sample((batch, heads.0, queries, dims.0), seed);
        let k = sample((batch, heads.1, keys, dims.0), seed ^ 1);
        let v = sample((batch, heads.1, keys, dims.1), seed ^ 2);
        let there = Array2::from_shape_fn((batch, keys), |(b, j)| !(j + b + seed as usize).is_multiple_of(3));
        let of = |tokens: usize| Array2::from_shape_fn((batch, tokens), |(b, j)| ((j + 40 * b) / 90) as u32);
        let (of_queries, of_keys) = (of(queries), of(keys));
        let mask = AttentionMask {
            causal,
            keys: masked.then(|| there.view()),
            segments: documents.then(|| (of_queries.view(), of_keys.view())),
        };
        let found = exact(q.view(), k.view(), v.view(), scale, &mask).unwrap();
        let off = off(&found, &naive(&q, &k, &v, scale, &mask));
        prop_assert!(off <= 2e-5 * (1.0 + f64::from(scale)), "{}", off);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let zeros = |shape: (usize, usize, usize, usize)| Array4::<f32>::zeros(shape);
    let q = zeros((1, 4, 3, 8));
    let refuse = |k: Array4<f32>, v: Array4<f32>, mask: &AttentionMask, expected: &str| {
        let message = exact(q.view(), k.view(), v.view(), 1.0, mask).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    let all = AttentionMask::default();
    refuse(zeros((1, 3, 5, 8)), zeros((1, 3, 5, 8)), &all, "divisor of 4");
    refuse(zeros((1, 4, 5, 7)), zeros((1, 4, 5, 8)), &all, "shape of the keys");
    refuse(zeros((1, 2, 5, 8)), zeros((1, 2, 6, 8)), &all, "shape of the values");
    refuse(zeros((1, 2, 5, 8)), Array4::from_elem((1, 2, 5, 8), f32::NAN), &all, "the values");
    let short = Array2::from_elem((1, 4), true);
    let masked = AttentionMask { keys: Some(short.view()), ..all };
    refuse(zeros((1, 2, 5, 8)), zeros((1, 2, 5, 8)), &masked, "mask");
    let causal = AttentionMask { causal: true, ..all };
    refuse(zeros((1, 2, 2, 8)), zeros((1, 2, 2, 8)), &causal, "3 for 2 keys");
    let huge = Array4::from_elem((1, 1, 2, 4), 1e30f32);
    let found = exact(huge.view(), huge.view(), huge.view(), 1e9, &all).unwrap_err().to_string();
    assert!(found.contains("beyond"), "{found}");
    assert!(
        exact(q.view(), zeros((1, 4, 0, 8)).view(), zeros((1, 4, 0, 2)).view(), 1.0, &all)
            .unwrap()
            .output
            .iter()
            .all(|o| *o == 0.0)
    );
}

/// One query and many keys, as in decoding: it sees all of them, by every mechanism.
#[test]
fn causal_queries_are_those_of_the_last_keys() {
    use super::super::{AttentionCodebook, CompressedCache, HyperAttention, VqAttention};
    use ndarray::s;
    let (q, k, v) = (sample((2, 4, 40, 6), 1), sample((2, 2, 40, 6), 2), sample((2, 2, 40, 5), 3));
    let words = super::three((2, 8, 6), 4);
    let book = AttentionCodebook::of_codewords(words).unwrap();
    let codes = VqAttention { mem_len: 3, ..VqAttention::new(&book, None, 0.7, 8) };
    let hyper = HyperAttention::default();
    let causal = AttentionMask { causal: true, ..AttentionMask::default() };
    let run = |queries: usize| {
        let q = q.slice(s![.., .., 40 - queries.., ..]);
        let mut cache = CompressedCache::new(2, 2, 8, 5);
        [
            exact(q, k.view(), v.view(), 0.7, &causal).unwrap().output,
            codes.causal(q, k.view(), v.view(), &mut cache).unwrap().output,
            hyper.attend(q, k.view(), v.view(), 0.7, true).unwrap().output,
        ]
    };
    let whole = run(40);
    for queries in [1, 7, 39] {
        for (found, whole) in run(queries).iter().zip(&whole) {
            let expected = whole.slice(s![.., .., 40 - queries.., ..]);
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5), "{queries}");
        }
    }
    // And the gradients of what a query does not see are nothing, others are those of the whole.
    let one = q.slice(s![.., .., 39.., ..]);
    let grad = sample((2, 4, 1, 5), 9);
    let mut all = Array4::zeros((2, 4, 40, 5));
    all.slice_mut(s![.., .., 39.., ..]).assign(&grad);
    let gradients = |q, grad| super::super::exact_gradients(q, k.view(), v.view(), 0.7, &causal, grad).unwrap();
    let (found, expected) = (gradients(one, grad.view()), gradients(q.view(), all.view()));
    assert!(found.k.iter().zip(&expected.k).chain(found.v.iter().zip(&expected.v)).all(|(a, b)| (a - b).abs() < 1e-5));
}
