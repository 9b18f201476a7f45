//! Tokens per second of whole decoders with made-up weights: prompts of 512 tokens, and 128 tokens one by one.
//!
//! `cargo bench -p layerstore-core --bench decoder [-- small|1b] [int8]`. Shapes are SmolLM2's (135M parameters) and a Llama's of 1.1B;
//! blocks are of 4 bits in groups of 32 with a minimum (GGUF's Q4_1), the head of 8 bits (Q8_0), as llama.cpp has them.

use std::time::Instant;

use layerstore_core::layer::{Accuracy, Activation, ActivationFormat, Layer, LowRankLayer, SharedLayer};
use layerstore_core::quant::{PackedMatrix, WeightFormat};
use layerstore_core::transformer::{
    CacheType, Decoder, DecoderBlock, DecoderConfig, Logits, Norm, Rotary, RotaryScaling,
};
use ndarray::Array1;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

struct Shape {
    name: &'static str,
    features: usize,
    heads: usize,
    kv_heads: usize,
    hidden: usize,
    blocks: usize,
    vocabulary: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "small", features: 576, heads: 9, kv_heads: 3, hidden: 1536, blocks: 30, vocabulary: 49_152 },
    Shape { name: "1b", features: 2048, heads: 32, kv_heads: 8, hidden: 8192, blocks: 16, vocabulary: 32_000 },
];

fn main() -> Result<()> {
    // `cargo test` also runs bench targets: measuring is for `cargo bench` alone.
    let named: Vec<String> = std::env::args().skip(1).collect();
    if !named.iter().any(|a| a == "--bench") {
        return Ok(());
    }
    let is_named = |name: &str| named.iter().any(|n| n == name);
    for shape in SHAPES {
        if SHAPES.iter().any(|shape| is_named(shape.name)) && !is_named(shape.name) {
            continue;
        }
        for activations in [ActivationFormat::F32, ActivationFormat::Int8] {
            if is_named("int8") && activations == ActivationFormat::F32 {
                continue;
            }
            let decoder = decoder(&shape, activations)?;
            let tokens: Vec<u32> = (0..512).map(|i| (i * 37 % shape.vocabulary) as u32).collect();
            let (mut pp, mut tg) = (f64::INFINITY, f64::INFINITY);
            for _ in 0..3 {
                let mut cache = decoder.cache(CacheType::F16);
                let since = Instant::now();
                decoder.forward(&tokens, &mut cache, Logits::Last, Accuracy::Approximate)?;
                pp = pp.min(since.elapsed().as_secs_f64());
                let mut cache = decoder.cache(CacheType::F16);
                let since = Instant::now();
                for token in &tokens[..128] {
                    decoder.forward(&[*token], &mut cache, Logits::Last, Accuracy::Approximate)?;
                }
                tg = tg.min(since.elapsed().as_secs_f64());
            }
            println!(
                "{} {activations:?}: pp512 {:.1}, tg128 {:.1} tokens/s, {:.0} MB",
                shape.name,
                512.0 / pp,
                128.0 / tg,
                decoder.memory_bytes() as f64 / 1e6
            );
        }
    }
    Ok(())
}

fn decoder(shape: &Shape, activations: ActivationFormat) -> Result<Decoder> {
    let Shape { features, heads, kv_heads, hidden, blocks, vocabulary, .. } = *shape;
    let head_dim = features / heads;
    let four: WeightFormat =
        serde_json::from_str(r#"{"type": "int4", "group": 32, "scales": "f16", "minimum": true}"#)?;
    let eight: WeightFormat =
        serde_json::from_str(r#"{"type": "int8", "group": 32, "scales": "f16", "symmetric": true}"#)?;
    let layer = |format: WeightFormat, rows: usize, columns: usize, seed: usize| -> Result<SharedLayer> {
        let mut state = seed as u32 + 1;
        let codes: Vec<u8> = (0..rows * columns)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 28) as u8
            })
            .collect();
        let scale = half::f16::from_f32(0.02 / 4.6 / (columns as f32 / 576.0).sqrt());
        let scales: Vec<u8> = (0..rows * columns / 32).flat_map(|_| scale.to_le_bytes()).collect();
        let minimum = half::f16::from_f32(-7.5 * scale.to_f32());
        let minimums =
            if format.minimum { scales.chunks(2).flat_map(|_| minimum.to_le_bytes()).collect() } else { vec![] };
        let weight = PackedMatrix::from_unpacked(format, (rows, columns), &codes, &scales, minimums)?;
        Ok(LowRankLayer::of_weight(weight, None)?.with_activations(activations)?.shared())
    };
    let norm = || Norm::rms(Array1::from_elem(features, 1.0), 1e-5);
    let block = |n: usize| -> Result<DecoderBlock> {
        Ok(DecoderBlock {
            attention_norm: norm(),
            query: layer(four, heads * head_dim, features, n)?,
            key: layer(four, kv_heads * head_dim, features, n + 1)?,
            value: layer(four, kv_heads * head_dim, features, n + 2)?,
            output: layer(four, features, heads * head_dim, n + 3)?,
            query_norm: None,
            key_norm: None,
            attention: None,
            feed_forward_norm: norm(),
            gate: layer(four, hidden, features, n + 4)?,
            up: layer(four, hidden, features, n + 5)?,
            down: layer(four, features, hidden, n + 6)?,
        })
    };
    let rotary = Rotary::new(head_dim, 10_000.0, RotaryScaling::None)?;
    let config = DecoderConfig { heads, kv_heads, head_dim, rotary, window: None, activation: Activation::Silu };
    let embedding = layer(eight, vocabulary, features, 1)?;
    let blocks = (0..blocks).map(|n| block(10 * n)).collect::<Result<Vec<_>>>()?;
    Ok(Decoder::new(config, embedding.clone(), blocks, norm(), embedding)?)
}
