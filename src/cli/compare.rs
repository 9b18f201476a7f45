//! `compare`.

use clap::Args;

use super::Context;
use super::output::{basis, bytes, error, ratio, table};
use super::settings::{changes, pair};
use crate::error::{Error, Result};
use crate::store::{ComparedLayer, ComparedModel, Comparison, ErrorBasis, LayerState, Snapshot, Store};

#[derive(Debug, Args)]
pub struct CompareArgs {
    /// A model, MODEL@SNAPSHOT or MODEL@VERSION; without @, at the version of --at. A model whose own name has an @ is found by its
    /// whole name first.
    #[arg(value_name = "MODEL[@SNAPSHOT]")]
    first: String,
    /// The model to compare with, likewise.
    #[arg(value_name = "MODEL[@SNAPSHOT]")]
    second: String,
}

pub async fn compare(context: &Context, args: CompareArgs) -> Result<u8> {
    let store = context.open().await?;
    let base = context.snapshot_of(&store).await?;
    let (first, first_model) = find(&store, &base, &args.first).await?;
    let (second, second_model) = find(&store, &base, &args.second).await?;
    let comparison = first.compare(first_model, &second, second_model).await?;
    context.output.result(&comparison, human)?;
    Ok(0)
}

/// Finds a model by its name, at the version `base`, or at the snapshot or version behind its last @.
async fn find<'a>(store: &Store, base: &Snapshot, given: &'a str) -> Result<(Snapshot, &'a str)> {
    match base.layers(given).await {
        Err(unknown @ Error::UnknownModel { .. }) => match given.rsplit_once('@') {
            Some((model, at)) => Ok((store.at(at).await?, model)),
            None => Err(unknown),
        },
        found => found.map(|_| (base.clone(), given)),
    }
}

fn human(comparison: &Comparison) -> String {
    let Comparison { first, second, layers, same, only_first, only_second } = comparison;
    let label = |model: &ComparedModel| format!("{}@{}", model.model, model.version);
    let (a, b) = (label(first), label(second));
    let mut text = String::new();
    if !layers.is_empty() {
        let [errors, stored, other] = [format!("error of {a}"), format!("bytes of {a}"), format!("of {b}")];
        let headings = ["layer", "method", &errors, &other, "over", &stored, &other, "settings"];
        text += &table(&headings, layers.iter().map(row));
        text += "\n";
    }
    for (own, layers) in [(&a, only_first), (&b, only_second)] {
        if !layers.is_empty() {
            text += &table(&[&format!("only in {own}"), "method", "error", "over", "bytes"], layers.iter().map(alone));
            text += "\n";
        }
    }
    let totals = [(&a, first), (&b, second)].map(|(label, m)| {
        let (layers, stored) = (m.layers.to_string(), bytes(m.stored_bytes));
        vec![label.clone(), layers, stored, ratio(m.dense_bytes, m.stored_bytes)]
    });
    text += &table(&["model", "layers", "stored", "ratio"], totals);
    text += &format!("\n{} layers differ, {same} are the same", layers.len());
    for over in [ErrorBasis::Activations, ErrorBasis::Weights] {
        let errors =
            layers.iter().filter(|layer| layer.first.error_basis == over && layer.error_difference().is_some());
        let errors: Vec<_> = errors.map(|l| [l.first.relative_error, l.second.relative_error]).collect();
        if !errors.is_empty() {
            let mean = |side: usize| errors.iter().filter_map(|pair| pair[side]).sum::<f64>() / errors.len() as f64;
            let means = [0, 1].map(|side| error(Some(mean(side)))).join(" and ");
            text += &format!("; mean error of {} over {}: {means}", errors.len(), basis(over));
        }
    }
    text
}

fn row(layer: &ComparedLayer) -> Vec<String> {
    let ComparedLayer { layer, first, second, settings } = layer;
    vec![
        layer.clone(),
        pair(first.method.to_string(), second.method.to_string()),
        error(first.relative_error),
        error(second.relative_error),
        pair(basis(first.error_basis).to_owned(), basis(second.error_basis).to_owned()),
        bytes(first.stored_bytes),
        bytes(second.stored_bytes),
        changes(settings),
    ]
}

fn alone(layer: &LayerState) -> Vec<String> {
    let state = &layer.state;
    vec![
        layer.layer.clone(),
        state.method.to_string(),
        error(state.relative_error),
        basis(state.error_basis).to_owned(),
        bytes(state.stored_bytes),
    ]
}
