//! Rules files: which layers are compressed how. First match wins; what no rule matches stays dense.

use std::collections::BTreeMap;
use std::path::Path;

use layerstore_core::layer::registry;
use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value};
use toml::Spanned;

use crate::error::{Error, Result};
use crate::formats::{self, Arrangement, Split};
use crate::layer::{MethodConfig, MethodEntry, MethodKind, VqAttentionConfig};

/// One rule: layers whose whole path matches are compressed by a method.
#[derive(Debug, Clone)]
pub struct Rule {
    pattern: Regex,
    /// The pattern as it was written.
    pub layers: String,
    /// What layers become.
    pub method: MethodConfig,
    /// How their weights lie in the checkpoint.
    pub(crate) arrangement: Arrangement,
    /// Where the rule starts in its file.
    pub line: usize,
}

impl Rule {
    /// Returns whether the rule takes a linear layer; those for attention take none.
    pub fn matches(&self, layer: &str) -> bool {
        self.method.kind() == MethodKind::Linear && self.pattern.is_match(layer)
    }

    /// The rule's line and pattern, for reports.
    pub(super) fn described(&self) -> String {
        format!("line {}: {}", self.line, self.layers)
    }

    pub(super) fn pattern(&self) -> &Regex {
        &self.pattern
    }
}

/// The rules of one file, in order.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    rule: Vec<Table>,
}

impl Rules {
    /// Reads a rules file.
    ///
    /// # Errors
    /// When the file cannot be read, is not TOML, or holds a rule that cannot be used: the message gives the line.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(&formats::read_toml(path, "rules")?, &path.display().to_string())
    }

    /// Reads rules from `text`; `file` is the name for messages.
    ///
    /// # Errors
    /// As [`Rules::open`].
    pub fn parse(text: &str, file: &str) -> Result<Self> {
        let line_of = |offset: usize| line_at(text, offset);
        let parsed: File = toml::from_str(text).map_err(|e| {
            let (line, mut message) = told(&e, text);
            if message.starts_with("unknown field") {
                message.push_str(": rules are [[rule]] tables");
            }
            Error::Rules { file: file.to_owned(), line, message }
        })?;
        let (mut rules, mut mistakes) = (Vec::with_capacity(parsed.rule.len()), vec![]);
        for table in parsed.rule {
            match read_rule(table, &line_of) {
                Ok(rule) => rules.push(rule),
                Err((at, message)) => mistakes.push((line_of(at), message)),
            }
        }
        let mut mistakes = mistakes.into_iter();
        let Some((line, mut message)) = mistakes.next() else { return Ok(Rules { rules }) };
        // All of them, since each costs a run.
        mistakes.for_each(|(line, other)| message.push_str(&format!("\n  line {line}: {other}")));
        Err(Error::Rules { file: file.to_owned(), line, message })
    }

    /// Returns the rules, in order.
    pub fn iter(&self) -> impl Iterator<Item = &Rule> {
        self.rules.iter()
    }

    /// Returns the rule that takes a layer: its place in the file's order, and itself.
    pub fn find(&self, layer: &str) -> Option<(usize, &Rule)> {
        self.rules.iter().enumerate().find(|(_, r)| r.matches(layer))
    }

    /// Returns the first rule that takes a layer by its own name, or by that of the layer that it is a part of.
    pub(super) fn find_part(&self, layer: &str, whole: Option<&str>) -> Option<(usize, &Rule)> {
        let names = [Some(layer), whole];
        self.rules.iter().enumerate().find(|(_, r)| names.iter().flatten().any(|name| r.matches(name)))
    }
}

/// The line that a place in a text is in; the first is 1.
fn line_at(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|b| **b == b'\n').count()
}

/// What a text that is no TOML is told, and the line. A pattern in double quotes is the usual mistake.
fn told(e: &toml::de::Error, text: &str) -> (usize, String) {
    let place = e.span().map_or(0, |span| span.start).min(text.len());
    let mut message = e.message().to_owned();
    let line = text.get(..place).map_or("", |before| &before[before.rfind('\n').map_or(0, |at| at + 1)..]);
    // Up to the mistake.
    let (mut quote, mut escape) = (None, false);
    for c in line.chars() {
        match quote {
            None if matches!(c, '"' | '\'') => quote = Some(c),
            Some(open) if c == open => (quote, escape) = (None, false),
            _ => escape |= c == '\\',
        }
    }
    if quote == Some('"') && escape {
        message.push_str("; in double quotes a backslash begins an escape: write patterns in single quotes, ");
        message.push_str(r"such as 'encoder\.layer\.\d+'");
    }
    (line_at(text, place), message)
}

/// Returns where in a value a number is that is not finite, as a path of keys behind `name`, and the number.
fn not_finite(name: &str, value: &toml::Value) -> Option<(String, f64)> {
    match value {
        toml::Value::Float(f) if !f.is_finite() => Some((name.to_owned(), *f)),
        toml::Value::Table(table) => table.iter().find_map(|(key, value)| not_finite(&format!("{name}.{key}"), value)),
        toml::Value::Array(values) => values.iter().find_map(|value| not_finite(name, value)),
        _ => None,
    }
}

/// A table of settings as it is written.
type Written = BTreeMap<Spanned<String>, Spanned<toml::Value>>;

/// A rule as its table is written.
type Table = Spanned<Written>;

/// A mistake: where it is, and what.
type Mistake = (usize, String);

/// Settings, and where each begins.
#[derive(Default)]
struct Settings {
    values: Map<String, Value>,
    places: BTreeMap<String, usize>,
}

impl Settings {
    fn insert(&mut self, key: Spanned<String>, value: Spanned<toml::Value>) -> std::result::Result<(), Mistake> {
        let at = value.span().start;
        if let Some((name, found)) = not_finite(key.get_ref(), value.get_ref()) {
            return Err((at, format!("{name}: found {found}, expected a finite number")));
        }
        let json = serde_json::to_value(value.into_inner()).map_err(|e| (at, e.to_string()))?;
        self.places.insert(key.get_ref().clone(), key.span().start);
        self.values.insert(key.into_inner(), json);
        Ok(())
    }

    /// Reads the settings; a mistake is that of the key without which the complaint goes away, or of them all, which begin at
    /// `start`.
    fn read<T>(
        self,
        start: usize,
        read: impl Fn(Map<String, Value>) -> std::result::Result<T, String>,
    ) -> std::result::Result<T, Mistake> {
        read(self.values.clone()).map_err(|message| {
            let blamed = self.values.keys().find(|key| {
                let mut without = self.values.clone();
                without.remove(*key);
                read(without).err().as_ref() != Some(&message)
            });
            let Some(key) = blamed else { return (start, message) };
            let shown = match message.starts_with(&format!("{key}: ")) {
                true => message,
                false => format!("{key}: {message}"),
            };
            (self.places.get(key).copied().unwrap_or(start), shown)
        })
    }
}

/// Reads a rule.
fn read_rule(table: Table, line_of: &impl Fn(usize) -> usize) -> std::result::Result<Rule, Mistake> {
    let start = table.span().start;
    let mut layers = None;
    let mut settings = Settings::default();
    for (key, value) in table.into_inner() {
        if key.get_ref() == "layers" {
            let at = value.span().start;
            match value.into_inner() {
                toml::Value::String(pattern) => layers = Some((pattern, at)),
                other => {
                    let found = other.type_str();
                    let expected = "a regular expression in single quotes";
                    return Err((at, format!("layers: found a value of type {found}, expected {expected}")));
                }
            }
        } else {
            settings.insert(key, value)?;
        }
    }
    let Some((layers, at)) = layers else {
        return Err((start, "the rule has no 'layers': give a regular expression for the layers it takes".into()));
    };
    // A tab or a line break may lay out a pattern under the flag x.
    if let Some(control) = layers.chars().find(|c| c.is_control() && !matches!(c, '\t' | '\r' | '\n')) {
        let message = format!(
            "layers: found the control character {control:?}, which double quotes make of a backslash: write the pattern in \
             single quotes"
        );
        return Err((at, message));
    }
    // Anchored: a rule names whole paths, as the examples in the documentation do with their '.*'.
    let pattern = Regex::new(&layers).and_then(|_| anchored(&layers)).map_err(|e| {
        // The regex crate draws the pattern in several lines; the last one says what is wrong.
        let reason = e.to_string();
        (at, format!("layers = '{layers}' is not a regular expression: {}", reason.lines().last().unwrap_or_default()))
    })?;
    let arrangement = read_arrangement(&mut settings)?;
    let method = read_method(settings, start)?;
    if arrangement != Arrangement::default() && method.kind() != MethodKind::Linear {
        let message =
            "transpose and split are for layers of weights: give them in a rule of their own, with method = \"dense\"";
        return Err((start, message.into()));
    }
    Ok(Rule { pattern, layers, method, arrangement, line: line_of(start) })
}

/// Takes what a rule says of how weights lie in the checkpoint.
fn read_arrangement(settings: &mut Settings) -> std::result::Result<Arrangement, Mistake> {
    let mut taken = |key: &str| Some((settings.places.get(key).copied()?, settings.values.remove(key)?));
    let transpose = match taken("transpose") {
        None => false,
        Some((_, Value::Bool(transpose))) => transpose,
        Some((at, other)) => return Err((at, format!("transpose: found {other}, expected true or false"))),
    };
    let whole = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0);
    let split = match taken("split") {
        None => None,
        Some((_, Value::String(name))) if name == "experts" => Some(Split::Experts),
        Some((at, value)) => {
            let rows: Option<Vec<usize>> = value.as_array().and_then(|rows| rows.iter().map(whole).collect());
            match (whole(&value), rows) {
                (Some(parts), _) => Some(Split::Parts(parts)),
                (_, Some(rows)) if !rows.is_empty() => Some(Split::Rows(rows)),
                _ => {
                    let expected = "\"experts\", a number of parts, or a list of numbers of rows";
                    return Err((at, format!("split: found {value}, expected {expected}")));
                }
            }
        }
    };
    Ok(Arrangement { transpose, split })
}

/// A regular expression of whole texts. `layers` is one by itself.
fn anchored(layers: &str) -> std::result::Result<Regex, regex::Error> {
    // With the flag x, a comment at the end of the pattern would take the bracket that closes it.
    Regex::new(&format!("^(?:{layers})$")).or_else(|e| Regex::new(&format!("^(?:{layers}\n)$")).map_err(|_| e))
}

/// Reads the settings of an attention block: a file of what a rule for attention says, less `layers` and `method`.
///
/// # Errors
/// As [`Rules::open`].
pub fn read_attention_settings(path: &Path) -> Result<VqAttentionConfig> {
    let text = formats::read_toml(path, "settings of an attention block")?;
    let fail = |line: usize, message: String| Error::Rules { file: path.display().to_string(), line, message };
    let written: Written = toml::from_str(&text).map_err(|e| {
        let (line, message) = told(&e, &text);
        fail(line, message)
    })?;
    let read = || {
        let mut settings = Settings::default();
        for (key, value) in written {
            settings.insert(key, value)?;
        }
        settings.read(0, |fields| {
            let config: VqAttentionConfig =
                serde_json::from_value(Value::Object(fields)).map_err(|e| registry::in_words(&e.to_string()))?;
            config.validate().map_err(|e| e.to_string())?;
            Ok(config)
        })
    };
    read().map_err(|(at, message)| fail(line_at(&text, at), message))
}

/// Reads the method of a rule's table, which begins at `start`.
fn read_method(mut settings: Settings, start: usize) -> std::result::Result<MethodConfig, Mistake> {
    let names = || registry::names_for_rules().join(", ");
    let at = settings.places.get("method").copied().unwrap_or(start);
    let name = match settings.values.remove("method") {
        Some(Value::String(name)) => name,
        Some(_) => return Err((at, format!("method must be one of {}, in quotes", names()))),
        None => return Err((start, format!("the rule has no 'method': give one of {}", names()))),
    };
    let method = registry::method(&name).ok().filter(MethodEntry::has_rules);
    let method = method.ok_or_else(|| (at, format!("method: found '{name}', expected one of {}", names())))?;
    settings.read(start, |fields| method.read_settings(fields).map_err(|e| e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"
# comment
[[rule]]
layers = 'encoder\.layer\.\d+\.attention\..*'
method = "low_rank"
weight = { type = "int4", group = 64, symmetric = false }
rank = 32
scaling = "exact"

[[rule]]
layers = '.*\.intermediate\.dense'
method = "key_value"
decomposition = "whitened_svd"
energy_keep = 1.0
expected_keys_per_query = 64
backend = { type = "flat" }
values = "f32"

[[rule]]
layers = '.*'
method = "dense"
"#;

    #[test]
    fn first_match_wins_and_paths_match_whole() {
        let rules = Rules::parse(GOOD, "r.toml").unwrap();
        let (place, rule) = rules.find("encoder.layer.0.attention.self.query").unwrap();
        assert_eq!((place, rule.method.name().as_str(), rule.line), (0, "low_rank", 3));
        assert_eq!(rules.find("encoder.layer.11.intermediate.dense").unwrap().0, 1);
        assert_eq!(rules.find("x.encoder.layer.0.attention.self.query").unwrap().0, 2);
        assert!(Rules::default().find("a").is_none());
        assert!(Rules::parse("", "r.toml").unwrap().find("a").is_none());
    }

    /// With the flag x, blanks and comments are no part of a pattern, wherever they are.
    #[test]
    fn patterns_may_have_comments() {
        for pattern in
            ["(?x)a \\. b # comment", "(?x) a\\.b #) (", "(?x)(a # one\n \\. b)", "(?x: a \\. b # in a group\n)"]
        {
            let text = format!("[[rule]]\nlayers = \'\'\'{pattern}\'\'\'\nmethod = \'dense\'");
            let rules = Rules::parse(&text, "r.toml").unwrap();
            assert!(rules.find("a.b").is_some(), "{pattern}");
            assert!(
                rules.find("a.bc").is_none() && rules.find("xa.b").is_none() && rules.find("a.b\n").is_none(),
                "{pattern}"
            );
        }
        assert!(Rules::parse("[[rule]]\nlayers = 'a # b'\nmethod = 'dense'", "r").unwrap().find("a # b").is_some());
    }

    #[test]
    fn mistakes_are_shown_with_their_line() {
        let rule = |rest: &str| format!("[[rule]]\nlayers = '.*'\n{rest}\n");
        for (text, line, expected) in [
            ("[[rule]]\nlayers = ", 2, ""),
            ("[[rules]]\nlayers = '.*'", 1, "[[rule]]"),
            ("rule = 3", 1, "expected"),
            ("\n[[rule]]\nmethod = 'dense'", 2, "no 'layers'"),
            ("[[rule]]\nlayers = 4\nmethod = 'dense'", 2, "regular expression"),
            ("[[rule]]\nmethod = 'dense'\nlayers = 'a('", 3, "not a regular expression"),
            (&rule(""), 1, "no 'method'"),
            (&rule("method = 'magic'"), 3, "low_rank"),
            (&rule("method = 7"), 3, "in quotes"),
            (&rule("method = 'dense'\nrank = 4"), 4, "rank"),
            (&rule("method = 'low_rank'\nrank = -4"), 4, "rank: "),
            (&rule("method = 'key_value'\nthreshold = inf"), 4, "finite"),
            ("[[rule]]\nlayers = 'a)|(b'\nmethod = 'dense'", 2, "not a regular expression"),
            (&rule("method = 'low_rank'\n\nscaling = 'best'"), 5, "exact"),
            (&rule("method = 'low_rank'\nrank = 4\nweight = { type = 'int9' }"), 5, "int2"),
            (&rule("method = 'key_value'\nbackend = { type = 'annoy' }"), 4, "flat"),
            (&rule("method = 'key_value'\nthreshold = 1.0\nexpected_keys_per_query = 2"), 5, "one of them"),
            (&rule("method = 'key_value'\nenergy_keep = 2.0"), 4, "energy_keep"),
            (&rule("method = 'vq_attention'\nn_head = 4"), 1, "query, key and value"),
            (&rule("method = 'vq_attention'\nn_head = 4\nquery = 'q'\nkey = 'k'"), 6, "all three"),
            (&rule("method = 'vq_attention'\nmechanism = 'flash'"), 4, "vq_qk"),
            (&rule("method = 'module'"), 3, "found 'module', expected one of dense"),
            (&rule("method = 'ternary'\ngroup = 'row'"), 4, "channel"),
            (&rule("method = 'ternary'\nrank = 4\nnorm = 7"), 5, "norm"),
        ] {
            match Rules::parse(text, "r.toml") {
                Err(Error::Rules { line: found, message, .. }) => {
                    assert_eq!(found, line, "{text}: {message}");
                    assert!(message.contains(expected), "{text}: {message}");
                }
                other => panic!("{text}: {other:?}"),
            }
        }
    }

    #[test]
    fn all_mistakes_are_shown() {
        let text = "[[rule]]\nlayers = 'a('\nmethod = 'dense'\n[[rule]]\nlayers = 'b'\nmethod = 'magic'\n[[rule]]\nmethod = 'dense'";
        let message = Rules::parse(text, "r.toml").unwrap_err().to_string();
        let starts: Vec<&str> = message.lines().map(|line| line.split(": ").next().unwrap_or_default()).collect();
        assert_eq!(starts, ["r.toml, line 2", "  line 6", "  line 7"], "{message}");
    }

    proptest! {
        /// Whatever the text, an answer and no panic.
        #[test]
        fn any_text(text in "(\\[\\[rule\\]\\]\n)?(layers|method|rank|weight|threshold)? ?=? ?('[a-z(\\[\\\\*.]*'|[0-9.e-]{0,9}|\\{ ?type ?= ?'int4' ?\\})?\n?\\PC{0,20}") {
            let _ = Rules::parse(&text, "r.toml");
        }
    }
}
