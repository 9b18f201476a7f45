use ndarray::{Array1, Array2, s};

use super::*;
use crate::layer::{Accuracy, Activation, DenseLayer, Layer, SharedLayer};

fn numbers(rows: usize, columns: usize, seed: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 31 + j * 17 + seed * 7) % 23) as f32 / 23.0 - 0.5)
}

fn layer(rows: usize, columns: usize, seed: usize) -> SharedLayer {
    DenseLayer::from_f32(numbers(rows, columns, seed).view(), None).shared()
}

fn decoder(window: Option<usize>) -> Decoder {
    let (features, heads, kv_heads, head_dim, hidden) = (16, 4, 2, 6, 20);
    let norm =
        |seed: usize, n: usize| Norm::rms(Array1::from_shape_fn(n, |i| 1.0 + ((i + seed) % 5) as f32 / 8.0), 1e-5);
    let block = |n: usize| DecoderBlock {
        attention_norm: norm(n, features),
        query: layer(heads * head_dim, features, n + 1),
        key: layer(kv_heads * head_dim, features, n + 2),
        value: layer(kv_heads * head_dim, features, n + 3),
        output: layer(features, heads * head_dim, n + 4),
        query_norm: Some(norm(n + 1, head_dim)),
        key_norm: None,
        feed_forward_norm: norm(n + 2, features),
        gate: layer(hidden, features, n + 5),
        up: layer(hidden, features, n + 6),
        down: layer(features, hidden, n + 7),
    };
    let rotary = Rotary::new(head_dim, 100.0, RotaryScaling::None).unwrap();
    let config = DecoderConfig { heads, kv_heads, head_dim, rotary, window, activation: Activation::Silu };
    let embedding = layer(30, features, 100);
    Decoder::new(config, embedding.clone(), vec![block(0), block(10)], norm(9, features), embedding).unwrap()
}

/// The same in f64, one query after another, without a cache.
fn reference(decoder: &Decoder, tokens: &[u32]) -> Array2<f64> {
    let wide = |layer: &SharedLayer| layer.weight().unwrap().mapv(f64::from);
    let config = decoder.config();
    let normed = |norm: &Norm, x: &Array2<f64>| norm.of(x.mapv(|v| v as f32).view()).mapv(f64::from);
    let mut x = decoder.embedding_rows(tokens).mapv(f64::from);
    for block in decoder.blocks() {
        let n = normed(&block.attention_norm, &x);
        let heads = |layer: &SharedLayer, norm: Option<&Norm>, turned: bool| {
            let mut all = n.dot(&wide(layer).t()).mapv(|v| v as f32);
            for (position, mut row) in all.rows_mut().into_iter().enumerate() {
                for head in row.as_slice_mut().unwrap().chunks_exact_mut(config.head_dim) {
                    norm.iter().for_each(|norm| norm.apply(head));
                    if turned {
                        config.rotary.at(position, tokens.len()).turn(head);
                    }
                }
            }
            all.mapv(f64::from)
        };
        let q = heads(&block.query, block.query_norm.as_ref(), true);
        let k = heads(&block.key, block.key_norm.as_ref(), true);
        let v = heads(&block.value, None, false);
        let mut attended = Array2::<f64>::zeros((tokens.len(), config.heads * config.head_dim));
        for i in 0..tokens.len() {
            for head in 0..config.heads {
                let of = |array: &Array2<f64>, row: usize, head: usize| {
                    array.slice(s![row, head * config.head_dim..(head + 1) * config.head_dim]).to_owned()
                };
                let kv = head / (config.heads / config.kv_heads);
                let first = config.window.map_or(0, |window| (i + 1).saturating_sub(window));
                let scores: Vec<f64> = (first..=i)
                    .map(|j| (of(&q, i, head).dot(&of(&k, j, kv)) / (config.head_dim as f64).sqrt()).exp())
                    .collect();
                let sum: f64 = scores.iter().sum();
                for (j, score) in (first..=i).zip(scores) {
                    let mut out = attended.slice_mut(s![i, head * config.head_dim..(head + 1) * config.head_dim]);
                    out += &(of(&v, j, kv) * (score / sum));
                }
            }
        }
        x = x + attended.dot(&wide(&block.output).t());
        let n = normed(&block.feed_forward_norm, &x);
        let gate = n.dot(&wide(&block.gate).t()).mapv(|v| v / (1.0 + (-v).exp()));
        x = x + (gate * n.dot(&wide(&block.up).t())).dot(&wide(&block.down).t());
    }
    decoder.logits_of(&x.mapv(|v| v as f32)).mapv(f64::from)
}

impl Decoder {
    fn embedding_rows(&self, tokens: &[u32]) -> Array2<f32> {
        self.embedding().rows(tokens).unwrap()
    }

    fn logits_of(&self, x: &Array2<f32>) -> Array2<f32> {
        self.head().forward(self.norm().of(x.view()).view(), Accuracy::Full).unwrap().y
    }
}

fn close(found: &Array2<f32>, expected: &Array2<f64>) {
    assert_eq!(found.dim(), expected.dim());
    let off = found.iter().zip(expected).map(|(f, e)| (f64::from(*f) - e).abs()).fold(0.0, f64::max);
    assert!(off < 1e-4, "{off}");
}

#[test]
fn a_text_is_read_as_a_reference_reads_it() {
    let tokens: Vec<u32> = (0..140).map(|i| (i * 7 % 30) as u32).collect();
    for window in [None, Some(1), Some(9), Some(133)] {
        let decoder = decoder(window);
        let expected = reference(&decoder, &tokens);
        let mut cache = decoder.cache();
        close(&decoder.forward(&tokens, &mut cache, Logits::All, Accuracy::Full).unwrap(), &expected);
        assert_eq!(cache.len(), 140);
        // In parts, and token by token.
        let mut cache = decoder.cache();
        let mut last = Array2::zeros((0, 0));
        for part in [&tokens[..100], &tokens[100..137], &tokens[137..138], &tokens[138..]] {
            last = decoder.forward(part, &mut cache, Logits::Last, Accuracy::Full).unwrap();
        }
        close(&last, &expected.slice(s![139.., ..]).to_owned());
        // Back to an earlier place.
        cache.truncate(50);
        let again = decoder.forward(&tokens[50..60], &mut cache, Logits::All, Accuracy::Full).unwrap();
        close(&again, &expected.slice(s![50..60, ..]).to_owned());
    }
}

#[test]
fn what_cannot_be_read_leaves_the_cache_as_it_was() {
    let decoder = decoder(None);
    let mut cache = decoder.cache();
    decoder.forward(&[1, 2], &mut cache, Logits::Last, Accuracy::Full).unwrap();
    let before = cache.clone();
    for wrong in [&[][..], &[3, 30], &[u32::MAX]] {
        assert!(decoder.forward(wrong, &mut cache, Logits::All, Accuracy::Full).is_err());
        assert_eq!(cache, before);
    }
}

#[test]
fn layers_have_to_fit() {
    let good = decoder(None);
    let with = |change: &dyn Fn(&mut DecoderBlock, &mut DecoderConfig)| {
        let (mut blocks, mut config) = (good.blocks().to_vec(), good.config().clone());
        change(&mut blocks[1], &mut config);
        Decoder::new(config, good.embedding().clone(), blocks, good.norm().clone(), good.head().clone())
            .unwrap_err()
            .to_string()
    };
    assert!(with(&|block, _| block.key = layer(13, 16, 0)).contains("the key of block 1"));
    assert!(with(&|block, _| block.down = layer(16, 21, 0)).contains("the down of block 1"));
    assert!(with(&|_, config| config.kv_heads = 3).contains("4 heads of queries, 3 of keys"));
    assert!(with(&|_, config| config.window = Some(0)).contains("window"));
}
