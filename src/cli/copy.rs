//! `copy`.

use clap::Args;
use serde::Serialize;

use super::escape;
use super::output::bytes;
use super::signals::cancel_on_interrupt;
use super::{Context, refuse_memory};
use crate::compress::{CopyReport, Selected};
use crate::error::{Error, Result};
use crate::store::{Store, check_place};

#[derive(Debug, Args)]
pub struct CopyArgs {
    /// The model; one of its layers, where not all of it is to be copied; and the store, a directory or an object-store URI, which is
    /// made where there is none.
    #[arg(value_name = "MODEL [LAYER] STORE", num_args = 1..=3, required = true)]
    names: Vec<String>,
}

#[derive(Serialize)]
struct Copied {
    #[serde(flatten)]
    report: CopyReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    layer: Option<String>,
    store: String,
}

pub async fn copy(context: &Context, args: CopyArgs) -> Result<u8> {
    let (model, layer, store) = match &args.names[..] {
        [model, store] => (model, None, store),
        [model, layer, store] => (model, Some(layer), store),
        names => {
            let found = names.join(" ");
            return Err(Error::Usage { option: "copy".into(), found, expected: "MODEL [LAYER] STORE".into() });
        }
    };
    refuse_memory("copy", store)?;
    check_place(store, &context.options_of(store).storage_options)?;
    let snapshot = context.snapshot().await?;
    // What is not there to be copied is found before a store is made.
    let selected = Selected::new(&snapshot, model, layer.map(String::as_str)).await?;
    let cancel = cancel_on_interrupt();
    let to = cancel.unless(Store::create_with(store, context.options_of(store))).await?;
    let report = selected.copy_into(&to, &context.output.progress(), &cancel).await?;
    let copied = Copied { report, layer: layer.cloned(), store: store.clone() };
    context.output.result(&copied, |c| {
        let model = escape::name(&c.report.model);
        let what = match (&c.layer, c.report.layers.len()) {
            (None, count) => format!("model '{model}', {count} layers,"),
            (Some(layer), 0 | 1) => format!("layer '{}' of '{model}'", escape::name(layer)),
            (Some(layer), count) => {
                format!("layer '{}' of '{model}', with {} that it runs with,", escape::name(layer), count - 1)
            }
        };
        let (store, version) = (escape::name(&c.store), c.report.version);
        format!("{what} is in {store} at version {version}: {} new", bytes(c.report.written_bytes))
    })?;
    Ok(0)
}
