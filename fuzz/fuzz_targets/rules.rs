//! Whatever text a rules file has: an answer, and no panic. `cargo fuzz run rules`.
#![no_main]

use layerstore::Rules;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(rules) = Rules::parse(text, "rules.toml") {
        let _ = rules.find("encoder.layer.0.attention.self.query");
    }
});
