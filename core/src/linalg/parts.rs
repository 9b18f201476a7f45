//! faer's iterations whose sums are split among threads: into as many pieces as here whatever the machine has, so that a matrix is
//! taken apart into the same numbers by one thread and by many.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, EvdError, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::householder::{
    apply_block_householder_sequence_on_the_left_in_place_scratch as apply_scratch,
    apply_block_householder_sequence_on_the_left_in_place_with_conj as apply_with_conj,
};
use faer::linalg::qr::no_pivoting::factor::{qr_in_place, qr_in_place_scratch, recommended_block_size};
use faer::linalg::svd::{ComputeSvdVectors, SvdError, svd, svd_scratch};
use faer::{Conj, Mat, MatRef, Par};

/// Pieces that sums are split into: threads that can work at once.
const PIECES: usize = 8;

/// Left singular vectors, singular values, descending, and right singular vectors, one a column.
pub type SvdParts = (Mat<f64>, Vec<f64>, Mat<f64>);

/// Returns the thin SVD.
pub fn thin_svd(matrix: MatRef<'_, f64>) -> Result<SvdParts, SvdError> {
    let ((rows, columns), par) = (matrix.shape(), Par::rayon(PIECES));
    let k = rows.min(columns);
    let (mut u, mut v) = (Mat::zeros(rows, k), Mat::zeros(columns, k));
    let mut s = faer::Col::zeros(k);
    let thin = ComputeSvdVectors::Thin;
    let mut memory = MemBuffer::new(svd_scratch::<f64>(rows, columns, thin, thin, par, Default::default()));
    let (left, right) = (Some(u.as_mut()), Some(v.as_mut()));
    svd(matrix, s.as_mut().as_diagonal_mut(), left, right, par, MemStack::new(&mut memory), Default::default())?;
    Ok((u, s.iter().copied().collect(), v))
}

/// Returns the eigenvectors of a symmetric matrix, one a column, by eigenvalues, ascending. The lower half is read.
pub fn eigenvectors(matrix: MatRef<'_, f64>) -> Result<Mat<f64>, EvdError> {
    let (n, par) = (matrix.nrows(), Par::rayon(PIECES));
    let (mut u, mut s) = (Mat::zeros(n, n), faer::Col::zeros(n));
    let vectors = ComputeEigenvectors::Yes;
    let mut memory = MemBuffer::new(self_adjoint_evd_scratch::<f64>(n, vectors, par, Default::default()));
    let stack = MemStack::new(&mut memory);
    self_adjoint_evd(matrix, s.as_mut().as_diagonal_mut(), Some(u.as_mut()), par, stack, Default::default())?;
    Ok(u)
}

/// Returns an orthonormal basis of the columns, at most as many as rows, by Householder reflections.
pub fn orthonormal_basis(matrix: MatRef<'_, f64>) -> Mat<f64> {
    let ((rows, columns), par) = (matrix.shape(), Par::rayon(PIECES));
    let block = recommended_block_size::<f64>(rows, columns);
    let (mut factor, mut coefficients) = (matrix.to_owned(), Mat::zeros(block, columns));
    let mut memory = MemBuffer::new(qr_in_place_scratch::<f64>(rows, columns, block, par, Default::default()));
    qr_in_place(factor.as_mut(), coefficients.as_mut(), par, MemStack::new(&mut memory), Default::default());
    let mut basis = Mat::identity(rows, columns);
    let mut memory = MemBuffer::new(apply_scratch::<f64>(rows, block, columns));
    let stack = MemStack::new(&mut memory);
    apply_with_conj(factor.as_ref(), coefficients.as_ref(), Conj::No, basis.as_mut(), par, stack);
    basis
}
