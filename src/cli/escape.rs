//! Names as they are printed: what would move the cursor, change colours or reorder text is shown as an escape.

use std::borrow::Cow;
use std::fmt::Write;

/// Returns a name, or other text of one line, with whatever is not shown as itself escaped, such as `\n` and `\u{1b}`.
pub fn name(text: &str) -> Cow<'_, str> {
    escaped(text, |_, _| false)
}

/// Returns text of several lines, as a command makes it of escaped names: line breaks stay.
pub fn lines(text: &str) -> Cow<'_, str> {
    escaped(text, |text, at| text.as_bytes()[at] == b'\n')
}

/// Returns a message, whose names may hold anything: a line break stays only before a line that is indented, as those of
/// lists are.
pub fn message(text: &str) -> Cow<'_, str> {
    escaped(text, |text, at| text[at..].starts_with("\n  "))
}

/// Returns JSON that means the same, with what is not shown as itself as JSON's own escapes.
pub fn json(text: String) -> String {
    if !text.chars().any(hidden) {
        return text;
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        // Only within strings: the rest of JSON is ASCII.
        match hidden(c) {
            true => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| _ = write!(shown, "\\u{unit:04x}")),
            false => shown.push(c),
        }
    }
    shown
}

fn escaped(text: &str, stays: impl Fn(&str, usize) -> bool) -> Cow<'_, str> {
    if !text.chars().any(hidden) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len() + 8);
    for (at, c) in text.char_indices() {
        match c {
            c if !hidden(c) || stays(text, at) => shown.push(c),
            '\n' => shown.push_str("\\n"),
            '\r' => shown.push_str("\\r"),
            '\t' => shown.push_str("\\t"),
            c => _ = write!(shown, "{}", c.escape_unicode()),
        }
    }
    shown.into()
}

/// Whether a character is not shown as itself: controls, line and paragraph separators, and format characters (Unicode's
/// category Cf), among them those that reorder text and those of no width.
fn hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}'..='\u{891}' | '\u{8e2}'
            | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}' | '\u{e0001}' | '\u{e0020}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_shown_is_escaped() {
        assert_eq!(name("encoder.größe 层"), "encoder.größe 层");
        assert_eq!(name("a\u{1b}[2J\nb\tc\u{202e}d\u{7f}\u{9b}"), r"a\u{1b}[2J\nb\tc\u{202e}d\u{7f}\u{9b}");
        assert_eq!(lines("a\nb\r"), "a\nb\\r");
        assert_eq!(message("2 layers:\n  a\nerror: b"), "2 layers:\n  a\\nerror: b");
        // Twice is as once.
        assert_eq!(lines(&name("a\nb")), r"a\nb");
    }

    #[test]
    fn json_stays_what_it_says() {
        let names = ["a\u{202e}b\u{e0041}\u{9b}", "größe"];
        let text = json(serde_json::to_string(&names).unwrap());
        assert!(text.contains("\\u202e") && !text.chars().any(hidden), "{text}");
        assert_eq!(serde_json::from_str::<Vec<String>>(&text).unwrap(), names);
    }
}
