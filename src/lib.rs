//! layerstore
pub mod error;
pub mod index;
pub mod layer;
pub mod linalg;
pub mod quant;

pub use error::{Error, ErrorKind, Result};
