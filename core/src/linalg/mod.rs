//! Linear algebra and statistics, in memory, on `ndarray` arrays (row-major, `[rows, columns]`).
//!
//! Decompositions run in f64 inside [`faer`], which stays private to this module; products of activations run in f32. What is public is
//! what a caller needs to judge a layer or to repeat a method by hand: errors, products, AXL's functions, SVDs, the normal
//! distribution, and conversions for callers whose matrices are [`nalgebra`]'s.
//!
//! Dependencies inside the module point one way: `product`, `finite`, `normal`, `pages`, `parts` and `threads` know of nothing, then `decompose`,
//! then `randomized`, `statistics` and `whitening`.

mod convert;
mod decompose;
mod exp;
mod finite;
mod narrow;
mod normal;
mod pages;
mod parts;
mod product;
mod randomized;
mod statistics;
mod threads;
mod whitening;

pub use convert::{from_dmatrix, from_dvector, to_dmatrix, to_dvector};
pub use decompose::{KeysValues, Svd, inverse_lower, leading_svd, regularized_inverse, svd_keys_values};
pub use finite::{Float, require_finite};
pub use normal::{normal_cdf, normal_pdf, normal_quantile};
pub use pages::{LARGE_PAGE, ask_for_large_pages};
pub use product::{add_outer, matmul, matmul_f64, matmul_nt, relative_error};
pub use randomized::{LinearOperator, SketchOptions, randomized_svd};
pub use statistics::{Ridge, covariance, covariance_of, second_moment_of};
pub use whitening::Whitening;

pub(crate) use decompose::{cholesky, kept_rank, solve_lower_transposed, spectral_norm_bound, svd};
pub(crate) use exp::exp;
pub(crate) use narrow::{HALF_ROUNDING, Loss, unit_of, unit_of_f32};
pub(crate) use normal::{normal_matrix, normal_survival};
pub(crate) use pages::large_zeros;
pub(crate) use product::{add_gram, dot_f64, mirror, product_into};
pub(crate) use statistics::with_floor;
pub use threads::threads;
pub(crate) use threads::{on_all_threads, share, share_chunks, share_rows};
