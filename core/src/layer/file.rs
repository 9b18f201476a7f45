//! A file that lies beside a model's weights, such as its configuration or its tokenizer, kept as it is.

use bytes::Bytes;
use serde_json::{Value, json};

use super::name::MethodName;
use super::parts::{Parts, Tensor};
use super::traits::{Layer, no_weight};
use crate::error::{Error, Result};

/// The name of the array that holds the bytes.
const CONTENT: &str = "content";

/// The content of a file. Cloning shares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileLayer {
    content: Bytes,
}

impl FileLayer {
    /// The method's name in tables and JSON.
    pub const METHOD: &'static str = "file";

    /// Returns a file of this content.
    pub fn new(content: Bytes) -> Self {
        FileLayer { content }
    }

    /// Returns the content.
    pub fn content(&self) -> &Bytes {
        &self.content
    }

    pub(super) fn from_parts(mut parts: Parts) -> Result<Self> {
        let found = format!("{} arrays", parts.tensors.len());
        match (parts.tensors.pop(), parts.tensors.is_empty()) {
            (Some(Tensor { name, dtype, shape, data }), true)
                if name == CONTENT && dtype == "U8" && shape == [data.len()] =>
            {
                Ok(FileLayer { content: data })
            }
            _ => Err(Error::expected("parts of a file", found, format!("one of bytes, named '{CONTENT}'"))),
        }
    }
}

impl Layer for FileLayer {
    fn method(&self) -> MethodName {
        MethodName::new(Self::METHOD)
    }

    fn in_features(&self) -> usize {
        0
    }

    fn out_features(&self) -> usize {
        0
    }

    fn require_linear(&self) -> Result<()> {
        Err(no_weight("a layer to run", &self.method()))
    }

    fn config(&self) -> Value {
        json!({})
    }

    fn to_parts(&self) -> Parts {
        let mut parts = Parts::new(Self::METHOD, self.config());
        let (name, dtype, shape) = (CONTENT.into(), "U8".into(), vec![self.content.len()]);
        parts.tensors.push(Tensor { name, dtype, shape, data: self.content.clone() });
        parts
    }

    fn memory_bytes(&self) -> usize {
        self.content.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_comes_back_from_parts_alone() {
        for content in [&b"{}"[..], b""] {
            let file = FileLayer::new(Bytes::copy_from_slice(content));
            assert_eq!(FileLayer::from_parts(file.to_parts()).unwrap(), file);
            assert!(file.weight().unwrap_err().to_string().contains("file"));
        }
        let mut wrong = FileLayer::new(Bytes::from_static(b"ab")).to_parts();
        wrong.tensors[0].shape = vec![3];
        assert!(FileLayer::from_parts(wrong).is_err());
        assert!(FileLayer::from_parts(Parts::new(FileLayer::METHOD, json!({}))).is_err());
    }
}
