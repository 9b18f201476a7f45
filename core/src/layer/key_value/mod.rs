//! `W x` as retrieval: the layer's components are keys, a query uses those that matter to it.
//!
//! With μ and C the inputs' mean and covariance, C + ridge·I = L Lᵀ and z = L⁻¹(x − μ):
//!
//! * `svd`: W = U S Vᵀ, key k_i = S_i v_i, Lᵀk_i = s_i k̃_i with ‖k̃_i‖ = 1;
//! * `whitened_svd`: W L = U S Vᵀ, k̃_i = v_i, s_i = S_i.
//!
//! score_i = ⟨k̃_i, z⟩ has unit variance, contribution c_i = s_i·score_i, and y = b + W μ + Σ c_i u_i exactly. The
//! whitening is folded into the stored key once, κ_i = L⁻ᵀk̃_i, so score_i = ⟨κ_i, x − μ⟩ and a query is never whitened.
//! The u_i are orthonormal, so the squared error of leaving keys out is Σ c_i² over them: each answer's error is known.
//!
//! After AXL's `ApproximateLinear`, which multiplies keys by L⁻ᵀ where Lᵀ is right, forgets s_i, and keeps one sign only.

mod answer;
mod backend;
mod build;
mod config;
mod forward;
mod layer;
mod limit;
mod method;
mod parts;
mod search;
mod stored;
mod threshold;
mod train;

pub use backend::{Backend, OnMisfit};
pub use config::{Decomposition, KeyValueConfig, SearchSettings};
pub use layer::KeyValueLayer;
pub use limit::{Limit, Ranking, Sides};
pub use search::{Hit, QueryHits};
pub use stored::{ScoreRange, StoredSearch};
pub use threshold::{ThresholdMethod, search_threshold};
pub use train::Refit;

#[cfg(test)]
mod tests;
