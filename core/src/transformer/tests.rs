use ndarray::{Array1, Array2, ArrayView2, s};

use super::*;
use crate::layer::{
    Accuracy, Activation, ActivationFormat, DenseLayer, Layer, LowRankLayer, Mechanism, SharedLayer, VqAttentionConfig,
    VqAttentionLayer,
};
use crate::quant::{Clipping, PackedMatrix, WeightFormat};

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
        attention: None,
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
        let mut cache = decoder.cache(CacheType::F32);
        close(&decoder.forward(&tokens, &mut cache, Logits::All, Accuracy::Full).unwrap(), &expected);
        assert_eq!(cache.len(), 140);
        // In parts, and token by token.
        let mut cache = decoder.cache(CacheType::F32);
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
    let mut cache = decoder.cache(CacheType::F32);
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
        let (mut blocks, mut config) = (good.blocks().cloned().collect::<Vec<_>>(), good.config().clone());
        change(&mut blocks[1], &mut config);
        Decoder::new(config, good.embedding().clone(), blocks, good.norm().clone(), good.head().clone())
            .unwrap_err()
            .to_string()
    };
    assert!(with(&|block, _| block.key = layer(13, 16, 0)).contains("the key of block 1"));
    assert!(with(&|block, _| block.down = layer(16, 21, 0)).contains("the down of block 1"));
    assert!(
        with(&|block, _| (block.gate, block.up) = (layer(0, 16, 0), layer(0, 16, 0))).contains("the gate of block 1")
    );
    assert!(with(&|_, config| config.kv_heads = 3).contains("4 heads of queries, 3 of keys"));
    assert!(with(&|_, config| config.window = Some(0)).contains("window"));
}

/// The layer, its weight in this many bits.
fn packed(layer: &SharedLayer, format: &str, activations: ActivationFormat) -> SharedLayer {
    let format: WeightFormat = serde_json::from_str(format).unwrap();
    let weight = layer.weight().unwrap();
    let weight = PackedMatrix::quantize(weight.view(), format, Clipping::Absmax, None).unwrap();
    let bias = Array1::from_shape_fn(weight.nrows(), |i| (i % 3) as f32 / 9.0);
    LowRankLayer::of_weight(weight, Some(bias)).unwrap().with_activations(activations).unwrap().shared()
}

/// Layers that are run at once give what each gives by itself, whatever their formats.
#[test]
fn packed_layers_are_run_at_once() {
    const FORMATS: [&str; 5] = [
        r#"{"type": "int4", "group": 8, "scales": "f16"}"#,
        r#"{"type": "int8", "group": 16, "symmetric": true}"#,
        r#"{"type": "int4", "group": "channel", "symmetric": true}"#,
        r#"{"type": "int3", "group": 16}"#,
        r#"{"type": "nf4", "group": 16, "scales": "f16"}"#,
    ];
    let tokens: Vec<u32> = (0..40).map(|i| (i * 7 % 30) as u32).collect();
    let dense = decoder(Some(9));
    for (number, activations) in [ActivationFormat::F32, ActivationFormat::Int8].into_iter().cycle().take(6).enumerate()
    {
        let mut place = number;
        let changed = dense.with_layers(|layer| {
            place += 1;
            let features = layer.in_features();
            let format = FORMATS[place % FORMATS.len()];
            Ok(packed(layer, if features.is_multiple_of(16) { format } else { FORMATS[2] }, activations))
        });
        let at_once = changed.unwrap();
        // The same layers, each wrapped so that it can only be run by itself.
        let by_themselves = at_once.with_layers(|layer| Ok(Alone(layer.clone()).shared())).unwrap();
        let read = |decoder: &Decoder, parts: &[usize]| {
            let (mut cache, mut first, mut found) = (decoder.cache(CacheType::F32), 0, Array2::zeros((0, 30)));
            for part in parts {
                let own = &tokens[first..first + part];
                let y = decoder.forward(own, &mut cache, Logits::All, Accuracy::Approximate).unwrap();
                found.append(ndarray::Axis(0), y.view()).unwrap();
                first += part;
            }
            found
        };
        for parts in [&[40][..], &[1; 40], &[3, 2, 13, 22]] {
            let off = (read(&at_once, parts) - read(&by_themselves, parts)).iter().fold(0f32, |m, v| m.max(v.abs()));
            assert!(off < 1e-4, "{number} {parts:?}: {off}");
        }
        // Several texts at once are each as by itself.
        let (mut a, mut b) = (at_once.cache(CacheType::F32), at_once.cache(CacheType::F32));
        at_once.forward(&tokens[..5], &mut a, Logits::Last, Accuracy::Approximate).unwrap();
        let mut logits = vec![];
        let mut texts = [
            Continuation { tokens: &tokens[5..7], cache: &mut a },
            Continuation { tokens: &tokens[..30], cache: &mut b },
        ];
        at_once.forward_into(&mut texts, Logits::Last, Accuracy::Approximate, &mut logits).unwrap();
        let one = read(&at_once, &[5, 2]);
        let other = read(&at_once, &[30]);
        let expected = one.row(6).into_iter().chain(other.row(29)).copied().collect::<Vec<f32>>();
        let off = logits.iter().zip(&expected).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(logits.len() == 60 && off < 1e-4, "{off}");
        assert_eq!((a.len(), b.len()), (7, 30));
    }
}

/// More tokens than go through at once: texts by the dozen, one that is longer than a pass, and more behind it are each as by itself.
#[test]
fn many_texts_are_each_as_by_itself() {
    let decoder = decoder(None);
    let lengths: Vec<usize> = (0..150).map(|i| if i == 70 { 1100 } else { 1 + i * 7 % 9 }).collect();
    let all: Vec<Vec<u32>> =
        lengths.iter().enumerate().map(|(i, &n)| (0..n).map(|j| ((i * 3 + j * 5) % 30) as u32).collect()).collect();
    for wanted in [Logits::Last, Logits::All] {
        let mut caches: Vec<KvCache> = all.iter().map(|_| decoder.cache(CacheType::F32)).collect();
        let mut texts: Vec<Continuation> =
            all.iter().zip(&mut caches).map(|(tokens, cache)| Continuation { tokens, cache }).collect();
        let mut found = vec![];
        decoder.forward_into(&mut texts, wanted, Accuracy::Approximate, &mut found).unwrap();
        let mut expected = vec![];
        for tokens in &all {
            let mut cache = decoder.cache(CacheType::F32);
            expected.extend(decoder.forward(tokens, &mut cache, wanted, Accuracy::Approximate).unwrap());
        }
        assert_eq!(found.len(), expected.len(), "{wanted:?}");
        let off = found.iter().zip(&expected).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(off < 1e-4, "{wanted:?}: {off}");
        assert!(caches.iter().zip(&lengths).all(|(cache, &length)| cache.len() == length));
    }
}

/// A layer that hides what it is made of.
#[derive(Debug)]
struct Alone(SharedLayer);

impl Layer for Alone {
    fn method(&self) -> crate::layer::MethodName {
        self.0.method()
    }
    fn out_features(&self) -> usize {
        self.0.out_features()
    }
    fn in_features(&self) -> usize {
        self.0.in_features()
    }
    fn config(&self) -> serde_json::Value {
        self.0.config()
    }
    fn to_parts(&self) -> crate::layer::Parts {
        self.0.to_parts()
    }
    fn memory_bytes(&self) -> usize {
        self.0.memory_bytes()
    }
    fn product(&self, x: ndarray::ArrayView2<f32>, accuracy: Accuracy) -> crate::Result<crate::layer::Output> {
        self.0.product(x, accuracy)
    }
    fn bias(&self) -> crate::Result<Option<Array1<f32>>> {
        self.0.bias()
    }
    fn weight(&self) -> crate::Result<Array2<f32>> {
        self.0.weight()
    }
    fn rows(&self, indices: &[u32]) -> crate::Result<Array2<f32>> {
        self.0.rows(indices)
    }
}

#[test]
fn keys_and_values_may_be_rounded() {
    let tokens: Vec<u32> = (0..50).map(|i| (i * 11 % 30) as u32).collect();
    let decoder = decoder(None);
    let read = |kind: CacheType| {
        let mut cache = decoder.cache(kind);
        decoder.forward(&tokens[..33], &mut cache, Logits::Last, Accuracy::Full).unwrap();
        let mut last = Array2::zeros((0, 0));
        for token in &tokens[33..] {
            last = decoder.forward(&[*token], &mut cache, Logits::Last, Accuracy::Full).unwrap();
        }
        (last, cache.memory_bytes())
    };
    let (exact, bytes) = read(CacheType::F32);
    for (kind, most, share) in [(CacheType::F16, 5e-3, 0.5), (CacheType::Int8, 5e-2, 0.42)] {
        let (found, own) = read(kind);
        let off = (&found - &exact).iter().fold(0f32, |most, v| most.max(v.abs()));
        assert!(off > 0.0 && off < most, "{kind}: {off}");
        assert!((own as f64) <= share * bytes as f64, "{kind}: {own} of {bytes}");
    }
    // A text that is read in pieces is as long as it will be, where positions depend on that.
    let rotary = Rotary::new(6, 100.0, RotaryScaling::Dynamic { factor: 2.0, original: 8 }).unwrap();
    let config = DecoderConfig { rotary, ..decoder.config().clone() };
    let (embedding, blocks) = (decoder.embedding().clone(), decoder.blocks().cloned().collect());
    let dynamic = Decoder::new(config, embedding.clone(), blocks, decoder.norm().clone(), embedding).unwrap();
    let in_pieces = |expected: usize| {
        let mut cache = dynamic.cache(CacheType::F32);
        cache.expect(expected);
        dynamic.forward(&tokens[..20], &mut cache, Logits::Last, Accuracy::Full).unwrap();
        dynamic.forward(&tokens[20..], &mut cache, Logits::Last, Accuracy::Full).unwrap()
    };
    let whole = dynamic.forward(&tokens, &mut dynamic.cache(CacheType::F32), Logits::Last, Accuracy::Full).unwrap();
    let off = |found: Array2<f32>| (found - &whole).iter().fold(0f32, |most, v| most.max(v.abs()));
    assert!(off(in_pieces(50)) < 1e-4 && off(in_pieces(0)) > 1e-3);
    // A cache of another decoder is refused.
    let mut other = KvCache::new(CacheType::F32, 2, 2, 5);
    assert!(decoder.forward(&[1], &mut other, Logits::Last, Accuracy::Full).is_err());
}

/// The decoder with attention by codes in its second block: codebooks of the queries and keys that it has for `tokens`.
fn by_codes(exact: &Decoder, tokens: &[u32], config: VqAttentionConfig) -> Decoder {
    let mut seen: std::collections::BTreeMap<BlockInput, Array2<f32>> = Default::default();
    let mut x = exact.embedding_rows(tokens);
    let blocks: Vec<DecoderBlock> = exact.blocks().cloned().collect();
    for (number, block) in blocks.iter().enumerate() {
        let running = RunningBlock::new(exact.config(), number, exact.features(), block.clone()).unwrap();
        let mut see = |input: BlockInput, x: ArrayView2<f32>| {
            seen.insert(input, x.to_owned());
            Ok(())
        };
        running.run(exact.config(), &mut x, Accuracy::Full, Some(&mut see)).unwrap();
    }
    let (queries, keys) = (&seen[&BlockInput::Queries], &seen[&BlockInput::Keys]);
    let config = VqAttentionConfig { n_head: 4, n_kv_head: Some(2), rotary: true, ..config };
    let config = config.with_lengths(exact.features(), 6, 6).unwrap();
    let attention = VqAttentionLayer::by_kmeans(config, queries.view(), keys.view()).unwrap();
    let mut blocks = blocks;
    blocks[1].attention = Some(attention);
    let (embedding, norm) = (exact.embedding().clone(), exact.norm().clone());
    Decoder::new(exact.config().clone(), embedding.clone(), blocks, norm, embedding).unwrap()
}

#[test]
fn blocks_may_attend_by_codes() {
    let tokens: Vec<u32> = (0..60).map(|i| (i * 11 % 30) as u32).collect();
    let exact = decoder(None);
    let read = |decoder: &Decoder, parts: &[usize]| {
        let (mut cache, mut first, mut found) = (decoder.cache(CacheType::F32), 0, Array2::zeros((0, 30)));
        for part in parts {
            let y = decoder.forward(&tokens[first..first + part], &mut cache, Logits::All, Accuracy::Full).unwrap();
            found.append(ndarray::Axis(0), y.view()).unwrap();
            first += part;
        }
        (found, cache)
    };
    let off = |a: &Array2<f32>, b: &Array2<f32>| (a - b).iter().fold(0f32, |most, v| most.max(v.abs()));
    let (expected, exact_cache) = read(&exact, &[60]);
    // A codeword for each key: nothing is lost.
    let all =
        VqAttentionConfig { mechanism: Mechanism::VqK, n_code: 60, block_len: 8, mem_len: 4, ..Default::default() };
    let all = by_codes(&exact, &tokens, all);
    for parts in [&[60][..], &[1; 60], &[17, 1, 1, 30, 11]] {
        let (found, cache) = read(&all, parts);
        assert!(off(&found, &expected) < 1e-4, "{parts:?}: {}", off(&found, &expected));
        assert_eq!(cache.len(), 60);
    }
    // Fewer of them lose something, and the cache does not grow.
    let few = VqAttentionConfig { n_code: 5, block_len: 8, ..Default::default() };
    let few = by_codes(&exact, &tokens, few);
    let (found, cache) = read(&few, &[60]);
    assert!(off(&found, &expected) > 1e-4);
    let (_, shorter) = read(&few, &[20]);
    let exact_block = exact_cache.memory_bytes() / 2;
    assert_eq!(cache.memory_bytes() - exact_block, shorter.memory_bytes() - exact_block / 3);
    // Saved and read back, the text goes on as it would have.
    for kind in [CacheType::F32, CacheType::F16, CacheType::Int8] {
        for decoder in [&exact, &few] {
            let mut cache = decoder.cache(kind);
            decoder.forward(&tokens[..40], &mut cache, Logits::Last, Accuracy::Full).unwrap();
            let tensors = cache.to_tensors();
            let get = |name: &str| Ok(tensors.iter().find(|tensor| tensor.name == name).cloned());
            let mut again = decoder.cache_from_tensors(kind, 40, get).unwrap();
            assert_eq!(again, cache);
            let go_on =
                |cache: &mut KvCache| decoder.forward(&tokens[40..], cache, Logits::All, Accuracy::Full).unwrap();
            assert_eq!(go_on(&mut again), go_on(&mut cache));
            let refused = |tokens, kind| decoder.cache_from_tensors(kind, tokens, get).unwrap_err().to_string();
            assert!(refused(41, kind).contains("41"), "{}", refused(41, kind));
            let other = if kind == CacheType::F32 { CacheType::F16 } else { CacheType::F32 };
            assert!(refused(40, other).contains("block.0.keys"));
            let none = decoder.cache_from_tensors(kind, 40, |_| Ok(None)).unwrap_err().to_string();
            assert!(none.contains("found none"), "{none}");
        }
    }
    // Codes cannot be taken back.
    let (_, mut cache) = read(&few, &[20]);
    cache.truncate(20);
    assert_eq!(cache.len(), 20);
    cache.truncate(19);
    assert_eq!(cache, few.cache(CacheType::F32));
    // Caches of others, and attention that does not fit.
    assert!(few.forward(&[1], &mut exact.cache(CacheType::F32), Logits::Last, Accuracy::Full).is_err());
    let mut block = few.blocks().nth(1).unwrap().clone();
    let attention = block.attention.take().unwrap();
    for (config, says) in [
        (VqAttentionConfig { rotary: false, ..attention.settings().clone() }, "before they are rotated"),
        (VqAttentionConfig { causal: false, ..attention.settings().clone() }, "causal attention by codes"),
    ] {
        let (queries, keys) = (attention.queries().cloned(), attention.keys().cloned());
        block.attention = Some(VqAttentionLayer::new(config, queries, keys, None).unwrap());
        let refused = RunningBlock::new(few.config(), 1, few.features(), block.clone()).unwrap_err().to_string();
        assert!(refused.contains(says), "{refused}");
    }
}
