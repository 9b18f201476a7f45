//! layerstore
#[doc(hidden)]
pub mod cli;
pub mod error;
pub mod index;
pub mod layer;
pub mod linalg;
pub mod model;
pub mod quant;
pub mod store;

pub use error::{Error, ErrorKind, Result};
