//! The layer mathematics of [`layerstore`](https://docs.rs/layerstore): what a compressed layer is and how it runs, in memory.
//!
//! This crate knows nothing of Lance, tokio or files. It is a part of `layerstore`, split off so that it compiles beside LanceDB
//! and is optimised in every profile; depend on `layerstore`, which re-exports what is meant for users. What is public here and
//! not there may change in any version.
//!
//! Dependencies point one way: [`linalg`] knows of nothing, then the kernels, [`quant`], [`calibration`], then [`index`] and
//! [`attention`], then [`layer`], then
//! [`nn`] and [`transformer`].

#[cfg(target_endian = "big")]
compile_error!("stored numbers are little-endian and are used in place");

pub mod attention;
pub mod calibration;
pub mod error;
pub mod index;
mod kernels;
pub mod layer;
pub mod linalg;
pub mod nn;
pub mod quant;
pub mod transformer;

pub use calibration::{Calibration, CalibrationBuilder, SecondMoment};
pub use error::{Error, ErrorKind, Result};
