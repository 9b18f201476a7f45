//! The dense f32 product that layers stand for, by the fastest of the libraries at hand, and how times are taken.

#![allow(dead_code, reason = "each benchmark uses some of it")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use ndarray::{Array2, ArrayView2, Axis};
use rayon::prelude::*;

pub fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

pub fn median(run: impl FnMut()) -> Duration {
    median_within(Duration::from_millis(700), run)
}

/// The median time of what runs in so long, and at least 15 times.
pub fn median_within(all: Duration, mut run: impl FnMut()) -> Duration {
    run();
    let started = Instant::now();
    let mut times = vec![];
    while times.len() < 15 || (started.elapsed() < all && times.len() < 4001) {
        let started = Instant::now();
        run();
        times.push(started.elapsed());
    }
    times.sort();
    times[times.len() / 2]
}

/// `x · Wᵀ` by the fastest of three.
pub fn dense(weight: ArrayView2<f32>, x: ArrayView2<f32>) -> Duration {
    let (out, inputs) = weight.dim();
    let batch = x.nrows();
    let mut y = Array2::<f32>::zeros((batch, out));
    let by_ndarray = if batch == 1 {
        let row = x.row(0);
        median(|| {
            black_box(black_box(weight).dot(&black_box(row)));
        })
    } else {
        median(|| {
            black_box(black_box(x).dot(&weight.t()));
        })
    };
    let par = if batch == 1 { Par::Seq } else { Par::rayon(0) };
    let by_faer = median(|| {
        let target = MatMut::from_row_major_slice_mut(y.as_slice_mut().expect("fresh"), batch, out);
        let a = MatRef::from_row_major_slice(x.as_slice().expect("whole"), batch, inputs);
        let b = MatRef::from_row_major_slice(weight.as_slice().expect("whole"), out, inputs);
        matmul(target, Accum::Replace, black_box(a), black_box(b.transpose()), 1.0, par);
    });
    let by_matrixmultiply = median(|| {
        let (x, w) = (black_box(x.as_ptr()), black_box(weight.as_ptr()));
        let (rows, columns, inner) = (batch, out, inputs as isize);
        // SAFETY: the strides are those of the three whole matrices.
        unsafe {
            matrixmultiply::sgemm(
                rows,
                inputs,
                columns,
                1.0,
                x,
                inner,
                1,
                w,
                1,
                inner,
                0.0,
                y.as_mut_ptr(),
                columns as isize,
                1,
            );
        }
    });
    by_ndarray.min(by_faer).min(by_matrixmultiply)
}

pub fn matrix(rows: usize, columns: usize, seed: u64) -> Array2<f32> {
    let mut state = seed | 1;
    Array2::from_shape_fn((rows, columns), |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    })
}

/// [`dense`], or all threads' shares of the rows by ndarray, whichever is faster: for one input the libraries use one
/// thread.
pub fn dense_on_all_threads(weight: ArrayView2<f32>, x: ArrayView2<f32>) -> Duration {
    let share = weight.nrows().div_ceil(4 * rayon::current_num_threads());
    let shared = median(|| {
        let parts: Vec<_> = weight.axis_chunks_iter(Axis(0), share).collect();
        let parts: Vec<Array2<f32>> = black_box(parts)
            .into_par_iter()
            .map(|rows| match x.nrows() {
                1 => rows.dot(&x.row(0)).insert_axis(Axis(0)),
                _ => x.dot(&rows.t()),
            })
            .collect();
        black_box(parts);
    });
    shared.min(dense(weight, x))
}
