//! What the commands read, and what each of them gives where nothing interferes.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use fastrand::Rng;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

use crate::child::{Limits, Program, Ran, Trouble};
use crate::history::Content;

/// Arguments as a command takes them.
macro_rules! args {
    ($($arg:expr),* $(,)?) => { [$(($arg).to_string()),*] };
}
pub(crate) use args;

/// Method and artifact of each layer.
pub type Rows = BTreeMap<String, (String, String)>;

/// The layer name of attention blocks that are trained.
pub const BLOCK: &str = "block";

/// A checkpoint and rules.
pub struct Variant {
    /// Arguments of an import, but for the model.
    pub args: Vec<String>,
    pub rows: Rows,
    pub export: Vec<u8>,
}

/// Settings of an attention block.
pub struct Block {
    pub settings: String,
    pub artifact: String,
    /// The file of `--state`, and the output, after the first piece of a sequence and after the second.
    pub after: [(Vec<u8>, Vec<u8>); 2],
}

/// All inputs.
pub struct Inputs {
    pub variants: Vec<Variant>,
    pub blocks: Vec<Block>,
    /// Vectors that codebooks are trained from.
    pub queries: String,
    /// Two pieces of a sequence.
    pub pieces: [String; 2],
    /// How long each kind of command usually takes.
    durations: Mutex<HashMap<String, Duration>>,
}

const RULES: [(&str, &str); 3] = [
    ("keys", "method = 'key_value'"),
    ("int4", "method = 'low_rank'\nrank = 4\nweight = { type = 'int4', group = 16 }"),
    ("ternary", "method = 'ternary'"),
];

const SETTINGS: [&str; 2] = [
    "n_head = 1\nn_code = 16\ncausal = true\nblock_len = 4\n",
    "n_head = 2\nn_code = 8\ncausal = true\nblock_len = 8\n",
];

const KERAS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/keras/functional.keras");

/// Runs a command undisturbed, which has to succeed.
pub fn undisturbed(program: &Program, folder: &Path, store: &Path, args: &[String]) -> Result<Ran, Trouble> {
    let ran = program.run((folder, &[]), store, args, Limits::default(), |_| false)?;
    match ran.is_done() {
        true => Ok(ran),
        false => Err(Trouble::lost(ran.told())),
    }
}

/// The layers of a model as `layers` lists them.
pub fn rows(listed: &Value) -> Result<Rows, Trouble> {
    let row = |row: &Value| {
        let text = |name: &str| row.get(name).and_then(Value::as_str).map(str::to_owned);
        Some((text("layer")?, (text("method")?, text("artifact")?)))
    };
    let rows: Option<Rows> = listed.as_array().and_then(|rows| rows.iter().map(row).collect());
    rows.ok_or_else(|| Trouble::lost(format!("no list of layers: {listed}")))
}

impl Inputs {
    /// Writes the inputs to `folder`, and runs each command once.
    pub fn make(program: &Program, folder: &Path) -> Result<Self, Trouble> {
        let (mut rng, mut checkpoints) = (Rng::with_seed(0), vec![]);
        for (name, layers) in [
            ("small-a", vec![[96, 48], [48, 96], [48, 48]]),
            ("small-b", vec![[96, 48], [48, 96], [96, 48], [64, 64]]),
            ("large", vec![[384, 384]; 6]),
            // Small, with enough keys of one width for an index.
            ("narrow", vec![[48, 48]; 8]),
        ] {
            let path = folder.join(format!("{name}.safetensors"));
            matrices(&path, &layers, &mut rng)?;
            checkpoints.push(path.display().to_string());
        }
        let file = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::write(&path, text)?;
            Ok::<_, std::io::Error>(path.display().to_string())
        };
        let mut imports = vec![args!["import", KERAS].to_vec()];
        for checkpoint in checkpoints {
            imports.push(args!["import", checkpoint].into());
            for (name, rule) in RULES {
                let rules = file(&format!("{name}.toml"), &format!("[[rule]]\nlayers = '.*[1-9]'\n{rule}\n"))?;
                imports.push(args!["import", checkpoint, "--rules", rules].into());
            }
        }
        let sequence = folder.join("sequence.safetensors");
        matrices(&sequence, &[[256, 8], [16, 8], [16, 8]], &mut rng)?;
        let piece = |at: usize| format!("{}:layers.{at}.weight", sequence.display());
        let mut inputs = Inputs {
            variants: vec![],
            blocks: vec![],
            queries: piece(0),
            pieces: [piece(1), piece(2)],
            durations: Mutex::default(),
        };
        let settings = SETTINGS.iter().enumerate().map(|(at, text)| file(&format!("block-{at}.toml"), text));
        let settings = settings.collect::<Result<Vec<_>, _>>()?;
        inputs.run_once(program, folder, imports, settings)?;
        Ok(inputs)
    }

    fn run_once(
        &mut self,
        program: &Program,
        folder: &Path,
        imports: Vec<Vec<String>>,
        settings: Vec<String>,
    ) -> Result<(), Trouble> {
        let store = folder.join("reference");
        let run = |args: &[String]| undisturbed(program, folder, &store, args);
        let json = |args: &[String]| Ok::<Value, Trouble>(serde_json::from_str(&run(args)?.out)?);
        let output = folder.join("out.safetensors");
        for args in imports {
            let import = run(&[&args[..], &args!["--model", "m"]].concat())?;
            self.took("import", import.took);
            let rows = rows(&json(&args!["layers", "m"])?)?;
            run(&args!["export", "m", "--output", output.display()])?;
            self.variants.push(Variant { args, rows, export: std::fs::read(&output)? });
        }
        for settings in settings {
            let train = args!["codebooks", "train", "m", BLOCK, "--queries", self.queries, "--settings", settings];
            let made = json(&train)?;
            let artifact = made["artifact"].as_str().unwrap_or_default().to_owned();
            let (state, output) = (folder.join("state.safetensors"), folder.join("attended.npy"));
            let mut after = [(vec![], vec![]), (vec![], vec![])];
            for (piece, after) in self.pieces.iter().zip(&mut after) {
                run(&args![
                    "attend",
                    "m",
                    BLOCK,
                    "--q",
                    piece,
                    "--state",
                    state.display(),
                    "--output",
                    output.display()
                ])?;
                *after = (std::fs::read(&state)?, std::fs::read(&output)?);
            }
            std::fs::remove_file(&state)?;
            self.blocks.push(Block { settings, artifact, after });
        }
        Ok(())
    }

    /// The layers of a content.
    pub fn rows(&self, content: Content) -> Rows {
        let mut rows = content.variant.map_or(Rows::new(), |variant| self.variants[variant].rows.clone());
        let block = content.block.map(|at| ("vq_attention".to_owned(), self.blocks[at].artifact.clone()));
        rows.extend(block.map(|block| (BLOCK.to_owned(), block)));
        rows
    }

    /// The checkpoint that a content is exported as, where it has one.
    pub fn export(&self, content: Content) -> Option<&[u8]> {
        content.variant.map(|variant| &self.variants[variant].export[..])
    }

    /// Notes how long a command took.
    pub fn took(&self, command: &str, took: Duration) {
        let mut durations = self.durations.lock().unwrap_or_else(PoisonError::into_inner);
        let usual = durations.entry(command.to_owned()).or_insert(took);
        *usual = (*usual * 3 + took) / 4;
    }

    /// How long a command usually takes.
    pub fn usual(&self, command: &str) -> Duration {
        let durations = self.durations.lock().unwrap_or_else(PoisonError::into_inner);
        durations.get(command).copied().unwrap_or(Duration::from_millis(200))
    }
}

/// Writes matrices of numbers as `layers.N.weight`.
fn matrices(path: &Path, shapes: &[[usize; 2]], rng: &mut Rng) -> Result<(), Trouble> {
    let data: Vec<Vec<u8>> = shapes
        .iter()
        .map(|[rows, columns]| (0..rows * columns).flat_map(|_| (rng.f32() - 0.5).to_le_bytes()).collect())
        .collect();
    let views = shapes.iter().zip(&data).enumerate().map(|(at, (shape, data))| {
        let view = TensorView::new(Dtype::F32, shape.to_vec(), data).map_err(std::io::Error::other)?;
        Ok((format!("layers.{at}.weight"), view))
    });
    let views = views.collect::<Result<Vec<_>, std::io::Error>>()?;
    safetensors::serialize_to_file(views, None, path).map_err(std::io::Error::other)?;
    Ok(())
}
