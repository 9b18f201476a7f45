//! Some rows of packed codes with some inputs at a time: what each instruction set compiles for itself.
//!
//! Nothing of [`Lanes`] is called in a closure: one that is not inlined is compiled without the instructions.

use std::ops::Range;

use super::inputs::{Blocks, Inputs};
use super::lanes::{Coding, Lanes, opaque};

/// Packed rows as the kernels see them.
pub struct Rows<'a> {
    pub packed: &'a [u8],
    pub row_bytes: usize,
    /// Bytes of a block of a row's codes.
    pub block_bytes: usize,
    pub halves: usize,
    pub coding: Coding,
    /// `[rows, groups]`
    pub scales: &'a [f32],
    /// What scales are multiplied with beside.
    pub factor: f32,
    /// `[rows, groups]`, or none where `zero` is every group's.
    pub zeros: &'a [u8],
    pub zero: f32,
    pub groups: usize,
    pub blocks: &'a Blocks,
}

/// What inputs are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Floats,
    Bytes,
}

/// What a tile is compiled for.
mod mode {
    /// Floats for inputs.
    pub const FLOATS: u8 = 0;
    /// Bytes for inputs.
    pub const BYTES: u8 = 1;
    /// Bytes, and codes that nothing is flipped in.
    pub const PLAIN: u8 = 2;
    /// The same, and one scale a row: whole numbers are all that is added up.
    pub const WHOLE: u8 = 3;
}

/// Blocks of a row whose products, of codes left where they are in their bytes, surely fit 32 bits.
const WHOLE_BLOCKS: usize = 1 << 13;

/// `out[v · rows + i] = ⟨row i of the range, input v⟩`
///
/// # Safety
/// The machine has the instructions of `L`, the rows are there, the inputs are laid out for `L` and the matrix, and are of
/// this kind.
#[inline(always)]
pub unsafe fn products<L: Lanes>(m: &Rows, x: &Inputs, kind: Kind, rows: Range<usize>, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match (m.halves, m.coding.levels.is_some()) {
            (4, _) => tiles::<L, 4, false>(m, x, kind, rows, out),
            (2, false) => tiles::<L, 2, false>(m, x, kind, rows, out),
            (2, true) => tiles::<L, 2, true>(m, x, kind, rows, out),
            (_, false) => tiles::<L, 1, false>(m, x, kind, rows, out),
            (_, true) => tiles::<L, 1, true>(m, x, kind, rows, out),
        }
    }
}

#[inline(always)]
unsafe fn tiles<L: Lanes, const H: usize, const LEVELS: bool>(
    m: &Rows,
    x: &Inputs,
    kind: Kind,
    rows: Range<usize>,
    out: &mut [f32],
) {
    let plain = !LEVELS && m.coding.flip == 0;
    // Where a block's codes are spread, flipping them is part of it.
    let whole = !LEVELS && (plain || H == 1) && m.groups == 1 && m.blocks.places.len() <= WHOLE_BLOCKS;
    // SAFETY: the caller's promise.
    unsafe {
        match kind {
            Kind::Floats => tiled::<L, H, LEVELS, { mode::FLOATS }>(m, x, rows, out),
            Kind::Bytes if whole => tiled::<L, H, false, { mode::WHOLE }>(m, x, rows, out),
            Kind::Bytes if plain && H > 1 => tiled::<L, H, false, { mode::PLAIN }>(m, x, rows, out),
            Kind::Bytes => tiled::<L, H, LEVELS, { mode::BYTES }>(m, x, rows, out),
        }
    }
}

/// Four rows by one input, or by four. What is left over is done again with what came before it.
#[inline(always)]
unsafe fn tiled<L: Lanes, const H: usize, const LEVELS: bool, const MODE: u8>(
    m: &Rows,
    x: &Inputs,
    rows: Range<usize>,
    out: &mut [f32],
) {
    let (count, batch) = (rows.len(), x.rows());
    // SAFETY: the caller's promise.
    unsafe {
        let coding = L::coding(&m.coding);
        if count < 4 {
            for i in 0..count {
                for v in 0..batch {
                    let found = tile::<L, H, LEVELS, MODE, 1, 1>(m, x, coding, rows.start + i, v);
                    out[v * count + i] = found[0][0];
                }
            }
            return;
        }
        let mut i = 0;
        while i < count {
            let from = i.min(count - 4);
            let mut v = 0;
            while v < batch {
                if batch < 4 {
                    let found = tile::<L, H, LEVELS, MODE, 4, 1>(m, x, coding, rows.start + from, v);
                    for (r, found) in found.iter().enumerate() {
                        out[v * count + from + r] = found[0];
                    }
                    v += 1;
                    continue;
                }
                let (row, first) = (rows.start + from, v.min(batch - 4));
                // Sums of floats are kept for a whole block: those of four rows would not fit into the registers.
                let found = match MODE {
                    mode::FLOATS => {
                        let [a, b] = tile::<L, H, LEVELS, MODE, 2, 4>(m, x, coding, row, first);
                        let [c, d] = tile::<L, H, LEVELS, MODE, 2, 4>(m, x, coding, row + 2, first);
                        [a, b, c, d]
                    }
                    _ => tile::<L, H, LEVELS, MODE, 4, 4>(m, x, coding, row, first),
                };
                for (r, found) in found.iter().enumerate() {
                    found.iter().enumerate().for_each(|(c, value)| out[(first + c) * count + from + r] = *value);
                }
                v += 4;
            }
            i += 4;
        }
    }
}

/// `⟨row r, input v⟩` for `R` rows and `V` inputs from these on.
#[inline(always)]
unsafe fn tile<L: Lanes, const H: usize, const LEVELS: bool, const MODE: u8, const R: usize, const V: usize>(
    m: &Rows,
    x: &Inputs,
    coding: L::Coding,
    row: usize,
    v: usize,
) -> [[f32; V]; R] {
    // SAFETY: the caller's promise: rows, their scales and the inputs are as long as the blocks say.
    unsafe {
        let mut totals = [[L::zero(); V]; R];
        let scales = m.scales.as_ptr().add(row * m.groups);
        if MODE != mode::WHOLE && (!m.zeros.is_empty() || m.zero != 0.0) {
            let sums: [*const f32; V] = std::array::from_fn(|c| x.sums(v + c).as_ptr());
            let zeros = (!m.zeros.is_empty()).then(|| m.zeros.as_ptr().add(row * m.groups));
            let same = L::splat(m.zero);
            for group in (0..m.groups).step_by(L::LANES) {
                let count = (m.groups - group).min(L::LANES);
                let groups = opaque(m.groups);
                for (r, totals) in totals.iter_mut().enumerate() {
                    let from = scales.add(r * groups + group);
                    let scale = L::load_some(from, count);
                    // Those of the next rows.
                    L::prefetch(from.wrapping_add(R * groups).cast());
                    let zero = match zeros {
                        Some(zeros) => L::bytes_some(zeros.add(r * groups + group), count),
                        None => same,
                    };
                    let both = L::mul(scale, zero);
                    for (total, sums) in totals.iter_mut().zip(sums) {
                        *total = L::fnma(both, L::load(sums.add(group)), *total);
                    }
                }
            }
        }
        let mut windows = [L::zero(); R];
        // For one input a sum for each place that codes have in their bytes, for several one for each of them.
        let mut whole = [[L::zeros(); 4]; R];
        let mut packed = m.packed.as_ptr().add(row * m.row_bytes);
        // The next rows, which the machine does not guess in time; what is only prefetched need not be there.
        let mut ahead = packed.wrapping_add(R * m.row_bytes);
        let mut floats = x.first::<f32>(v);
        let mut bytes = x.first::<i8>(v);
        let mut places = m.blocks.places.as_ptr();
        for window in &m.blocks.windows {
            if MODE != mode::WHOLE {
                let groups = opaque(m.groups);
                for (r, some) in windows.iter_mut().enumerate() {
                    *some = L::load_some(scales.add(r * groups + window.first), window.count);
                }
            }
            let full = window.bytes == m.block_bytes;
            for _ in 0..window.blocks {
                let mut codes = [L::zeros(); R];
                let row_bytes = opaque(m.row_bytes);
                for (r, codes) in codes.iter_mut().enumerate() {
                    let from = packed.add(r * row_bytes);
                    *codes = match full {
                        true => L::block::<H, true>(from, window.bytes, coding),
                        false => L::block::<H, false>(from, window.bytes, coding),
                    };
                    L::prefetch(ahead.wrapping_add(r * row_bytes));
                }
                let lanes = places.cast::<u32>();
                if MODE == mode::FLOATS {
                    let parts = parts::<L, H, LEVELS, R, V>(&codes, floats, x.stride::<f32>(), coding);
                    for ((totals, parts), window) in totals.iter_mut().zip(&parts).zip(windows) {
                        let scale = L::pick(window, lanes);
                        for (total, part) in totals.iter_mut().zip(parts) {
                            *total = L::fma(*part, scale, *total);
                        }
                    }
                } else if MODE == mode::WHOLE && V == 1 {
                    for half in 0..H {
                        let x = L::load_bytes(bytes.add(half * 4 * L::LANES));
                        for r in 0..R {
                            let place = if L::IN_PLACE { half } else { 0 };
                            let codes = match L::IN_PLACE {
                                true => L::bytes_in_place::<H>(codes[r], half),
                                false => L::bytes::<H, LEVELS>(codes[r], half, coding, true),
                            };
                            whole[r][place] = L::dot(codes, x, whole[r][place], coding);
                        }
                    }
                } else if MODE == mode::WHOLE {
                    for half in 0..H {
                        let mut inputs = [L::zeros(); V];
                        for (c, input) in inputs.iter_mut().enumerate() {
                            *input = L::load_bytes(bytes.add(c * x.stride::<i8>() + half * 4 * L::LANES));
                        }
                        for (whole, codes) in whole.iter_mut().zip(&codes) {
                            let codes = L::bytes::<H, LEVELS>(*codes, half, coding, true);
                            for (whole, input) in whole.iter_mut().zip(inputs) {
                                *whole = L::dot(codes, input, *whole, coding);
                            }
                        }
                    }
                } else if V == 1 {
                    // All rows side by side: none waits for its own last product.
                    let mut sums = [L::zeros(); R];
                    for half in 0..H {
                        let x = L::load_bytes(bytes.add(half * 4 * L::LANES));
                        for r in 0..R {
                            sums[r] = L::dot(
                                L::bytes::<H, LEVELS>(codes[r], half, coding, MODE == mode::PLAIN),
                                x,
                                sums[r],
                                coding,
                            );
                        }
                    }
                    for ((totals, sum), window) in totals.iter_mut().zip(sums).zip(windows) {
                        totals[0] = L::fma(L::to_float(sum), L::pick(window, lanes), totals[0]);
                    }
                } else {
                    // Row after row: those of all rows would not fit into the registers.
                    for r in 0..R {
                        let mut halves = [codes[r]; 4];
                        for (half, codes) in halves[..H].iter_mut().enumerate() {
                            *codes = L::bytes::<H, LEVELS>(*codes, half, coding, MODE == mode::PLAIN);
                        }
                        let scale = L::pick(windows[r], lanes);
                        for (c, total) in totals[r].iter_mut().enumerate() {
                            let mut sum = L::zeros();
                            for (half, codes) in halves[..H].iter().enumerate() {
                                let x = L::load_bytes(bytes.add(c * x.stride::<i8>() + half * 4 * L::LANES));
                                sum = L::dot(*codes, x, sum, coding);
                            }
                            *total = L::fma(L::to_float(sum), scale, *total);
                        }
                    }
                }
                packed = packed.wrapping_add(m.block_bytes);
                floats = floats.wrapping_add(L::LANES * 4 * H);
                bytes = bytes.wrapping_add(L::LANES * 4 * H);
                ahead = ahead.wrapping_add(m.block_bytes);
                places = places.wrapping_add(1);
            }
        }
        if MODE == mode::WHOLE {
            // By themselves: with what is made of them, these loops would be left as they are, and the sums in memory.
            let mut sums = [[0i32; V]; R];
            for (sums, whole) in sums.iter_mut().zip(&whole) {
                for (sum, whole) in sums.iter_mut().zip(whole) {
                    *sum = L::sum_whole(*whole);
                }
                if V == 1 && L::IN_PLACE {
                    sums[0] = L::sum_whole(L::put_together::<H>(*whole));
                }
            }
            return summed(m, x, &sums, row, v);
        }
        let mut found = [[0f32; V]; R];
        for (found, totals) in found.iter_mut().zip(totals) {
            for ((found, total), scale) in found.iter_mut().zip(totals).zip(&x.scales[v..]) {
                *found = L::sum(total) * scale * m.factor;
            }
        }
        found
    }
}

/// The products from sums of whole numbers: the same, to the bit, on every machine.
#[inline(always)]
fn summed<const R: usize, const V: usize>(
    m: &Rows,
    x: &Inputs,
    sums: &[[i32; V]; R],
    row: usize,
    v: usize,
) -> [[f32; V]; R] {
    let mut found = [[0f32; V]; R];
    for (r, (found, sums)) in found.iter_mut().zip(sums).enumerate() {
        let (scale, zero) = (m.scales[row + r], m.zeros.get(row + r).map_or(m.zero, |&zero| f32::from(zero)));
        for (c, (found, &sum)) in found.iter_mut().zip(sums).enumerate() {
            *found = (sum as f32 - zero * x.sums(v + c)[0]) * scale * x.scales[v + c] * m.factor;
        }
    }
    found
}

/// The products of a block's codes with inputs, before scales.
#[inline(always)]
unsafe fn parts<L: Lanes, const H: usize, const LEVELS: bool, const R: usize, const V: usize>(
    codes: &[L::Int; R],
    x: *const f32,
    stride: usize,
    coding: L::Coding,
) -> [[L::Float; V]; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let (mut sums, mut codes) = ([[L::zero(); V]; R], *codes);
        for step in 0..4 * H {
            let mut inputs = [L::zero(); V];
            for (c, input) in inputs.iter_mut().enumerate() {
                *input = L::load(x.add(c * stride + step * L::LANES));
            }
            for (sums, codes) in sums.iter_mut().zip(&mut codes) {
                let values = L::values::<H, LEVELS>(*codes, coding);
                *codes = L::following::<H>(*codes);
                for (sum, x) in sums.iter_mut().zip(inputs) {
                    *sum = L::fma(values, x, *sum);
                }
            }
        }
        sums
    }
}

/// The numbers that rows stand for, each row in the order that inputs are laid out in as floats, `stride` apart.
///
/// # Safety
/// As [`products`].
#[inline(always)]
pub unsafe fn expand<L: Lanes>(m: &Rows, rows: Range<usize>, stride: usize, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match (m.halves, m.coding.levels.is_some()) {
            (4, _) => expanded::<L, 4, false>(m, rows, stride, out),
            (2, false) => expanded::<L, 2, false>(m, rows, stride, out),
            (2, true) => expanded::<L, 2, true>(m, rows, stride, out),
            (_, false) => expanded::<L, 1, false>(m, rows, stride, out),
            (_, true) => expanded::<L, 1, true>(m, rows, stride, out),
        }
    }
}

#[inline(always)]
unsafe fn expanded<L: Lanes, const H: usize, const LEVELS: bool>(
    m: &Rows,
    rows: Range<usize>,
    stride: usize,
    out: &mut [f32],
) {
    assert!(
        out.len() >= rows.len() * stride && stride >= m.blocks.places.len() * L::LANES * 4 * H,
        "room for the rows"
    );
    // SAFETY: the caller's promise, and there is room.
    unsafe {
        let coding = L::coding(&m.coding);
        for (i, row) in rows.enumerate() {
            let packed = m.packed.as_ptr().add(row * m.row_bytes);
            let mut places = m.blocks.places.iter().enumerate();
            for window in &m.blocks.windows {
                let first = row * m.groups + window.first;
                let scales = L::load_some(m.scales.as_ptr().add(first), window.count);
                let zeros = match m.zeros {
                    [] => L::splat(m.zero),
                    zeros => L::bytes_some(zeros.as_ptr().add(first), window.count),
                };
                for _ in 0..window.blocks {
                    let (number, places) = places.next().expect("a window's blocks are there");
                    let from = packed.add(number * m.block_bytes);
                    let mut codes = match window.bytes == m.block_bytes {
                        true => L::block::<H, true>(from, window.bytes, coding),
                        false => L::block::<H, false>(from, window.bytes, coding),
                    };
                    let scale = L::mul(L::pick(scales, places.0.as_ptr()), L::splat(m.factor));
                    let zero = L::pick(zeros, places.0.as_ptr());
                    let offset = L::fnma(scale, zero, L::zero());
                    let out = out.as_mut_ptr().add(i * stride + number * L::LANES * 4 * H);
                    for step in 0..4 * H {
                        let value = L::values::<H, LEVELS>(codes, coding);
                        codes = L::following::<H>(codes);
                        let value = L::fma(value, scale, offset);
                        L::store(out.add(step * L::LANES), value);
                    }
                }
            }
        }
    }
}
