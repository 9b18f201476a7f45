//! Rules files: which layers are compressed how. First match wins; what no rule matches stays dense.

use std::collections::BTreeMap;
use std::path::Path;

use layerstore_core::layer::registry;
use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value};
use toml::Spanned;

use crate::error::{Error, Result};
use crate::layer::{MethodConfig, MethodKind, VqAttentionConfig};

/// One rule: layers whose whole path matches are compressed by a method.
#[derive(Debug, Clone)]
pub struct Rule {
    pattern: Regex,
    /// The pattern as it was written.
    pub layers: String,
    /// What layers become.
    pub method: MethodConfig,
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
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let name = path.display().to_string();
        match String::from_utf8(bytes) {
            Ok(text) => Self::parse(&text, &name),
            Err(e) => {
                let valid = e.utf8_error().valid_up_to();
                let line = 1 + e.as_bytes()[..valid].iter().filter(|b| **b == b'\n').count();
                Err(Error::Rules { file: name, line, message: "the file is not UTF-8".into() })
            }
        }
    }

    /// Reads rules from `text`; `file` is the name for messages.
    ///
    /// # Errors
    /// As [`Rules::open`].
    pub fn parse(text: &str, file: &str) -> Result<Self> {
        let line_of =
            |offset: usize| 1 + text.as_bytes()[..offset.min(text.len())].iter().filter(|b| **b == b'\n').count();
        let fail =
            |offset: usize, message: String| Error::Rules { file: file.to_owned(), line: line_of(offset), message };
        let parsed: File = toml::from_str(text).map_err(|e| {
            let mut message = e.message().to_owned();
            if message.starts_with("unknown field") {
                message.push_str(": rules are [[rule]] tables");
            }
            fail(e.span().map_or(0, |s| s.start), message)
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
}

/// A rule as its table is written.
type Table = Spanned<BTreeMap<Spanned<String>, Spanned<toml::Value>>>;

/// Reads a rule; on failure, where the mistake is, and what.
fn read_rule(table: Table, line_of: &impl Fn(usize) -> usize) -> std::result::Result<Rule, (usize, String)> {
    let start = table.span().start;
    let mut layers = None;
    let mut settings = Map::new();
    let mut places = BTreeMap::new();
    for (key, value) in table.into_inner() {
        places.insert(key.get_ref().clone(), key.span().start);
        if key.get_ref() == "layers" {
            let at = value.span().start;
            match value.into_inner() {
                toml::Value::String(pattern) => layers = Some((pattern, at)),
                other => {
                    return Err((
                        at,
                        format!("layers is a {}; expected a regular expression in quotes", other.type_str()),
                    ));
                }
            }
        } else {
            let at = value.span().start;
            if value.get_ref().as_float().is_some_and(|f| !f.is_finite()) {
                return Err((at, format!("{} is {}; expected a finite number", key.get_ref(), value.get_ref())));
            }
            let json = serde_json::to_value(value.into_inner()).map_err(|e| (at, e.to_string()))?;
            settings.insert(key.into_inner(), json);
        }
    }
    let Some((layers, at)) = layers else {
        return Err((start, "the rule has no 'layers': give a regular expression for the layers it takes".into()));
    };
    // Anchored: a rule names whole paths, as the examples in the documentation do with their '.*'.
    let pattern = Regex::new(&layers).and_then(|_| anchored(&layers)).map_err(|e| {
        // The regex crate draws the pattern in several lines; the last one says what is wrong.
        let reason = e.to_string();
        (at, format!("layers = '{layers}' is not a regular expression: {}", reason.lines().last().unwrap_or_default()))
    })?;
    let method = read_method(&settings)
        .map_err(|(key, message)| (key.and_then(|k| places.get(&k).copied()).unwrap_or(start), message))?;
    Ok(Rule { pattern, layers, method, line: line_of(start) })
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
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let fail = |line: usize, message: String| Error::Rules { file: path.display().to_string(), line, message };
    let config: VqAttentionConfig = toml::from_str(&text).map_err(|e| {
        let start = e.span().map_or(0, |span| span.start).min(text.len());
        fail(1 + text.as_bytes()[..start].iter().filter(|b| **b == b'\n').count(), e.message().to_owned())
    })?;
    config.validate().map_err(|e| fail(1, e.to_string()))?;
    Ok(config)
}

/// The method of a rule's table; on failure, the key to blame where there is one, and the message.
fn read_method(settings: &Map<String, Value>) -> std::result::Result<MethodConfig, (Option<String>, String)> {
    let names = || registry::names_for_rules().join(", ");
    let name = match settings.get("method") {
        Some(Value::String(name)) => name,
        Some(_) => return Err((Some("method".into()), format!("method must be one of {}, in quotes", names()))),
        None => return Err((None, format!("the rule has no 'method': give one of {}", names()))),
    };
    let method = registry::method(name).map_err(|e| (Some("method".into()), e.to_string()))?;
    if !method.has_rules() {
        return Err((Some("method".into()), format!("method: no rule makes a {name}; give one of {}", names())));
    }
    let mut fields = settings.clone();
    fields.remove("method");
    let read = |fields: &Map<String, Value>| method.read_settings(fields.clone()).map_err(|e| e.to_string());
    read(&fields).map_err(|message| {
        // The key to blame is the one without which the complaint goes away.
        let blamed = fields.keys().find(|key| {
            let mut without = fields.clone();
            without.remove(*key);
            read(&without).err().as_ref() != Some(&message)
        });
        let shown = blamed.map_or(message.clone(), |key| format!("{key}: {message}"));
        (blamed.cloned(), shown)
    })
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
            (&rule("method = 'module'"), 3, "no rule makes a module"),
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
