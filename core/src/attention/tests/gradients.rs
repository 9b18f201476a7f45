use ndarray::{Array2, Array4};
use proptest::prelude::*;

use super::super::{AttentionCodebook, AttentionMask, VqAttention, exact_gradients};
use super::codes::replaced;
use super::{naive, sample, three};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    /// A step along any one number changes the loss as the gradient says (central differences of the definition in f64).
    #[test]
    fn gradients_are_slopes(
        heads in prop::sample::select(vec![(1usize, 1usize), (4, 2)]),
        queries in prop::sample::select(vec![1usize, 5, 130]),
        keys in prop::sample::select(vec![1usize, 7, 131]),
        causal in any::<bool>(),
        masked in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let keys = if causal { keys.max(queries) } else { keys };
        let (q, k, v) = (sample((2, heads.0, queries, 3), seed), sample((2, heads.1, keys, 3), seed ^ 1), sample((2, heads.1, keys, 4), seed ^ 2));
        let grad = sample((2, heads.0, queries, 4), seed ^ 3);
        let there = Array2::from_shape_fn((2, keys), |(b, j)| !(j + b).is_multiple_of(3));
        let mask = AttentionMask { causal, keys: masked.then(|| there.view()), segments: None };
        let loss = |q: &Array4<f32>, k: &Array4<f32>, v: &Array4<f32>| {
            let output = naive(q, k, v, 0.7, &mask).0;
            output.iter().zip(&grad).map(|(o, g)| o * f64::from(*g)).sum::<f64>()
        };
        let found = exact_gradients(q.view(), k.view(), v.view(), 0.7, &mask, grad.view()).unwrap();
        const STEP: f32 = 1.0 / 64.0;
        for number in 0..4u64 {
            let place = |x: &Array4<f32>| (seed.rotate_left(7 * number as u32) % x.len() as u64) as usize;
            let moved = |x: &Array4<f32>, by: f32| {
                let mut x = x.clone();
                let at = place(&x);
                x.as_slice_mut().unwrap()[at] += by;
                x
            };
            let slope = |up: f64, down: f64| (up - down) / f64::from(2.0 * STEP);
            let slopes = [
                (&found.q, slope(loss(&moved(&q, STEP), &k, &v), loss(&moved(&q, -STEP), &k, &v)), place(&q)),
                (&found.k, slope(loss(&q, &moved(&k, STEP), &v), loss(&q, &moved(&k, -STEP), &v)), place(&k)),
                (&found.v, slope(loss(&q, &k, &moved(&v, STEP)), loss(&q, &k, &moved(&v, -STEP))), place(&v)),
            ];
            for (found, expected, at) in slopes {
                let found = f64::from(found.as_slice().unwrap()[at]);
                prop_assert!((found - expected).abs() < 2e-3 * (1.0 + expected.abs()), "{} for {}", found, expected);
            }
        }
    }
}

#[test]
fn codewords_hand_gradients_on_and_commit() {
    let (q, k, v) = (sample((2, 4, 20, 6), 1), sample((2, 2, 20, 6), 2), sample((2, 2, 20, 5), 3));
    let grad = sample((2, 4, 20, 5), 4);
    let (of_queries, of_keys) = (
        AttentionCodebook::of_codewords(three((4, 7, 6), 5)).unwrap(),
        AttentionCodebook::of_codewords(three((2, 7, 6), 6)).unwrap(),
    );
    let mask = AttentionMask { causal: true, ..AttentionMask::default() };
    let (asked, near) = (replaced(&of_queries, &q), replaced(&of_keys, &k));
    for queries in [Some(&of_queries), None] {
        let attention = VqAttention::new(&of_keys, queries, 0.5, 8);
        let found = attention.gradients(q.view(), k.view(), v.view(), &mask, grad.view(), 0.25).unwrap();
        let asked = queries.map_or(&q, |_| &asked);
        let over = exact_gradients(asked.view(), near.view(), v.view(), 0.5, &mask, grad.view()).unwrap();
        let commit = |x: &Array4<f32>, words: &Array4<f32>| (x - words) * (0.25 * 2.0 / 40.0);
        let off = |a: &Array4<f32>, b: &Array4<f32>| (a - b).iter().fold(0f32, |most, d| most.max(d.abs()));
        assert!(off(&found.q, &(over.q + commit(&q, asked))) < 1e-5);
        assert!(off(&found.k, &(over.k + commit(&k, &near))) < 1e-5);
        assert!(off(&found.v, &over.v) < 1e-5);
    }
    let window = VqAttention { agg_cache: false, ..VqAttention::new(&of_keys, None, 0.5, 8) };
    let refused = window.gradients(q.view(), k.view(), v.view(), &mask, grad.view(), 0.0);
    assert!(refused.unwrap_err().to_string().contains("window"));
    assert!(exact_gradients(q.view(), k.view(), v.view(), 1.0, &mask, v.view()).is_err());
}
