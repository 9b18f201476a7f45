use ndarray::{Array2, Axis, s};
use proptest::prelude::*;

use super::*;
use crate::layer::{Accuracy, layer_from_parts};

fn sample(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, columns), |(i, j)| {
        ((i * 7919 + j * 104_729 + i * j * 31 + seed * 613) % 1009) as f32 / 500.0 - 1.0
    })
}

fn config(mechanism: Mechanism, causal: bool) -> VqAttentionConfig {
    VqAttentionConfig {
        mechanism,
        n_head: 4,
        n_kv_head: Some(2),
        d_model: Some(12),
        d_k: Some(6),
        d_v: Some(5),
        n_code: 8,
        block_len: 7,
        causal,
        ..VqAttentionConfig::default()
    }
}

fn layer(config: VqAttentionConfig) -> VqAttentionLayer {
    VqAttentionLayer::by_kmeans(config, sample(50, 24, 1).view(), sample(50, 12, 2).view()).unwrap()
}

const ALL: [Mechanism; 4] = [Mechanism::VqQk, Mechanism::VqK, Mechanism::Hyper, Mechanism::Exact];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// What is stored comes back as it was, under the same name, and attends the same.
    #[test]
    fn parts_are_the_layer(
        mechanism in prop::sample::select(ALL.to_vec()),
        causal in any::<bool>(),
        codes in 1usize..9,
        tokens in 0usize..20,
        mem_len in 0usize..6,
    ) {
        let coded = matches!(mechanism, Mechanism::VqQk | Mechanism::VqK);
        let config = VqAttentionConfig { n_code_k: coded.then_some(codes), mem_len, ..config(mechanism, causal) };
        let mut layer = layer(config);
        let [q, k, v] = [(24, 4, 3), (12, 2, 4), (10, 2, 5)].map(|(width, heads, seed)| {
            batch_in_heads(sample(tokens, width, seed).insert_axis(Axis(0)).view(), heads, "inputs").unwrap()
        });
        if let Some(mut cache) = layer.empty_cache(1) {
            layer.attend(q.view(), k.view(), v.view(), None, Some(&mut cache)).unwrap();
            layer = layer.with_cache(Some(cache)).unwrap();
        }
        let parts = layer.to_parts();
        let back = layer_from_parts(parts.clone()).unwrap();
        let back = back.downcast_ref::<VqAttentionLayer>().unwrap();
        prop_assert_eq!(back.settings(), layer.settings());
        prop_assert_eq!((back.keys(), back.queries(), back.cache()), (layer.keys(), layer.queries(), layer.cache()));
        prop_assert_eq!(back.to_parts().id(), parts.id());
        let found = [&layer, back].map(|layer| layer.attend(q.view(), k.view(), v.view(), None, None).unwrap());
        prop_assert_eq!(&found[0].output, &found[1].output);
    }
}

#[test]
fn learning_brings_codewords_nearer() {
    let (q, k) = (sample(300, 24, 1), sample(300, 12, 2));
    let far = |heads: usize, seed: usize| {
        let words = sample(heads * 8, 6, seed).into_shape_with_order((heads, 8, 6)).unwrap() * 9.0;
        Some(AttentionCodebook::of_codewords(words).unwrap())
    };
    let config = VqAttentionConfig { c_gamma: 0.8, ..config(Mechanism::VqQk, true) };
    let mut layer = VqAttentionLayer::new(config, far(4, 5), far(2, 6), None).unwrap();
    let mut losses = vec![];
    for number in 0..30 {
        let (after, step) = layer.learn(q.view(), k.view(), number).unwrap();
        losses.push([step.queries.unwrap().commitment, step.keys.unwrap().commitment]);
        layer = after;
    }
    for side in 0..2 {
        assert!(losses[29][side] < 0.5 * losses[0][side], "{losses:?}");
    }
    let (same, step) = layer.learn(Array2::zeros((0, 24)).view(), k.view(), 0).unwrap();
    assert!(step.queries.is_none() && same.queries() == layer.queries() && same.keys() != layer.keys());
}

#[test]
fn what_does_not_fit_is_refused() {
    let refuse = |config: VqAttentionConfig, expected: &str| {
        let found = VqAttentionLayer::by_kmeans(config, sample(50, 24, 1).view(), sample(50, 12, 2).view());
        let message = found.unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    };
    let good = || config(Mechanism::VqQk, true);
    refuse(VqAttentionConfig { n_head: 0, ..good() }, "n_head");
    refuse(VqAttentionConfig { n_kv_head: Some(3), ..good() }, "divisor");
    refuse(VqAttentionConfig { c_gamma: 1.5, ..good() }, "c_gamma");
    refuse(VqAttentionConfig { n_code: 51, ..good() }, "51 for 50 vectors");
    refuse(VqAttentionConfig { d_k: Some(7), ..good() }, "codebook of queries");
    refuse(VqAttentionConfig { d_v: None, ..good() }, "d_model, d_k and d_v");
    refuse(VqAttentionConfig { hyper: Some(crate::attention::HyperAttention::default()), ..good() }, "hyper");
    refuse(VqAttentionConfig { n_code_q: Some(3), ..config(Mechanism::VqK, true) }, "n_code_q");
    refuse(VqAttentionConfig { query: Some("q".into()), ..good() }, "all three");
    let causal = layer(good());
    let [q, k, v] = [(24, 4), (12, 2), (10, 2)]
        .map(|(width, heads)| batch_in_heads(sample(9, width, 3).insert_axis(Axis(0)).view(), heads, "x").unwrap());
    let there = Array2::from_elem((1, 9), true);
    let attend = |layer: &VqAttentionLayer, there: Option<&Array2<bool>>, cache: Option<&mut CompressedCache>| {
        layer.attend(q.view(), k.view(), v.view(), there.map(|t| t.view()), cache).map(|_| ())
    };
    assert!(attend(&causal, Some(&there), None).unwrap_err().to_string().contains("mask"));
    let mut cache = causal.empty_cache(1).unwrap();
    let all = layer(config(Mechanism::VqQk, false));
    assert!(all.empty_cache(1).is_none());
    assert!(attend(&all, Some(&there), None).is_ok());
    assert!(attend(&all, None, Some(&mut cache)).unwrap_err().to_string().contains("a cache"));
    assert!(all.with_cache(Some(cache)).unwrap_err().to_string().contains("only causal"));
    let linear = causal.shared();
    assert!(linear.forward(sample(1, 12, 1).view(), Accuracy::Full).unwrap_err().to_string().contains("attend"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// A layer's settings are those of the formula, in f64: softmax(q kᵀ / √d_k) v over codewords or vectors.
    #[test]
    fn mechanisms_are_the_formula(
        mechanism in prop::sample::select(ALL.to_vec()),
        causal in any::<bool>(),
        scale in prop::sample::select(vec![None, Some(0.9)]),
        tokens in 1usize..25,
        mem_len in 0usize..6,
    ) {
        let layer = layer(VqAttentionConfig { scale, mem_len, ..config(mechanism, causal) });
        let [q, k, v] = [(24, 4, 3), (12, 2, 4), (10, 2, 5)].map(|(width, heads, seed)| {
            batch_in_heads(sample(tokens, width, seed).insert_axis(Axis(0)).view(), heads, "inputs").unwrap()
        });
        let found = layer.attend(q.view(), k.view(), v.view(), None, None).unwrap().output;
        let vector = |book: Option<&AttentionCodebook>, x: &ndarray::Array4<f32>, h: usize, i: usize| {
            let x = x.slice(s![0, h, i, ..]).mapv(f64::from);
            let Some(book) = book else { return x };
            let words = book.codewords().slice(s![h, .., ..]).mapv(f64::from);
            let distance = |word: &ndarray::ArrayView1<f64>| (word - &x).mapv(|d| d * d).sum();
            words.rows().into_iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap().to_owned()
        };
        for (h, i) in ndarray::indices((4, tokens)) {
            let query = vector(layer.queries(), &q, h, i);
            let weight = |j: usize| {
                let score = query.dot(&vector(layer.keys(), &k, h / 2, j)) * scale.unwrap_or(1.0 / 6f64.sqrt());
                if j <= i || !causal { score.exp() } else { 0.0 }
            };
            let weights: Vec<f64> = (0..tokens).map(weight).collect();
            let sum: f64 = weights.iter().sum();
            for d in 0..5 {
                let expected: f64 = (0..tokens).map(|j| weights[j] / sum * f64::from(v[[0, h / 2, j, d]])).sum();
                prop_assert!((f64::from(found[[0, h, i, d]]) - expected).abs() < 2e-5, "{mechanism:?}");
            }
        }
    }
}
