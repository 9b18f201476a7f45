//! Settings that differ, in a cell of a table.

use serde_json::Value;

use crate::store::SettingChange;

/// Returns the settings that differ, one after another: `rank 8 → 16`. The method is in a column of its own.
pub fn changes(settings: &[SettingChange]) -> String {
    let value = |value: &Value| match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let settings = settings.iter().filter(|change| change.setting != "method");
    let texts = settings.map(|c| format!("{} {} → {}", c.setting, value(&c.from), value(&c.to)));
    texts.collect::<Vec<_>>().join(", ")
}

/// Returns what is said of a layer before and after a change, or of two layers: once where that is the same.
pub fn pair(from: String, to: String) -> String {
    if from == to { from } else { format!("{from} → {to}") }
}
