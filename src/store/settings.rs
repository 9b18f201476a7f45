//! Settings of two layers, held against each other.

use layerstore_core::layer::registry;
use serde::Serialize;
use serde_json::{Map, Value};

use super::record::{ADAPTED, LayerRecord};

/// A setting that two layers have differently.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SettingChange {
    /// Its name; a setting within another follows it behind a dot, as in `weight.type`. It is `method` where the methods differ,
    /// whose settings are then not compared.
    pub setting: String,
    /// Its value in the first layer; null where that has none.
    pub from: Value,
    /// Its value in the second.
    pub to: Value,
}

/// Returns the settings that two layers have differently, by name. What was measured when a layer was made is none.
pub fn changed_settings(from: &LayerRecord, to: &LayerRecord) -> Vec<SettingChange> {
    let mut changes = vec![];
    if from.method != to.method {
        let [from, to] = [from, to].map(|record| record.method.as_str().into());
        changes.push(SettingChange { setting: "method".into(), from, to });
        return changes;
    }
    // The config of a method that this program does not know is all settings.
    let measured = registry::method(from.method.as_str()).map_or(&[][..], |entry| entry.measured);
    let settings = |record: &LayerRecord| {
        let mut config = record.config.clone();
        if let Value::Object(map) = &mut config {
            map.retain(|name, _| name != ADAPTED && !measured.contains(&name.as_str()));
        }
        config
    };
    compare("", &settings(from), &settings(to), &mut changes);
    changes
}

fn compare(setting: &str, from: &Value, to: &Value, changes: &mut Vec<SettingChange>) {
    match (from, to) {
        (Value::Object(from), Value::Object(to)) => {
            let value = |map: &Map<String, Value>, name: &String| map.get(name).cloned().unwrap_or_default();
            let added = to.keys().filter(|name| !from.contains_key(*name));
            let mut names: Vec<&String> = from.keys().chain(added).collect();
            names.sort();
            for name in names {
                let within = if setting.is_empty() { name.clone() } else { format!("{setting}.{name}") };
                compare(&within, &value(from, name), &value(to, name), changes);
            }
        }
        (from, to) if from != to => {
            changes.push(SettingChange { setting: setting.to_owned(), from: from.clone(), to: to.clone() });
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use chrono::Utc;
    use serde_json::json;

    use super::*;
    use crate::layer::{ArtifactId, MethodName};
    use crate::store::{ErrorBasis, RowLocations, Source};

    fn record(method: &'static str, config: Value) -> LayerRecord {
        LayerRecord {
            model: "m".into(),
            layer: "l".into(),
            method: MethodName::new(method),
            in_features: 4,
            out_features: 4,
            artifact: ArtifactId([0; 32]),
            relative_error: None,
            error_basis: ErrorBasis::Weights,
            dense_bytes: 64,
            stored_bytes: 32,
            config,
            source: Source::default(),
            created_at: Utc::now(),
            locations: RowLocations::default(),
        }
    }

    fn changes(from: LayerRecord, to: LayerRecord) -> Vec<(String, Value, Value)> {
        changed_settings(&from, &to).into_iter().map(|c| (c.setting, c.from, c.to)).collect()
    }

    #[test]
    fn settings_within_settings_are_compared_by_name() {
        let from = json!({"rank": 8, "weight": {"type": "int4", "group": 16}, "scaling": "exact", "values": "f16"});
        let to = json!({"rank": 16, "weight": {"type": "int4", "group": 64, "scales": "f16"}, "scaling": "exact",
                        "values": {"type": "pq"}});
        assert_eq!(
            changes(record("low_rank", from.clone()), record("low_rank", to)),
            [
                ("rank".into(), json!(8), json!(16)),
                ("values".into(), json!("f16"), json!({"type": "pq"})),
                ("weight.group".into(), json!(16), json!(64)),
                ("weight.scales".into(), Value::Null, json!("f16")),
            ]
        );
        assert_eq!(changes(record("low_rank", from.clone()), record("low_rank", from)), []);
    }

    #[test]
    fn what_was_measured_is_no_setting() {
        let of = |rounding: Value, more: &str| json!({"key_error": 0.25, "rounding": rounding, "adapted": [more]});
        let [first, second] = [of(json!(1e-6), "a"), of(json!(2e-6), "b")];
        assert_eq!(changes(record("key_value", first), record("key_value", second)), []);
        // A setting of another method has that name.
        let [first, second] = [of(json!("nearest"), "a"), of(json!("gptq"), "b")];
        let found = changes(record("low_rank", first.clone()), record("low_rank", second.clone()));
        assert_eq!(found, [("rounding".into(), json!("nearest"), json!("gptq"))]);
        let found = changes(record("low_rank", first), record("ternary", second));
        assert_eq!(found, [("method".into(), json!("low_rank"), json!("ternary"))]);
    }
}
