//! The command line: arguments parsed purely, then resolved, one file per group of commands.

mod arguments;
mod attention;
mod calibrate;
mod catalogue;
mod compare;
mod context;
mod copy;
mod embed;
mod escape;
mod export;
mod generate;
mod import;
mod keys;
mod language;
mod maintain;
mod output;
mod panics;
mod run;
mod settings;
mod signals;
mod summary;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use self::context::{Context, refuse_memory};
use self::output::{Output, say};
use crate::error::{Error, Result};
use crate::staged;
use crate::store::DiskCacheOptions;

/// An embedded store for compressed neural-network layers.
#[derive(Debug, Parser)]
#[command(name = "layerstore", version, about, max_term_width = 100)]
pub struct Cli {
    /// The store: a directory (~/ and file:///PATH are understood), or an object-store URI.
    #[arg(long, global = true, value_name = "URI", env = "LAYERSTORE_URI", default_value = "./layers", value_parser = arguments::address)]
    store: String,
    /// Read at this snapshot, or version number, in place of the latest version; snapshot create names it.
    #[arg(long, global = true, value_name = "SNAPSHOT")]
    at: Option<String>,
    /// How the storage of stores at s3:// is reached, beside the AWS_ variables of the environment: endpoint, region, access_key_id and
    /// others, several times over. Other users of the machine may see the arguments of a command; secrets are better in the
    /// environment.
    #[arg(long = "storage-option", global = true, value_name = "KEY=VALUE", value_parser = arguments::storage_option)]
    storage_options: Vec<(String, String)>,
    /// Keeps copies of layers that are read from an object store in this directory, so that they are read from it the next time.
    #[arg(long, global = true, value_name = "DIR", env = "LAYERSTORE_CACHE", value_parser = arguments::directory)]
    cache: Option<PathBuf>,
    /// How many bytes of copies are kept, as 500MB or 20GiB; those used longest ago are removed.
    #[arg(long, global = true, value_name = "BYTES", default_value = "10GiB", value_parser = arguments::size)]
    cache_bytes: u64,
    /// How results are printed; json is one document on standard output.
    #[arg(long, global = true, value_enum, default_value = "table")]
    format: Format,
    /// No progress and no notes on standard error.
    #[arg(long, short, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put a checkpoint into the store, each layer compressed by the first rule that takes it. Errors over "calibration" are
    /// measured on the calibration inputs themselves: evaluate measures on others.
    Import(ImportArgs),
    /// List the models.
    Models,
    /// List the layers of a model.
    Layers { model: String },
    /// Show a model and the files that are kept with it, or everything the catalogue knows of one layer.
    Show {
        model: String,
        layer: Option<String>,
        /// Also read the layer's arrays, and fail unless they hash to their artifact's name.
        #[arg(long)]
        verify: bool,
    },
    /// Run a layer, or a module with the layers that it is made of, on inputs.
    Forward(ForwardArgs),
    /// Go on with a text by a language model whose layers are in the store, and print what comes as it comes.
    Generate(generate::GenerateArgs),
    /// Measure how well a language model foretells a text, and how far it is from another one.
    Perplexity(language::PerplexityArgs),
    /// Turn texts into vectors by a text encoder whose layers are in the store.
    Embed(embed::EmbedArgs),
    /// Have a model of the store read a text, and write the statistics of its layers' inputs, which import --calibration takes.
    Calibrate(calibrate::CalibrateArgs),
    /// Measure how many tokens a second a language model reads and writes, and the memory that it takes.
    Bench(language::BenchArgs),
    /// Run an attention block, its projections included, on a sequence.
    Attend(attention::AttendArgs),
    /// Train the codebooks of an attention block.
    #[command(subcommand)]
    Codebooks(attention::CodebooksCommand),
    /// Show which keys of a key–value layer each input uses.
    Search(SearchArgs),
    /// Show the keys of all layers that point most nearly along a key, or a vector, or against it.
    Nearest(NearestArgs),
    /// Show which layers of two models share directions.
    Shared(SharedArgs),
    /// Make, or make anew, the index of every table of keys, which nearest uses.
    Index,
    /// Copy a model, or one layer with what it runs with, into another store. There, a model is replaced as by an import, and a layer is
    /// put beside the others of its model.
    Copy(copy::CopyArgs),
    /// Remove a model, as a new version. Older versions keep it; gc frees the bytes once no version is kept that has it.
    Remove { model: String },
    /// Give a model another name, as a new version.
    Rename {
        model: String,
        /// The new name, which no model has.
        name: String,
    },
    /// Show how two models, or two versions of one, differ: errors and bytes side by side, the largest difference of errors first.
    Compare(compare::CompareArgs),
    /// Measure a model's layers on inputs, against their dense weights, and attention blocks against exact attention. Inputs that
    /// no layer was calibrated with tell what the model is worth; what cannot be measured is listed with the reason.
    Evaluate(EvaluateArgs),
    /// Name the latest version, list the names, or delete one.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Make an older version the latest, as a new version.
    Restore {
        /// A snapshot or version number.
        name: String,
    },
    /// List the versions, newest first.
    Log,
    /// Show what changed between two versions.
    Diff {
        /// A snapshot, a version number, or `latest`.
        old: String,
        /// Likewise.
        new: String,
    },
    /// Write a model for other programs: each layer as the weight and the bias that give its outputs with every key and inputs as
    /// they are. Biases are added where the checkpoint had none and the outputs need one.
    Export(ExportArgs),
    /// Look for damage, and say what helps: open every version and snapshot, count rows, hash every artifact and compare with its
    /// name, and build its layer. Exit 1 when anything is damaged.
    Verify(VerifyArgs),
    /// Make a damaged store whole, as far as that can be done: complete what the list of artifacts or a table has lost, and make
    /// damaged artifacts again or take them from another store. Exit 1 when something is still damaged.
    Repair(RepairArgs),
    /// Remove what no snapshot and no recent version reaches; only counts unless --apply. Nothing is removed where a table lacks
    /// what they reach.
    Gc {
        /// Keep whatever versions younger than this reach.
        #[arg(long, value_name = "AGE", default_value = "7d", value_parser = humantime::parse_duration)]
        older_than: std::time::Duration,
        /// Remove it.
        #[arg(long)]
        apply: bool,
    },
    /// Bring a store that an older version made to the newest format that this one knows. Versions that do not know that format
    /// cannot open the store any more. An older store is read and written as it is without this.
    Upgrade,
    /// Count models, layers, versions and bytes.
    Stats,
}

#[derive(Debug, Args)]
#[group(multiple = false)]
struct VerifyArgs {
    /// Only open versions and snapshots and count rows: no artifact is read.
    #[arg(long)]
    quick: bool,
    /// Also run every layer on fixed inputs: outputs have to be finite and of the shape that the catalogue says.
    #[arg(long)]
    deep: bool,
}

#[derive(Debug, Args)]
struct RepairArgs {
    /// Where to get damaged artifacts from: the checkpoint that their layers were imported from, or another store that has them. May
    /// be given more than once; the first that has one is used.
    #[arg(long, value_name = "CHECKPOINT|STORE")]
    from: Vec<String>,
    /// The calibration that the layers of the checkpoint were imported with.
    #[arg(long, value_name = "FILE", requires = "from")]
    calibration: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ImportArgs {
    /// A .safetensors file, an index of shards (.json), a folder of either, a .gguf file (any part of a split one), a .bin, .pt or
    /// .pth file of PyTorch, or a .keras file of Keras-MML's layers. In a folder the index, or the shards' numbers, say what belongs
    /// to it; the rest is left out with a note.
    checkpoint: PathBuf,
    /// The name to store it under; what the store held under that name is replaced.
    #[arg(long)]
    model: String,
    /// Rules (TOML): which layers are compressed how. Without it every layer stays dense.
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,
    /// What to calibrate layers with: their inputs (safetensors, a tensor [tokens, in_features] named after each layer), or a file of
    /// the inputs' statistics.
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// A text, UTF-8, that the model reads to be calibrated: each block's statistics are taken, its layers are compressed, and the next
    /// block reads what they give. The model needs a config.json and a tokenizer.json beside it, as generate and embed do.
    #[arg(long, value_name = "FILE", conflicts_with = "calibration")]
    calibration_text: Option<PathBuf>,
    /// Tokens of the text that are read at most.
    #[arg(long, value_name = "N", default_value_t = 32_768, requires = "calibration_text")]
    calibration_tokens: usize,
    /// Whose outputs the next block reads: those of the compressed blocks before it, as the model will run, or of the dense ones.
    #[arg(long, value_name = "WHICH", default_value = "compressed", value_parser = ["compressed", "dense"], requires = "calibration_text")]
    calibration_inputs: String,
    /// Of a GGUF model: keep the names and the order of rows that the file has, in place of those of Hugging Face's transformers.
    #[arg(long)]
    keep_names: bool,
    /// Keep this file with the model, as its configuration and its tokenizer are kept: relative to the model's folder, or absolute. May be
    /// given more than once.
    #[arg(long, value_name = "FILE")]
    keep: Vec<PathBuf>,
    /// A message for the log.
    #[arg(long, value_name = "TEXT")]
    message: Option<String>,
    /// Print a row for each layer, however many there are; without it, more than 20 are summed up by kind.
    #[arg(long)]
    all: bool,
    /// Only look through everything, values included, and say which rule takes which layer, and how many bytes it will take. No
    /// store is made or changed.
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
struct ExportArgs {
    model: String,
    /// Where it goes: a file for safetensors and gguf, a folder that is not there, or empty, for the others.
    #[arg(long, short, value_name = "PATH")]
    output: PathBuf,
    /// What is written: safetensors, one file of numbers; huggingface, a folder that transformers opens; compressed-tensors, such a
    /// folder whose int4 and int8 layers stay packed; gguf, a file for llama.cpp that keeps the codes of its types; peft, the
    /// corrections of low_rank layers as a LoRA adapter. Without it, what the output's name says: .safetensors, .gguf, or else
    /// huggingface.
    #[arg(long, value_name = "FORMAT", value_enum)]
    to: Option<To>,
    /// Write weights that are no codes as this, in place of their source's dtype; q8_0 for gguf alone.
    #[arg(long, value_name = "DTYPE", value_enum)]
    dtype: Option<Dtype>,
    /// Write layers as numbers that gguf or compressed-tensors cannot hold as they are stored.
    #[arg(long)]
    allow_dequantize: bool,
    /// Leave out the corrections of low_rank layers: the base of an adapter (--to peft).
    #[arg(long)]
    without_correction: bool,
    /// Fail unless the arrays of every layer hash to its artifact's name.
    #[arg(long)]
    verify: bool,
    /// Write also what a weight and a bias do not say, without it: a norm before a layer's weight, an activation after it; and for gguf
    /// round scales to f16. A note says where.
    #[arg(long)]
    allow_approximate: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum To {
    Safetensors,
    Huggingface,
    CompressedTensors,
    Gguf,
    Peft,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    F32,
    F16,
    Bf16,
    #[value(name = "q8_0")]
    Q8_0,
}

#[derive(Debug, Args)]
struct ForwardArgs {
    model: String,
    layer: String,
    /// Inputs: a vector or a matrix [batch, in_features], for a module what it takes, such as [batch, steps, features];
    /// .npy or FILE.safetensors:TENSOR, f32 or f16.
    #[arg(long, value_name = "FILE")]
    input: String,
    /// Where the outputs go, .npy or FILE.safetensors:TENSOR; other tensors of the file stay.
    #[arg(long, value_name = "FILE")]
    output: Option<String>,
    /// Use every key, or the dense weights.
    #[arg(long)]
    exact: bool,
    /// Of a key–value layer: use as few keys as certify this relative error for each input.
    #[arg(long, value_name = "E", conflicts_with = "exact")]
    max_error: Option<f64>,
    /// Fail unless the arrays that are read hash to their artifacts' names.
    #[arg(long)]
    verify: bool,
}

#[derive(Debug, Args)]
struct SearchArgs {
    model: String,
    layer: String,
    /// Queries: a vector or a matrix [batch, in_features], .npy or FILE.safetensors:TENSOR, f32 or f16.
    #[arg(long, value_name = "FILE")]
    input: String,
    #[command(flatten)]
    limit: LimitArgs,
    /// Search the keys where they lie, through Lance, without loading the layer: for a few queries, since each scans the
    /// table of all keys of that width.
    #[arg(long, conflicts_with = "max_error")]
    on_disk: bool,
}

#[derive(Debug, Args)]
struct NearestArgs {
    /// The key to look for: its model, its layer and its number.
    #[arg(value_name = "MODEL LAYER KEY", num_args = 0..=3)]
    of: Vec<String>,
    /// Directions to look for in its place: a vector or a matrix [batch, in_features], .npy or FILE.safetensors:TENSOR.
    #[arg(long, value_name = "FILE")]
    input: Option<String>,
    /// How many keys to show.
    #[arg(long, value_name = "N", default_value_t = 10)]
    count: usize,
    /// Only keys of this model, which has to be there; may be given more than once.
    #[arg(long, value_name = "MODEL")]
    among: Vec<String>,
}

#[derive(Debug, Args)]
struct SharedArgs {
    model: String,
    other: String,
    /// Keys of each layer to look for: those of the largest scale.
    #[arg(long, value_name = "N", default_value_t = 64)]
    keys: usize,
    /// A direction is shared where |cosine| is at least this.
    #[arg(long, value_name = "C", default_value_t = 0.9)]
    least: f32,
    /// How many pairs of layers to show, the most alike first.
    #[arg(long, value_name = "N", default_value_t = 20)]
    count: usize,
}

#[derive(Debug, Args)]
#[group(multiple = false)]
struct LimitArgs {
    /// Use the threshold at which this many keys are expected.
    #[arg(long, value_name = "K")]
    keys: Option<f64>,
    /// Use keys that rank at least this high.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    threshold: Option<f32>,
    /// Use as few keys as certify this relative error for each query.
    #[arg(long, value_name = "E")]
    max_error: Option<f64>,
}

#[derive(Debug, Args)]
struct EvaluateArgs {
    model: String,
    /// Inputs of layers: safetensors, a tensor [tokens, in_features] named after each layer.
    #[arg(long, value_name = "FILE")]
    activations: PathBuf,
    /// Compare with this checkpoint's weights in place of dense weights in the store.
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum SnapshotCommand {
    /// Name the latest version, or that of --at.
    Create { name: String },
    /// List the snapshots.
    List,
    /// Delete a name, also a damaged one; its version stays until gc.
    Delete { name: String },
}

/// Parses the arguments, does the command, and gives the exit code: 0 done, 1 failed with a message on standard error,
/// 2 wrong usage.
pub fn main() -> u8 {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // Also --help and --version, which go to standard output and are no failure.
            let _ = e.print();
            return if e.use_stderr() { 2 } else { 0 };
        }
    };
    panics::told_if_last(|| run_to_the_end(cli))
}

/// Runs a command, prints its error, and returns the exit code.
fn run_to_the_end(cli: Cli) -> u8 {
    let is_one_change = cli.command.is_one_change();
    // Lance sorts there, and may not come to remove it. Where no folder can be made, the command says so.
    if matches!(cli.command, Command::Index)
        && let Ok(folder) = staged::temporary_folder()
    {
        // SAFETY: no other thread has been started that could read it.
        unsafe { std::env::set_var("TMPDIR", folder) };
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            say(&format!("error: starting the runtime: {e}"));
            return 1;
        }
    };
    let listening = async {
        signals::listen();
        run(cli).await
    };
    let done = runtime.block_on(listening);
    let cancelled = matches!(done, Err(Error::Cancelled));
    let code = done.unwrap_or_else(|e| {
        match cancelled && !is_one_change {
            true => say("error: cancelled"),
            false => say(&format!("error: {e}")),
        }
        // An option that a command has no use for is wrong usage, like those that the parser finds.
        if matches!(e, Error::Usage { .. }) { 2 } else { 1 }
    });
    // Work that was cancelled may still be at its last layer: do not wait for that. What it had begun to write is removed meanwhile.
    runtime.shutdown_timeout(if cancelled { Duration::from_millis(200) } else { Duration::ZERO });
    staged::abandon();
    signals::end_as_asked();
    code
}

async fn run(cli: Cli) -> Result<u8> {
    let output = Output::new(cli.format == Format::Json, cli.quiet);
    refuse_memory("--store", &cli.store)?;
    let context = Context {
        store: cli.store,
        at: cli.at,
        verify_loads: cli.command.verifies_loads(),
        storage_options: cli.storage_options.into_iter().collect(),
        disk_cache: cli.cache.map(|directory| DiskCacheOptions { directory, bytes: cli.cache_bytes }),
        output,
    };
    match cli.command {
        Command::Import(args) => import::import(&context, args).await,
        Command::Export(args) => export::export(&context, args).await,
        Command::Models => catalogue::models(&context).await,
        Command::Layers { model } => catalogue::layers(&context, &model).await,
        Command::Show { model, layer: Some(layer), verify: _ } => catalogue::show(&context, &model, &layer).await,
        Command::Show { model, layer: None, verify } => catalogue::show_model(&context, &model, verify).await,
        Command::Snapshot(command) => catalogue::snapshot(&context, command).await,
        Command::Restore { name } => catalogue::restore(&context, &name).await,
        Command::Log => catalogue::log(&context).await,
        Command::Diff { old, new } => catalogue::diff(&context, &old, &new).await,
        Command::Forward(args) => run::forward(&context, args).await,
        Command::Generate(args) => generate::generate(&context, args).await,
        Command::Perplexity(args) => language::perplexity(&context, args).await,
        Command::Embed(args) => embed::embed(&context, args).await,
        Command::Calibrate(args) => calibrate::calibrate(&context, args).await,
        Command::Bench(args) => language::bench(&context, args).await,
        Command::Attend(args) => attention::attend(&context, args).await,
        Command::Codebooks(command) => attention::codebooks(&context, command).await,
        Command::Search(args) => run::search(&context, args).await,
        Command::Nearest(args) => keys::nearest(&context, args).await,
        Command::Shared(args) => keys::shared(&context, args).await,
        Command::Index => keys::index(&context).await,
        Command::Copy(args) => copy::copy(&context, args).await,
        Command::Remove { model } => catalogue::remove(&context, &model).await,
        Command::Rename { model, name } => catalogue::rename(&context, &model, &name).await,
        Command::Compare(args) => compare::compare(&context, args).await,
        Command::Evaluate(args) => run::evaluate(&context, args).await,
        Command::Verify(args) => maintain::verify(&context, args).await,
        Command::Repair(args) => maintain::repair(&context, args).await,
        Command::Gc { older_than, apply } => maintain::gc(&context, older_than, apply).await,
        Command::Upgrade => maintain::upgrade(&context).await,
        Command::Stats => maintain::stats(&context).await,
    }
}

impl Command {
    /// Whether all that the command changes of a store is committed at its end.
    fn is_one_change(&self) -> bool {
        matches!(self, Command::Import(_) | Command::Copy(_) | Command::Codebooks(_))
    }

    /// Whether the command is to hold all that it loads against its name.
    fn verifies_loads(&self) -> bool {
        match self {
            Command::Forward(ForwardArgs { verify, .. })
            | Command::Show { verify, .. }
            | Command::Export(ExportArgs { verify, .. }) => *verify,
            _ => false,
        }
    }
}
