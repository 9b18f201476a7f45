//! What commands print: one JSON document, or a table and a few lines.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;

use comfy_table::{Table, presets::NOTHING};
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::escape;
use crate::compress::Progress;
use crate::error::{Error, Result};
use crate::store::ErrorBasis;

/// Where results and notes go.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    json: bool,
    quiet: bool,
}

impl Output {
    pub fn new(json: bool, quiet: bool) -> Self {
        Output { json, quiet }
    }

    /// Prints a result: as JSON, or what `human` makes of it.
    pub fn result<T: Serialize>(&self, value: &T, human: impl FnOnce(&T) -> String) -> Result<()> {
        let text = if self.json {
            escape::json(
                serde_json::to_string(value).map_err(|e| Error::Numeric(format!("the result is no JSON: {e}")))?,
            )
        } else {
            escape::lines(&human(value)).into_owned()
        };
        let mut out = std::io::stdout().lock();
        // A reader that went away (`| head`) is no failure.
        match writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()) {
            Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("standard output", e)),
            _ => Ok(()),
        }
    }

    /// Whether notes and progress are left out.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// A note for a person, on standard error.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.quiet {
            say(text.as_ref());
        }
    }

    /// A progress bar on standard error; lines now and then where that is no terminal.
    pub fn progress(&self) -> Bar {
        Bar { bar: ProgressBar::hidden(), shown: !self.quiet, state: Mutex::new(None) }
    }
}

/// Says something on standard error, names escaped. Where that is full or closed, nobody hears it, and the work goes on.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", escape::message(text));
}

/// A table with a line of headings.
pub fn table(headings: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(NOTHING);
    table.set_header(headings);
    for row in rows {
        table.add_row(row.iter().map(|cell| escape::name(cell)));
    }
    table.lines().map(|l| l.trim_end().to_owned() + "\n").collect()
}

/// Bytes for a person.
pub fn bytes(n: u64) -> String {
    HumanBytes(n).to_string()
}

/// How many times smaller.
pub fn ratio(dense: u64, stored: u64) -> String {
    if stored == 0 || dense == 0 { "-".into() } else { format!("{:.2}×", dense as f64 / stored as f64) }
}

/// An error for a person.
pub fn error(value: Option<f64>) -> String {
    value.map_or("-".into(), |e| format!("{e:.4}"))
}

/// What a stored error is measured over, for a person: an import has no other inputs than those that it calibrates with.
pub fn measured_over(error: Option<f64>, basis: ErrorBasis) -> &'static str {
    match (error, basis) {
        (None, _) => "",
        (Some(_), ErrorBasis::Activations) => "calibration",
        (Some(_), ErrorBasis::Weights) => "weights",
    }
}

/// Bits for each weight, for a person.
pub fn bits(value: Option<f64>) -> String {
    value.map_or(String::new(), |bits| format!("{bits:.2}"))
}

/// A time for a person.
pub fn time(t: chrono::DateTime<chrono::Utc>) -> String {
    t.format("%Y-%m-%d %H:%M:%S").to_string()
}

/// Progress over layers, by bytes, with the layer's name and the time left.
pub struct Bar {
    bar: ProgressBar,
    shown: bool,
    state: Mutex<Option<State>>,
}

struct State {
    total: u64,
    done: u64,
    said: u64,
}

impl Progress for Bar {
    fn started(&self, layers: usize, bytes: u64) {
        if !self.shown {
            return;
        }
        *self.state.lock().unwrap_or_else(|e| e.into_inner()) = Some(State { total: layers as u64, done: 0, said: 0 });
        if std::io::stderr().is_terminal() {
            self.bar.set_length(bytes);
            let style = ProgressStyle::with_template("{bar:24} {bytes}/{total_bytes}, {eta} left  {wide_msg}");
            self.bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }

    fn layer(&self, name: &str) {
        self.bar.set_message(escape::name(name).into_owned());
    }

    fn layer_done(&self, bytes: u64, _skipped: bool) {
        self.bar.inc(bytes);
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(state) = state.as_mut()
            && self.bar.is_hidden()
        {
            state.done += 1;
            // A log file gets a line for each tenth.
            let tenth = state.done.saturating_mul(10) / state.total.max(1);
            if tenth > state.said {
                state.said = tenth;
                say(&format!("{} of {} layers, now {}", state.done, state.total, self.bar.message()));
            }
        }
    }

    fn finished(&self) {
        self.bar.finish_and_clear();
    }
}
