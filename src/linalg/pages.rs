//! Memory for large arrays.

use ndarray::Array3;

/// Bytes of a large page.
#[cfg(target_os = "linux")]
const PAGE: usize = 2 << 20;

/// Zeros, in large pages where there are many: the system hands out one of them far faster than 512 small ones.
pub fn large_zeros(shape: (usize, usize, usize)) -> Array3<f32> {
    let zeros = Array3::<f32>::zeros(shape);
    #[cfg(target_os = "linux")]
    {
        let bytes = size_of_val(zeros.as_slice().unwrap_or_default());
        let start = zeros.as_ptr().cast::<u8>().align_offset(PAGE);
        let whole = bytes.saturating_sub(start) / PAGE * PAGE;
        if whole >= 2 * PAGE {
            // SAFETY: the range is within the array, and the advice changes none of its contents. That it may not be taken
            // is no failure.
            unsafe {
                libc::madvise(zeros.as_ptr().cast::<u8>().add(start).cast_mut().cast(), whole, libc::MADV_HUGEPAGE);
            }
        }
    }
    zeros
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_zeros_that_can_be_written() {
        for shape in [(0, 3, 4), (1, 1, 1), (3, 1000, 1001), (1, 1 << 20, 3)] {
            let mut zeros = large_zeros(shape);
            assert_eq!(zeros.dim(), shape);
            assert!(zeros.iter().all(|v| *v == 0.0));
            zeros.fill(1.0);
            assert_eq!(zeros.iter().filter(|v| **v == 1.0).count(), shape.0 * shape.1 * shape.2);
        }
    }
}
