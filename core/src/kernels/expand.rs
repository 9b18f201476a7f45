//! Rows of codes as the numbers that they stand for.

use std::ops::Range;

use super::layout::Window;
use super::packed::Rows;
use super::simd::{Kernel, Simd, each};

/// Writes the numbers that rows stand for, each row in the order that inputs are laid out in as floats, `stride` apart.
///
/// # Safety
/// The processor has the instructions of `S`, and the rows are there.
pub unsafe fn expand<S: Simd>(m: &Rows, rows: Range<usize>, stride: usize, out: &mut [f32]) {
    let codes = S::LANES * 4 * m.halves;
    assert!(out.len() >= rows.len() * stride && stride >= m.blocks.places.len() * codes, "room for the rows");
    let (first, count, out) = (rows.start, rows.len(), out.as_mut_ptr());
    // SAFETY: the caller's promise, and there is room.
    unsafe {
        match (m.halves, m.coding.levels.is_some()) {
            (4, _) => S::compiled(Expand::<4, false> { m, first, count, stride, out }),
            (2, false) => S::compiled(Expand::<2, false> { m, first, count, stride, out }),
            (2, true) => S::compiled(Expand::<2, true> { m, first, count, stride, out }),
            (_, false) => S::compiled(Expand::<1, false> { m, first, count, stride, out }),
            (_, true) => S::compiled(Expand::<1, true> { m, first, count, stride, out }),
        }
    }
}

/// `count` rows from the `first` one on.
struct Expand<'a, const H: usize, const LEVELS: bool> {
    m: &'a Rows<'a>,
    first: usize,
    count: usize,
    stride: usize,
    /// Room for `count` rows, `stride` apart.
    out: *mut f32,
}

impl<S: Simd, const H: usize, const LEVELS: bool> Kernel<S> for Expand<'_, H, LEVELS> {
    #[inline(always)]
    unsafe fn run(self) {
        let m = self.m;
        // SAFETY: the caller's promise.
        unsafe {
            let coding = S::coding(&m.coding);
            let mut i = 0;
            while i < self.count {
                let row = self.first + i;
                let mut packed = m.packed.as_ptr().wrapping_add(row * m.row_bytes);
                let mut out = self.out.wrapping_add(i * self.stride);
                let mut places = m.blocks.places.as_ptr().cast::<u32>();
                let mut number = 0;
                while number < m.blocks.windows.len() {
                    let window: &Window = &*m.blocks.windows.as_ptr().wrapping_add(number);
                    let first = row * m.groups + window.first;
                    let scales = m.scales.load::<S>(first, window.count);
                    let has_minimums = !m.minimums.is_empty();
                    let offsets = if has_minimums {
                        m.minimums.load::<S>(first, window.count)
                    } else if m.zeros.is_empty() {
                        S::splat(m.zero)
                    } else {
                        S::bytes_some(m.zeros.as_ptr().wrapping_add(first), window.count)
                    };
                    let mut block = 0;
                    while block < window.blocks {
                        let mut codes = if window.bytes == m.block_bytes {
                            S::block::<H, true>(packed, window.bytes, coding)
                        } else {
                            S::block::<H, false>(packed, window.bytes, coding)
                        };
                        let scale = S::mul(S::pick(scales, places), S::splat(m.factor));
                        let own = S::pick(offsets, places);
                        let offset = if has_minimums { own } else { S::fnma(scale, own, S::zero()) };
                        each!(four in H, {
                            each!(step in 4, {
                                if four + step > 0 {
                                    codes = S::following::<H>(codes);
                                }
                                let value = S::fma(S::values::<H, LEVELS>(codes, coding), scale, offset);
                                S::store(out.wrapping_add((4 * four + step) * S::LANES), value);
                            });
                        });
                        packed = packed.wrapping_add(m.block_bytes);
                        out = out.wrapping_add(S::LANES * 4 * H);
                        places = places.wrapping_add(16);
                        block += 1;
                    }
                    number += 1;
                }
                i += 1;
            }
        }
    }
}
