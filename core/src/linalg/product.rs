//! Matrix products, handed to faer's blocked kernels with rayon's threads.

use faer::linalg::matmul::matmul as faer_matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::{Array2, ArrayView1, ArrayView2, ArrayViewMut2};

use super::threads::is_sharing;

/// Below this many multiply-adds a product stays on one thread: starting threads would cost more than it saves.
const PARALLEL_FROM: usize = 1 << 20;

/// Returns one thread for what is small, and for what is already a part of shared work: the others have theirs.
pub(super) fn parallelism(operations: usize) -> Par {
    if operations >= PARALLEL_FROM && rayon::current_thread_index().is_none() && !is_sharing() {
        Par::rayon(0)
    } else {
        Par::Seq
    }
}

macro_rules! product {
    ($t:ty, $name:ident) => {
        /// Returns `a · b` for `a` `[m, k]` and `b` `[k, n]`.
        ///
        /// # Panics
        /// When the inner lengths differ, as `ndarray`'s own `dot` does.
        pub fn $name(a: ArrayView2<$t>, b: ArrayView2<$t>) -> Array2<$t> {
            assert_eq!(a.ncols(), b.nrows(), "inner lengths of a product");
            let (m, n) = (a.nrows(), b.ncols());
            let mut out = Array2::<$t>::zeros((m, n));
            if m == 0 || n == 0 || a.ncols() == 0 {
                return out;
            }
            let par = parallelism(m * n * a.ncols());
            let target =
                MatMut::from_row_major_slice_mut(out.as_slice_mut().expect("fresh arrays are contiguous"), m, n);
            faer_matmul(target, Accum::Replace, view(&a), view(&b), 1.0, par);
            out
        }
    };
}

product!(f32, matmul);
product!(f64, matmul_f64);

/// Returns `a · bᵀ` for `a` `[m, k]` and `b` `[n, k]`: the forward pass `x · Wᵀ` of a weight `[out, in]`.
///
/// # Panics
/// When the inner lengths differ.
pub fn matmul_nt(a: ArrayView2<f32>, b: ArrayView2<f32>) -> Array2<f32> {
    matmul(a, b.reversed_axes())
}

/// Returns the Gram matrix `xᵀ · x` `[n, n]` of the columns of `x` `[m, n]`.
pub fn gram(x: ArrayView2<f64>) -> Array2<f64> {
    let mut out = Array2::zeros((x.ncols(), x.ncols()));
    add_gram(&mut out, x);
    mirror(&mut out);
    out
}

/// Adds `xᵀ · x` `[n, n]` of the columns of `x` `[m, n]` to the diagonal and what is below it of `out`: half of the work, as the rest
/// is the same ([`mirror`]).
///
/// # Panics
/// When the lengths do not fit.
pub fn add_gram(out: &mut Array2<f64>, x: ArrayView2<f64>) {
    let n = x.ncols();
    assert_eq!(out.dim(), (n, n), "lengths of a product");
    if x.is_empty() {
        return;
    }
    let par = parallelism(n * n * x.nrows() / 2);
    let ((rows, columns), strides) = (out.dim(), [out.strides()[0], out.strides()[1]]);
    // SAFETY: the pointer, shape and strides describe the live array `out`, which nobody else holds.
    let target = unsafe { MatMut::from_raw_parts_mut(out.as_mut_ptr(), rows, columns, strides[0], strides[1]) };
    let (lower, whole) = (BlockStructure::TriangularLower, BlockStructure::Rectangular);
    triangular::matmul(target, lower, Accum::Add, view(&x.t()), whole, view(&x), whole, 1.0, par);
}

/// Writes what is below the diagonal of a square matrix above it as well.
pub fn mirror(matrix: &mut Array2<f64>) {
    for i in 0..matrix.nrows() {
        for j in 0..i {
            matrix[(j, i)] = matrix[(i, j)];
        }
    }
}

/// Sets `out = alpha · a · b`, or adds that to it where `add`, on this thread.
///
/// # Panics
/// When the lengths do not fit.
pub fn product_into(mut out: ArrayViewMut2<f32>, a: ArrayView2<f32>, b: ArrayView2<f32>, alpha: f32, add: bool) {
    assert_eq!((a.nrows(), a.ncols(), b.ncols()), (out.nrows(), b.nrows(), out.ncols()), "lengths of a product");
    let ((rows, columns), strides) = (out.dim(), [out.strides()[0], out.strides()[1]]);
    // SAFETY: the pointer, shape and strides describe the live view `out`, which nobody else holds.
    let target = unsafe { MatMut::from_raw_parts_mut(out.as_mut_ptr(), rows, columns, strides[0], strides[1]) };
    let accumulate = if add { Accum::Add } else { Accum::Replace };
    faer_matmul(target, accumulate, view(&a), view(&b), alpha, Par::Seq);
}

/// Returns an ndarray view as faer sees it, without a copy, whatever its strides.
pub(super) fn view<'a, T>(a: &'a ArrayView2<'_, T>) -> MatRef<'a, T> {
    let (rows, cols) = a.dim();
    let strides = a.strides();
    // SAFETY: the pointer, shape and strides describe the live view `a`, which outlives the result.
    unsafe { MatRef::from_raw_parts(a.as_ptr(), rows, cols, strides[0], strides[1]) }
}

/// Returns Σ a_i b_i of f32 numbers in f64, in sixteen running sums: one would wait for itself.
///
/// # Panics
/// When the lengths differ.
pub fn dot_f64(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "lengths of a dot product");
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the features are there.
        return unsafe { dot_f64_avx2(a, b) };
    }
    dot_f64_lanes(a, b)
}

/// [`dot_f64_lanes`], compiled for wider registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn dot_f64_avx2(a: &[f32], b: &[f32]) -> f64 {
    dot_f64_lanes(a, b)
}

#[inline(always)]
fn dot_f64_lanes(a: &[f32], b: &[f32]) -> f64 {
    let mut sums = [0f64; 16];
    let (a16, a_rest) = a.as_chunks::<16>();
    let (b16, b_rest) = b.as_chunks::<16>();
    for line in 0..a16.len().min(b16.len()) {
        let (a, b) = (&a16[line], &b16[line]);
        for lane in 0..16 {
            sums[lane] += f64::from(a[lane]) * f64::from(b[lane]);
        }
    }
    let mut rest = 0f64;
    for i in 0..a_rest.len().min(b_rest.len()) {
        rest += f64::from(a_rest[i]) * f64::from(b_rest[i]);
    }
    let mut sum = 0f64;
    for lane in sums {
        sum += lane;
    }
    sum + rest
}

/// Adds `row` to every row of `out`.
pub fn add_outer(out: &mut Array2<f32>, row: ArrayView1<f32>) {
    for mut r in out.rows_mut() {
        r += &row;
    }
}

/// Returns `‖approx − exact‖_F / ‖exact‖_F`, summed in f64; 0 when both are zero, infinite when only `exact` is.
pub fn relative_error(approx: ArrayView2<f32>, exact: ArrayView2<f32>) -> f64 {
    let mut difference = 0f64;
    let mut norm = 0f64;
    ndarray::Zip::from(approx).and(exact).for_each(|&a, &e| {
        difference += (f64::from(a) - f64::from(e)).powi(2);
        norm += f64::from(e).powi(2);
    });
    if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever its strides, the matrix is the product of both, and symmetric.
        #[test]
        fn a_gram_matrix_is_a_product(m in 0usize..20, n in 0usize..40, transposed: bool, seed in 0usize..1000) {
            let x = Array2::from_shape_fn((m, n), |(i, j)| ((i * 31 + j * 17 + seed) % 23) as f64 - 11.0);
            let x = if transposed { x.reversed_axes() } else { x };
            prop_assert_eq!(gram(x.view()), matmul_f64(x.t(), x.view()));
        }

        #[test]
        fn dot_agrees_with_the_definition(pairs in proptest::collection::vec((-9.0f32..9.0, -9.0f32..9.0), 0..40)) {
            let (a, b): (Vec<f32>, Vec<f32>) = pairs.iter().copied().unzip();
            let expected: f64 = pairs.iter().map(|&(a, b)| f64::from(a) * f64::from(b)).sum();
            prop_assert!((dot_f64(&a, &b) - expected).abs() < 1e-10);
        }

        #[test]
        fn products_agree_with_the_definition(m in 0usize..6, k in 0usize..7, n in 0usize..6, seed in 0u32..1000) {
            let cell = |i: usize, j: usize, s: u32| ((i * 31 + j * 17 + s as usize) % 23) as f32 - 11.0;
            let a = Array2::from_shape_fn((m, k), |(i, j)| cell(i, j, seed));
            let b = Array2::from_shape_fn((k, n), |(i, j)| cell(i, j, seed + 5));
            let expected = Array2::from_shape_fn((m, n), |(i, j)| (0..k).map(|l| a[[i, l]] * b[[l, j]]).sum::<f32>());
            prop_assert_eq!(&matmul(a.view(), b.view()), &expected);
            let bt = b.t().as_standard_layout().to_owned();
            prop_assert_eq!(&matmul_nt(a.view(), bt.view()), &expected);
        }
    }
}
