//! Panics, told of only where one ends the command: those that Lance meets in damaged files become errors, and the error says all.

use std::panic::AssertUnwindSafe;
use std::sync::{Mutex, PoisonError};

use super::output::say;

/// What the hook would have printed.
static TEXTS: Mutex<Vec<String>> = Mutex::new(vec![]);

/// The exit code of a Rust program that panicked.
const PANICKED: u8 = 101;

/// Returns the exit code of `command`. Panics are printed when `command` itself ends with one.
pub fn told_if_last(command: impl FnOnce() -> u8) -> u8 {
    std::panic::set_hook(Box::new(|info| {
        let backtrace = std::backtrace::Backtrace::capture();
        let traced = backtrace.status() == std::backtrace::BacktraceStatus::Captured;
        let trace = if traced { format!("\n{backtrace}") } else { String::new() };
        TEXTS.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{info}{trace}"));
    }));
    std::panic::catch_unwind(AssertUnwindSafe(command)).unwrap_or_else(|_| {
        let texts = std::mem::take(&mut *TEXTS.lock().unwrap_or_else(PoisonError::into_inner));
        texts.iter().flat_map(|text| text.lines()).for_each(say);
        say("layerstore panicked, which is a bug: please report it with the lines above (RUST_BACKTRACE=1 shows more)");
        PANICKED
    })
}
