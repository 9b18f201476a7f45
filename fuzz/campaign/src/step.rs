//! One command of a round, and what it does.

use fastrand::Rng;

use crate::history::{Content, Depth, History, State};
use crate::inputs::{BLOCK, Inputs, args};

/// Models of a store.
pub const MODELS: [&str; 3] = ["a", "b", "c"];

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Imports a variant.
    Import {
        model: String,
        variant: usize,
    },
    /// Trains a block of a model anew.
    Train {
        model: String,
        block: usize,
    },
    Collect,
    Index,
    Snapshot(String),
    Forget(String),
    Restore(String),
    /// Writes a model as a checkpoint, over a file that is there.
    Export(String),
    /// Runs one of two pieces of a sequence through a model's block.
    Attend {
        model: String,
        piece: usize,
    },
    /// Copies a layer to a store of its own.
    Copy {
        model: String,
        layer: String,
    },
}

impl Step {
    /// A command that makes sense in this state.
    pub fn random(rng: &mut Rng, history: &History, inputs: &Inputs) -> Step {
        let state = history.state();
        let snapshot = rng.choice(history.snapshots.keys()).cloned();
        let there = rng.choice(&state).map(|(model, content)| (model.clone(), *content));
        let with_block: Vec<&String> =
            state.iter().filter(|(_, content)| content.block.is_some()).map(|(m, _)| m).collect();
        let block = rng.choice(with_block).cloned();
        let import = |rng: &mut Rng| Step::Import {
            model: MODELS[rng.usize(..MODELS.len())].to_owned(),
            variant: rng.usize(..inputs.variants.len()),
        };
        match (rng.u32(..16), snapshot, there) {
            (0..2, _, Some((model, _))) => Step::Train { model, block: rng.usize(..inputs.blocks.len()) },
            (2..5, ..) => Step::Collect,
            (5, ..) => Step::Index,
            (6, ..) => Step::Snapshot(format!("s{}", rng.u64(..))),
            (7, Some(name), _) => Step::Forget(name),
            (8..10, Some(name), _) => Step::Restore(name),
            (10, _, Some((model, _))) => Step::Export(model),
            (11, ..) if block.is_some() => Step::Attend { model: block.unwrap_or_default(), piece: rng.usize(..2) },
            (12, _, Some((model, Content { variant: Some(variant), .. }))) => {
                let layer = rng.choice(inputs.variants[variant].rows.keys()).cloned().unwrap_or_default();
                Step::Copy { model, layer }
            }
            _ => import(rng),
        }
    }

    /// The command's name.
    pub fn name(&self) -> &'static str {
        match self {
            Step::Import { .. } => "import",
            Step::Train { .. } => "codebooks",
            Step::Collect => "gc",
            Step::Index => "index",
            Step::Snapshot(_) | Step::Forget(_) => "snapshot",
            Step::Restore(_) => "restore",
            Step::Export(_) => "export",
            Step::Attend { .. } => "attend",
            Step::Copy { .. } => "copy",
        }
    }

    /// The command's arguments; files that it writes are named relative to the folder that it runs in.
    pub fn args(&self, inputs: &Inputs) -> Vec<String> {
        match self {
            Step::Import { model, variant } => [&inputs.variants[*variant].args[..], &args!["--model", model]].concat(),
            Step::Train { model, block } => {
                let settings = &inputs.blocks[*block].settings;
                args!["codebooks", "train", model, BLOCK, "--queries", inputs.queries, "--settings", settings].into()
            }
            Step::Collect => args!["gc", "--older-than", "0s", "--apply"].into(),
            Step::Index => args!["index"].into(),
            Step::Snapshot(name) => args!["snapshot", "create", name].into(),
            Step::Forget(name) => args!["snapshot", "delete", name].into(),
            Step::Restore(name) => args!["restore", name].into(),
            Step::Export(model) => args!["export", model, "--output", "export.safetensors"].into(),
            Step::Attend { model, piece } => {
                let q = &inputs.pieces[*piece];
                args!["attend", model, BLOCK, "--q", q, "--state", "state.safetensors", "--output", "attended.npy"]
                    .into()
            }
            Step::Copy { model, layer } => args!["copy", model, layer, "copied"].into(),
        }
    }

    /// What has to be looked at after it: what it may have touched.
    pub fn depth(&self) -> Depth {
        match self {
            Step::Collect => Depth::Kept,
            _ => Depth::Latest,
        }
    }

    /// The models after it, where it makes a version.
    pub fn state_after(&self, history: &History) -> Option<State> {
        let mut state = history.state();
        match self {
            Step::Import { model, variant } => {
                state.insert(model.clone(), Content { variant: Some(*variant), block: None });
            }
            Step::Train { model, block } => {
                state.entry(model.clone()).or_insert(Content { variant: None, block: None }).block = Some(*block);
            }
            Step::Restore(name) => state = history.versions.get(history.snapshots.get(name)?)?.state.clone(),
            _ => return None,
        }
        Some(state)
    }
}
