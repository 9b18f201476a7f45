//! Whatever text a rules file has: an answer, and no panic. `cargo fuzz run rules`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../shared/rules.rs"]
mod rules;

fuzz_target!(|text: &str| {
    rules::run(text);
});
