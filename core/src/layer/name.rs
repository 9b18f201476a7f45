//! Names of methods.

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

/// The name of a method, as it stands in rules, tables and JSON, such as `low_rank`.
///
/// A name may be of a method that this program does not know, in a store that another wrote: the layer can be listed and
/// verified, but not run.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MethodName(Cow<'static, str>);

impl MethodName {
    /// Returns a name that is known when the program is compiled.
    pub const fn new(name: &'static str) -> Self {
        MethodName(Cow::Borrowed(name))
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&'static str> for MethodName {
    fn from(name: &'static str) -> Self {
        MethodName::new(name)
    }
}

impl From<String> for MethodName {
    fn from(name: String) -> Self {
        MethodName(Cow::Owned(name))
    }
}

impl From<MethodName> for Cow<'static, str> {
    fn from(name: MethodName) -> Self {
        name.0
    }
}

impl PartialEq<str> for MethodName {
    fn eq(&self, other: &str) -> bool {
        self.as_str() == other
    }
}

impl PartialEq<&str> for MethodName {
    fn eq(&self, other: &&str) -> bool {
        self.as_str() == *other
    }
}

impl fmt::Display for MethodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
