//! What commands print: one JSON document, or a table and a few lines.

use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

use comfy_table::{Table, presets::NOTHING};
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::escape;
use crate::error::{Error, Result, counted};
use crate::store::ErrorBasis;
use crate::work::Progress;

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

    /// Prints a piece of a text as it comes, unless the result is to be JSON.
    pub fn piece(&self, text: &str) {
        if !self.json {
            let mut out = std::io::stdout().lock();
            let _ = write!(out, "{}", escape::lines(text)).and_then(|()| out.flush());
        }
    }

    /// Prints a result whose text was printed piece by piece: as JSON, or the end of a line.
    pub fn ended<T: Serialize>(&self, value: &T) -> Result<()> {
        self.result(value, |_| String::new())
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

/// What stored errors of a basis were measured over, for a person: an import has no other inputs than those that it calibrates with.
pub fn basis(basis: ErrorBasis) -> &'static str {
    match basis {
        ErrorBasis::Activations => "calibration",
        ErrorBasis::Weights => "weights",
    }
}

/// What a stored error was measured over, for a person; nothing where there is none.
pub fn measured_over(error: Option<f64>, over: ErrorBasis) -> &'static str {
    error.map_or("", |_| basis(over))
}

/// Bits for each weight, for a person.
pub fn bits(value: Option<f64>) -> String {
    value.map_or("-".into(), |bits| format!("{bits:.2}"))
}

/// A time for a person.
pub fn time(t: chrono::DateTime<chrono::Utc>) -> String {
    t.format("%Y-%m-%d %H:%M:%S").to_string()
}

/// Progress over layers, by bytes, with the layer's name and the time left; or over the epochs of a training, by steps.
pub struct Bar {
    bar: ProgressBar,
    shown: bool,
    state: Mutex<Option<State>>,
}

/// Layers, or epochs, that are done and were told of.
struct State {
    total: u64,
    done: u64,
    said: u64,
    /// Steps that an epoch has, and those of this one that are done; 0 of layers.
    steps: u64,
    step: u64,
}

impl State {
    /// Counts one that is done; `true` where a log file gets a line, which it does for each tenth.
    fn count(&mut self) -> bool {
        self.done += 1;
        let tenth = self.done.saturating_mul(10) / self.total.max(1);
        let more = tenth > self.said;
        self.said = self.said.max(tenth);
        more
    }
}

impl Bar {
    fn begin(&self, state: State, length: u64, template: &str) {
        if !self.shown {
            return;
        }
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = Some(state);
        if std::io::stderr().is_terminal() {
            self.bar.set_length(length);
            let style = ProgressStyle::with_template(template);
            self.bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}

impl Progress for Bar {
    fn started(&self, layers: usize, bytes: u64) {
        let state = State { total: layers as u64, done: 0, said: 0, steps: 0, step: 0 };
        self.begin(state, bytes, "{bar:24} {bytes}/{total_bytes}, {eta} left  {wide_msg}");
    }

    fn training_started(&self, epochs: usize, steps: usize) {
        let (epochs, steps) = (epochs as u64, steps as u64);
        let state = State { total: epochs, done: 0, said: 0, steps, step: 0 };
        self.begin(state, epochs.saturating_mul(steps), "{bar:24} {eta} left  {wide_msg}");
    }

    fn layer(&self, name: &str) {
        self.bar.set_message(escape::name(name).into_owned());
    }

    fn layer_done(&self, bytes: u64, _skipped: bool) {
        self.bar.inc(bytes);
        if let Some(state) = self.state.lock().unwrap_or_else(PoisonError::into_inner).as_mut()
            && state.count()
            && self.bar.is_hidden()
        {
            say(&format!("{} of {}, now {}", state.done, counted(state.total, "layer", "layers"), self.bar.message()));
        }
    }

    fn step_done(&self) {
        self.bar.inc(1);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(state) = state.as_mut() else { return };
        state.step += 1;
        if state.step >= state.steps {
            state.step = 0;
            let told = state.count();
            let epochs = format!("{} of {}", state.done, counted(state.total, "epoch", "epochs"));
            if told && self.bar.is_hidden() {
                say(&epochs);
            }
            self.bar.set_message(epochs);
        }
    }

    fn finished(&self) {
        self.bar.finish_and_clear();
    }
}
