//! Products with packed weights beside the dense f32 product, and beside candle's quantised ones. `make bench`, or
//! `cargo bench --bench kernels`.
//!
//! Weights and factors are made up, since only shapes and formats decide the time. The dense product is the fastest of
//! ndarray, faer and matrixmultiply, and of ndarray on all threads, in the same run. candle is run by the program that
//! `LAYERSTORE_PEERS` names (`make bench` builds it from `benches/peers`). Ours and candle's take turns, in rounds: what
//! else a machine does then meets both. Times are medians, and so are ratios, of those of each round.

mod dense;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::hint::black_box;
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use layerstore_core::layer::parts::{Codes, Parts, WeightRows};
use layerstore_core::layer::{Accuracy, RowType, SharedLayer, configured, layer_from_parts};
use layerstore_core::quant::{Clipping, PackedMatrix, RowMatrix, WeightFormat};
use ndarray::{Array2, ArrayView2};
use serde_json::json;

use dense::{dense_on_all_threads, matrix, median_within, micros};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const RANK: usize = 32;

/// Turns that ours and the peers take.
const ROUNDS: usize = 7;

/// How long each is measured in a round.
const TURN: Duration = Duration::from_millis(200);

/// Name, format, and what inputs are rounded to.
const FORMATS: [(&str, &str, &str); 15] = [
    ("int4 g64", r#"{"type": "int4", "group": 64}"#, "f32"),
    ("int4 g64", r#"{"type": "int4", "group": 64}"#, "int8"),
    ("int4 g32 sym", r#"{"type": "int4", "group": 32, "symmetric": true}"#, "int8"),
    ("nf4 g64", r#"{"type": "nf4", "group": 64}"#, "f32"),
    ("nf4 g64", r#"{"type": "nf4", "group": 64}"#, "int8"),
    ("mxint4", r#"{"type": "mxint4"}"#, "int8"),
    ("int2 g64", r#"{"type": "int2", "group": 64}"#, "f32"),
    ("int2 g64", r#"{"type": "int2", "group": 64}"#, "int8"),
    ("int3 g64", r#"{"type": "int3", "group": 64}"#, "int8"),
    ("int5 g64", r#"{"type": "int5", "group": 64}"#, "int8"),
    ("int8 channel", r#"{"type": "int8", "group": "channel", "symmetric": true}"#, "f32"),
    ("int8 channel", r#"{"type": "int8", "group": "channel", "symmetric": true}"#, "int8"),
    ("ternary channel", r#"{"type": "ternary", "group": "channel"}"#, "f32"),
    ("ternary channel", r#"{"type": "ternary", "group": "channel"}"#, "int8_absmax"),
    ("bf16", r#"{"type": "bf16"}"#, "f32"),
];

fn main() -> Result<()> {
    // `cargo test` also runs bench targets: measuring is for `cargo bench` alone.
    if !std::env::args().any(|a| a == "--bench") {
        return Ok(());
    }
    if std::env::args().any(|a| a == "--speed") {
        return speeds();
    }
    let named: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let wanted = |name: &str| named.is_empty() || named.iter().any(|n| name.contains(n.as_str()));
    for (out, inputs, batch) in
        [(4096, 4096, 1), (4096, 14_336, 1), (1536, 384, 1), (4096, 4096, 4), (4096, 4096, 32), (1536, 384, 32)]
    {
        let weight = matrix(out, inputs, 1);
        let x = matrix(batch, inputs, 2);
        let dense = micros(dense_on_all_threads(weight.view(), x.view()));
        println!("\n{out} × {inputs}, batch {batch}, rank {RANK}: dense f32 {dense:.1} µs");
        let formats = FORMATS.iter().filter(|(name, _, activations)| wanted(&format!("{name} {activations}")));
        let layers = formats
            .map(|(name, format, activations)| {
                let layer = layer(weight.view(), serde_json::from_str(format)?, activations)?;
                Ok((format!("{name:<15} {activations:<11}"), layer))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut peers = match std::env::var_os("LAYERSTORE_PEERS") {
            Some(program) => Some(Peers::start(&program, [out, inputs, batch])?),
            None => None,
        };
        let (mut ours, mut theirs) = (vec![vec![]; layers.len()], BTreeMap::<String, Vec<f64>>::new());
        for _ in 0..ROUNDS {
            for ((_, layer), times) in layers.iter().zip(&mut ours) {
                times.push(micros(median_within(TURN, || {
                    black_box(layer.forward(black_box(x.view()), Accuracy::Approximate).map(|o| o.y).ok());
                })));
            }
            match peers.as_mut().map(Peers::times) {
                Some(Some(times)) => {
                    times.into_iter().for_each(|(name, time)| theirs.entry(name).or_default().push(time))
                }
                Some(None) => peers = None,
                None => {}
            }
        }
        let titles: String = theirs.keys().map(|name| format!("{:>14}", format!("{name} / ours"))).collect();
        println!("{:<27}{:>10}{:>14}{:>8}{titles}", "weights, activations", "µs", "dense / ours", "MiB");
        for ((name, layer), times) in layers.iter().zip(&ours) {
            let ratio =
                |other: &Vec<f64>| middle(other.iter().zip(times).map(|(theirs, ours)| theirs / ours).collect());
            let ratios: String = theirs.values().map(|other| format!("{:>14.2}", ratio(other))).collect();
            let (time, memory) = (middle(times.clone()), layer.memory_bytes() as f64 / f64::from(1 << 20));
            println!("{name}{time:>10.1}{:>14.2}{memory:>8.2}{ratios}", dense / time);
        }
        for (name, times) in theirs {
            let time = middle(times);
            println!("{:<27}{time:>10.1}{:>14.2}", format!("candle {name}"), dense / time);
        }
    }
    Ok(())
}

/// Layers whose products `scripts/check_kernels.py` compares among builds: name, format, inputs and batch.
const CORE: [(&str, &str, &str, usize); 8] = [
    ("int4 g64", r#"{"type": "int4", "group": 64}"#, "f32", 1),
    ("int4 g64", r#"{"type": "int4", "group": 64}"#, "f32", 4),
    ("int4 g64", r#"{"type": "int4", "group": 64}"#, "int8", 1),
    ("nf4 g64", r#"{"type": "nf4", "group": 64}"#, "f32", 1),
    ("int3 g64", r#"{"type": "int3", "group": 64}"#, "int8", 1),
    ("int8 channel", r#"{"type": "int8", "group": "channel", "symmetric": true}"#, "int8", 32),
    ("ternary channel", r#"{"type": "ternary", "group": "channel"}"#, "int8_absmax", 4),
    ("bf16", r#"{"type": "bf16"}"#, "f32", 1),
];

/// Prints the microseconds of each of [`CORE`], behind a tab: the least of many runs, which what else a machine does troubles
/// least.
fn speeds() -> Result<()> {
    let weight = matrix(2048, 4096, 1);
    for (name, format, activations, batch) in CORE {
        let layer = layer(weight.view(), serde_json::from_str(format)?, activations)?;
        let x = matrix(batch, 4096, 2);
        let (start, mut least) = (Instant::now(), Duration::MAX);
        while start.elapsed() < TURN {
            let run = Instant::now();
            black_box(layer.forward(black_box(x.view()), Accuracy::Approximate)?);
            least = least.min(run.elapsed());
        }
        println!("{name}, {activations}, 2048 × 4096, batch {batch}\t{:.1}", micros(least));
    }
    Ok(())
}

/// The median.
fn middle(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// The program with the peers' products, of one shape.
struct Peers {
    program: Child,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Peers {
    fn start(program: &OsStr, shape: [usize; 3]) -> Result<Self> {
        let mut command = Command::new(program);
        command.args(shape.map(|n| n.to_string())).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut program = command.spawn()?;
        let answers = BufReader::new(program.stdout.take().ok_or("no answers")?).lines();
        Ok(Peers { program, answers })
    }

    /// Microseconds of each product, taken now. None if they have none of this shape.
    fn times(&mut self) -> Option<BTreeMap<String, f64>> {
        self.program.stdin.as_mut()?.write_all(b"\n").ok()?;
        serde_json::from_str(&self.answers.next()?.ok()?).ok()
    }
}

impl Drop for Peers {
    fn drop(&mut self) {
        // It ends with its input.
        drop(self.program.stdin.take());
        let _ = self.program.wait();
    }
}

fn layer(weight: ArrayView2<f32>, format: WeightFormat, activations: &str) -> Result<SharedLayer> {
    let (out, inputs) = weight.dim();
    let packed = PackedMatrix::quantize(weight, format, Clipping::Absmax, None)?;
    let config = json!({
        "weight": format, "rank": RANK, "factors": "f16", "in_features": inputs, "out_features": out,
    });
    let mut parts = Parts::new("low_rank", config.clone());
    parts.weights = Some(WeightRows {
        rows: out,
        packed: packed.stored_codes(),
        scales: packed.scale_bytes(),
        zeros: packed.zeros().to_vec().into(),
    });
    let factor = |length: usize, seed: u64| -> Result<Array2<u8>> {
        Ok(RowMatrix::new(matrix(RANK, length, seed) * 0.01, RowType::F16)?.bytes())
    };
    parts.codes.push(Codes { role: "a".into(), codes: factor(out, 3)? });
    parts.codes.push(Codes { role: "b".into(), codes: factor(inputs, 4)? });
    parts.tensors.push(layerstore_core::layer::parts::Tensor::vector("singular_values", &[1.0; RANK]));
    let mut running = config;
    running["activations"] = json!(activations);
    Ok(configured(&layer_from_parts(parts)?, &running)?)
}
