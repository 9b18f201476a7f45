//! Memory for large arrays.

use ndarray::Array3;

/// Bytes of a large page, which the system provides far faster than the 512 small ones.
pub const LARGE_PAGE: usize = 2 << 20;

/// Asks the system for large pages where the `bytes` from `start` on hold whole ones. It is advice: the system may not follow it, and
/// nothing fails then.
///
/// # Safety
/// The `bytes` from `start` on are memory of the caller.
pub unsafe fn ask_for_large_pages(start: *const u8, bytes: usize) {
    let skipped = start.align_offset(LARGE_PAGE);
    let whole = bytes.saturating_sub(skipped) / LARGE_PAGE * LARGE_PAGE;
    #[cfg(target_os = "linux")]
    if whole > 0 {
        // SAFETY: the range is the caller's, and the advice changes none of its contents.
        unsafe { libc::madvise(start.add(skipped).cast_mut().cast(), whole, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = whole;
}

/// Returns zeros, in large pages where there are many.
pub fn large_zeros(shape: (usize, usize, usize)) -> Array3<f32> {
    let zeros = Array3::<f32>::zeros(shape);
    let bytes = size_of::<f32>() * zeros.len();
    if bytes >= 2 * LARGE_PAGE {
        // SAFETY: it is the array's own.
        unsafe { ask_for_large_pages(zeros.as_ptr().cast(), bytes) };
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
