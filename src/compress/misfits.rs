//! All that does not fit in an import, as one error: nobody wants to hear of a checkpoint's mistakes one by one.

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};

/// Misfits that a message shows; a checkpoint of another model has one for each layer.
const SHOWN: usize = 30;

/// What does not fit, in the order in which it was found.
#[derive(Debug, Default)]
pub(super) struct Misfits(Vec<Error>);

impl Misfits {
    /// Keeps what a layer's check found, and returns what it gave.
    pub fn keep<T>(&mut self, layer: &str, found: Result<T>) -> Option<T> {
        found.map_err(|e| self.0.push(e.in_layer(layer))).ok()
    }

    /// Returns one error of all; one that is no fault of what was given goes first.
    pub fn result(self, source: &Path) -> Result<()> {
        let mut all = self.0;
        if let Some(other) = all.iter().position(|e| e.kind() != ErrorKind::InvalidInput) {
            return Err(all.swap_remove(other));
        }
        if all.len() <= 1 {
            return all.pop().map_or(Ok(()), Err);
        }
        let mut reason = format!("found {} things that do not fit, expected none:", all.len());
        for error in all.iter().take(SHOWN) {
            // A line each, whatever a name holds.
            reason.push_str(&format!("\n  {}", error.to_string().replace('\n', "\\n")));
        }
        if let Some(more) = all.len().checked_sub(SHOWN).filter(|n| *n > 0) {
            reason.push_str(&format!("\n  and {more} more"));
        }
        Err(Error::file(source, reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_misfits_are_one_error() {
        let wrong = |n: usize| Error::expected("width", n, "4");
        let mut misfits = Misfits::default();
        assert_eq!(misfits.keep("a", Ok(3)), Some(3));
        Misfits::default().result(Path::new("m")).unwrap();
        misfits.keep::<()>("a", Err(wrong(1)));
        assert!(matches!(Misfits(vec![wrong(1)]).result(Path::new("m")), Err(Error::Expected { .. })));
        misfits.keep::<()>("b\nerror: c", Err(wrong(2)));
        let error = misfits.result(Path::new("m")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        let message = error.to_string();
        assert!(message.contains("found 2 things"), "{message}");
        assert!(message.lines().nth(2) == Some("  layer 'b\\nerror: c': width: found 2, expected 4"), "{message}");
        let many = Misfits((0..40).map(wrong).collect()).result(Path::new("m")).unwrap_err().to_string();
        assert!(many.ends_with("\n  and 10 more"), "{many}");
        let refused = Misfits(vec![wrong(1), Error::Cancelled]).result(Path::new("m"));
        assert!(matches!(refused, Err(Error::Cancelled)));
    }
}
