//! Rules files of any text.

use layerstore::Rules;

/// Parses a rules file, and looks for layers in it where it is one; returns whether it is.
///
/// # Panics
/// When parsing or matching panics, or an error says nothing.
pub fn run(text: &str) -> bool {
    let rules = match Rules::parse(text, "rules.toml") {
        Ok(rules) => rules,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return false;
        }
    };
    for layer in ["encoder.layer.0.attention.self.query", "blocks.0.up", ""] {
        let _rule = rules.find(layer);
    }
    true
}
