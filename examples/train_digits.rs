//! Training a classifier of ternary layers, and freezing it into a store.
//!
//! ```text
//! cargo run --example train_digits
//! ```
//!
//! Digits of 8 × 8 pixels, shifted and with noise, go through a gated linear unit and a ternary layer. In training both round
//! weights and inputs, and gradients pass through the roundings; what is saved are the ternary weights, at 1.6 bits each.

use layerstore::Store;
use layerstore::layer::{Accuracy, Activation, Layer, RmsNorm};
use layerstore::nn::Module;
use layerstore::nn::training::{GluTraining, TernaryTraining};
use ndarray::{Array1, Array2, Axis};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const PIXELS: usize = 64;
const HIDDEN: usize = 96;
const WIDTH: usize = 32;
const CLASSES: usize = 10;
const BATCH: usize = 100;
const EPOCHS: usize = 24;

/// Digits of 3 × 5 pixels, a row of bits each.
const GLYPHS: [[u8; 5]; CLASSES] = [
    [0b111, 0b101, 0b101, 0b101, 0b111],
    [0b010, 0b110, 0b010, 0b010, 0b111],
    [0b111, 0b001, 0b111, 0b100, 0b111],
    [0b111, 0b001, 0b111, 0b001, 0b111],
    [0b101, 0b101, 0b111, 0b001, 0b001],
    [0b111, 0b100, 0b111, 0b001, 0b111],
    [0b111, 0b100, 0b111, 0b101, 0b111],
    [0b111, 0b001, 0b010, 0b010, 0b010],
    [0b111, 0b101, 0b111, 0b101, 0b111],
    [0b111, 0b101, 0b111, 0b001, 0b111],
];

#[tokio::main]
async fn main() -> Result<()> {
    let mut random = Random(7);
    let (images, labels) = digits(3000, &mut random);
    let (test, answers) = digits(1000, &mut random);

    let mut ffn = GluTraining {
        gate: layer(2 * HIDDEN, PIXELS, &mut random)?,
        down: layer(WIDTH, HIDDEN, &mut random)?,
        activation: Activation::Silu,
    };
    let mut head = layer(CLASSES, WIDTH, &mut random)?;
    let mut optimizers: Vec<Adam> = (0..6).map(|_| Adam::default()).collect();
    for epoch in 1..=EPOCHS {
        let mut loss = 0.0;
        for (x, labels) in images.axis_chunks_iter(Axis(0), BATCH).zip(labels.chunks(BATCH)) {
            let (hidden, first) = ffn.forward(x)?;
            let (scores, second) = head.forward(hidden.view())?;
            let (found, gradient) = cross_entropy(&scores, labels);
            loss += found * BATCH as f64 / images.nrows() as f64;
            let last = head.backward(&second, gradient.view())?;
            let before = ffn.backward(&first, last.input.view())?;
            let steps = [
                (&mut ffn.gate, before.gate.kernel, before.gate.bias),
                (&mut ffn.down, before.down.kernel, before.down.bias),
                (&mut head, last.kernel, last.bias),
            ];
            for ((layer, kernel, bias), both) in steps.into_iter().zip(optimizers.chunks_mut(2)) {
                both[0].step(layer.kernel.iter_mut(), kernel.iter());
                if let (Some(values), Some(bias)) = (&mut layer.bias, &bias) {
                    both[1].step(values.iter_mut(), bias.iter());
                }
            }
        }
        if epoch % 6 == 0 {
            println!("epoch {epoch:>2}: loss {loss:.4}");
        }
    }
    let (hidden, _) = ffn.forward(test.view())?;
    let (trained, _) = head.forward(hidden.view())?;

    // The same, frozen: saved in a store, and opened at a snapshot.
    let folder = tempfile::tempdir()?;
    let store = Store::create(&folder.path().join("layers").display().to_string()).await?;
    let model = Module::Sequential(vec![
        ("ffn".to_owned(), Module::Glu(ffn.freeze()?)),
        ("head".to_owned(), Module::Linear(head.freeze()?.shared())),
    ]);
    store.save_module("digits", "model", &model, Some("trained")).await?;
    store.create_snapshot("trained").await?;
    let snapshot = store.at("trained").await?;
    let opened = snapshot.module("digits", "model").await?.load().await?;
    let frozen: Array2<f32> = opened.forward(test.view().into_dyn(), Accuracy::Approximate)?.into_dimensionality()?;

    let off = (&frozen - &trained).iter().fold(0f32, |most, d| most.max(d.abs()));
    let right = accuracy(&frozen, &answers);
    let stored: u64 = snapshot.layers("digits").await?.iter().map(|r| r.stored_bytes).sum();
    let dense = 4 * (2 * HIDDEN * PIXELS + WIDTH * HIDDEN + CLASSES * WIDTH);
    println!(
        "accuracy on new digits: {:.1} % trained, {:.1} % from the store",
        100.0 * accuracy(&trained, &answers),
        100.0 * right
    );
    println!(
        "outputs differ by at most {off:.1e}; {stored} bytes stored, biases and norms included, for {dense} of f32 weights"
    );
    if off > 1e-5 || right < 0.9 {
        return Err("the frozen model is not the one that was trained, or it has not learned".into());
    }
    Ok(())
}

fn layer(out: usize, inputs: usize, random: &mut Random) -> Result<TernaryTraining> {
    let size = (6.0 / (out + inputs) as f32).sqrt();
    Ok(TernaryTraining {
        kernel: Array2::from_shape_simple_fn((out, inputs), || size * random.next()),
        bias: Some(Array1::zeros(out)),
        norm: RmsNorm::new(Some(Array2::ones((1, inputs))), None)?,
        activation: Activation::Linear,
    })
}

/// The mean of −ln of the right class's share, and its gradient with respect to the scores.
fn cross_entropy(scores: &Array2<f32>, labels: &[usize]) -> (f64, Array2<f32>) {
    let mut shares = scores.clone();
    Activation::Softmax.apply(shares.view_mut());
    let loss = shares.rows().into_iter().zip(labels).map(|(row, &label)| -f64::from(row[label].max(1e-9)).ln());
    let loss = loss.sum::<f64>() / labels.len() as f64;
    for (mut row, &label) in shares.rows_mut().into_iter().zip(labels) {
        row[label] -= 1.0;
    }
    (loss, shares / labels.len() as f32)
}

fn accuracy(scores: &Array2<f32>, labels: &[usize]) -> f64 {
    let best = |row: ndarray::ArrayView1<f32>| (0..CLASSES).max_by(|&a, &b| row[a].total_cmp(&row[b]));
    let right = scores.rows().into_iter().zip(labels).filter(|(row, label)| best(*row) == Some(**label)).count();
    right as f64 / labels.len() as f64
}

/// Digits somewhere in their squares, each pixel a little off, and some of them wrong.
fn digits(count: usize, random: &mut Random) -> (Array2<f32>, Vec<usize>) {
    let mut images = Array2::zeros((count, PIXELS));
    let mut labels = vec![];
    for mut image in images.rows_mut() {
        let (label, top, left) = (random.below(CLASSES), random.below(4), random.below(4));
        for (row, bits) in GLYPHS[label].iter().enumerate() {
            for column in (0..3).filter(|column| bits >> (2 - column) & 1 == 1) {
                image[8 * (top + row) + left + column] = 1.0;
            }
        }
        image.mapv_inplace(|pixel| pixel + 0.2 * random.next());
        labels.push(label);
    }
    (images, labels)
}

/// Adam (Kingma and Ba, 2015).
#[derive(Default)]
struct Adam {
    steps: i32,
    moments: Vec<(f32, f32)>,
}

impl Adam {
    fn step<'a>(&mut self, values: impl Iterator<Item = &'a mut f32>, gradient: impl Iterator<Item = &'a f32>) {
        const RATE: f32 = 3e-3;
        self.steps += 1;
        let (first, second) = (1.0 - 0.9f32.powi(self.steps), 1.0 - 0.999f32.powi(self.steps));
        for (place, (value, g)) in values.zip(gradient).enumerate() {
            if place == self.moments.len() {
                self.moments.push((0.0, 0.0));
            }
            let (m, v) = &mut self.moments[place];
            *m = 0.9 * *m + 0.1 * g;
            *v = 0.999 * *v + 0.001 * g * g;
            *value -= RATE * (*m / first) / ((*v / second).sqrt() + 1e-8);
        }
    }
}

/// Numbers that look like chance, and are the same in every run.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 40
    }

    /// From −1 to 1.
    fn next(&mut self) -> f32 {
        self.bits() as f32 / (1u32 << 23) as f32 - 1.0
    }

    fn below(&mut self, count: usize) -> usize {
        ((self.bits() * count as u64) >> 24) as usize
    }
}
