//! Linear algebra and statistics, in memory, on `ndarray` arrays (row-major, `[rows, columns]`).
//!
//! Decompositions run in f64 inside [`faer`], which stays private to this module; products of activations run in f32.

mod convert;
mod decompose;
mod finite;
mod normal;
mod pages;
mod product;
mod randomized;
mod statistics;
mod threads;
mod whitening;

pub use convert::{from_dmatrix, from_dvector, to_dmatrix, to_dvector};
pub use decompose::{
    KeysValues, Svd, cholesky, inverse_lower, kept_rank, leading_svd, regularized_inverse, solve_lower,
    solve_lower_transposed, spectral_norm_bound, svd, svd_keys_values,
};
pub use finite::require_finite;
pub use normal::{normal_cdf, normal_matrix, normal_pdf, normal_quantile, normal_survival};
pub use pages::{LARGE_PAGE, ask_for_large_pages, large_zeros};
pub use product::{add_outer, dot_f64, matmul, matmul_f64, matmul_nt, matmul_nt_f64, product_into, relative_error};
pub use randomized::{Operator, Sketch, randomized_svd};
pub use statistics::{Ridge, covariance, covariance_of, second_moment_of};
pub use threads::{in_pool, on_all_threads};
pub use whitening::Whitening;
