//! An embedded store for compressed neural-network layers.
//!
//! A checkpoint's layers become keys and values, or quantised weights with a low-rank correction; their parts are Arrow
//! tables in one LanceDB directory that many models share; snapshots name versions of the whole; a layer opens lazily,
//! by model and layer name, at any version, and runs from the store.
//!
//! ```
//! use layerstore::layer::Accuracy;
//! use layerstore::compress::{ImportOptions, Rules, import};
//! use layerstore::formats;
//! use layerstore::store::Store;
//! use ndarray::Array2;
//!
//! # #[tokio::main]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! // A checkpoint of one layer, [out_features, in_features]. Any safetensors checkpoint will do.
//! let weight = Array2::from_shape_fn((8, 64), |(i, j)| (((i * 64 + j) as f32).powi(2) * 0.37).sin());
//! let file = folder.join("model.safetensors");
//! formats::write_array(&format!("{}:encoder.dense.weight", file.display()), weight.view(), false)?;
//!
//! let rules = Rules::parse("[[rule]]\nlayers = 'encoder\\..*'\nmethod = 'low_rank'\nrank = 4", "rules.toml")?;
//! let store = Store::create(&folder.join("layers").display().to_string()).await?;
//! let options = ImportOptions { rules, ..ImportOptions::default() };
//! let report = import(&store, formats::open(&file)?, "demo", options).await?;
//! assert!(report.stored_bytes < report.dense_bytes);
//! store.create_snapshot("first").await?;
//!
//! let layer = store.at("first").await?.layer("demo", "encoder.dense").await?;
//! let x = Array2::from_shape_fn((1, 64), |(_, j)| (j as f32 * 0.37).cos());
//! let y = layer.forward(x.view(), Accuracy::Approximate).await?.y;
//! let error = layerstore::linalg::relative_error(y.view(), x.dot(&weight.t()).view());
//! assert!(error < 0.1);
//! # Ok(()) }
//! ```
//!
//! Dependencies point one way: [`linalg`] and [`quant`] know of nothing, [`index`], [`attention`], [`layer`] and
//! [`nn`] are in memory, only [`store`] knows of Lance and files, [`formats`] reads and writes model files, [`compress`] brings them and the store together.
//! [`blocking`] is the store for callers that are not async.

pub mod blocking;
#[doc(hidden)]
pub mod cli;
pub mod compress;
pub mod formats;
mod staged;
pub mod store;
mod tasks;

pub use layerstore_core::{
    Calibration, CalibrationBuilder, Error, ErrorKind, Result, SecondMoment, attention, error, index, layer, linalg,
    nn, quant,
};
