//! `peers OUT IN BATCH`: for each line of its input, microseconds of candle's products with a weight `[OUT, IN]`, as a line
//! of JSON: in f32, and quantised as llama.cpp's Q4_0, Q4_K and Q8_0 (which round inputs to int8, too). Medians, on all
//! threads.

use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Result, Tensor};

fn main() -> Result<()> {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let [out, inputs, batch] = numbers[..] else { candle_core::bail!("usage: peers OUT IN BATCH") };
    let device = Device::Cpu;
    let weight = Tensor::randn(0f32, 1.0, (out, inputs), &device)?;
    let x = Tensor::randn(0f32, 1.0, (batch, inputs), &device)?;
    let transposed = weight.t()?;
    let kinds = [("q4_0", GgmlDType::Q4_0), ("q4_k", GgmlDType::Q4K), ("q8_0", GgmlDType::Q8_0)];
    let quantized: Vec<(&str, QMatMul)> = kinds
        .into_iter()
        .map(|(name, kind)| Ok((name, QMatMul::from_qtensor(QTensor::quantize(&weight, kind)?)?)))
        .collect::<Result<_>>()?;
    for line in std::io::stdin().lines() {
        line?;
        let mut times = serde_json::Map::new();
        times.insert("f32".into(), median(|| x.matmul(&transposed))?.into());
        for (name, quantized) in &quantized {
            times.insert((*name).into(), median(|| quantized.forward(&x))?.into());
        }
        println!("{}", serde_json::Value::Object(times));
    }
    Ok(())
}

fn median(mut run: impl FnMut() -> Result<Tensor>) -> Result<f64> {
    run()?;
    let started = Instant::now();
    let mut times = vec![];
    while times.len() < 15 || (started.elapsed() < Duration::from_millis(200) && times.len() < 4001) {
        let started = Instant::now();
        black_box(run()?);
        times.push(started.elapsed());
    }
    times.sort();
    Ok(times[times.len() / 2].as_secs_f64() * 1e6)
}
