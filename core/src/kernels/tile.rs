//! Products of some rows of codes with some inputs at a time: what each instruction set compiles for itself.

use std::ops::Range;

use super::inputs::{Inputs, Kind};
use super::layout::Window;
use super::many::{MANY, Many, Spread};
use super::packed::Rows;
use super::simd::{Kernel, Simd, Unaligned, each, opaque};

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

/// Blocks of a row whose products surely fit 32 bits in each lane. A block adds at most 4 · 255 · 128 to one, be it of codes of
/// eight bits or of codes left where they are in their bytes, or 4 · 3 · 15 · 128 for those of fewer bits; lanes are added up in
/// 64 bits.
const WHOLE_BLOCKS: usize = 1 << 13;

/// Where products go: the first one, and how far one input's are from the next one's.
type Target = (*mut f32, usize);

/// Computes `out[v · stride + i] = ⟨row i of the range, input v⟩`.
///
/// # Safety
/// The processor has the instructions of `S`, the rows are there, the inputs are laid out for `S` and the matrix, and are of
/// this kind. There is room for what is written, and nobody else uses it.
pub unsafe fn products<S: Simd>(m: &Rows, x: &Inputs, kind: Kind, rows: Range<usize>, out: Target) {
    // SAFETY: the caller's promise.
    unsafe {
        match (m.halves, m.coding.levels.is_some()) {
            (4, _) => of_kind::<S, 4, false>(m, x, kind, rows, out),
            (2, false) => of_kind::<S, 2, false>(m, x, kind, rows, out),
            (2, true) => of_kind::<S, 2, true>(m, x, kind, rows, out),
            (_, false) => of_kind::<S, 1, false>(m, x, kind, rows, out),
            (_, true) => of_kind::<S, 1, true>(m, x, kind, rows, out),
        }
    }
}

unsafe fn of_kind<S: Simd, const H: usize, const LEVELS: bool>(
    m: &Rows,
    x: &Inputs,
    kind: Kind,
    rows: Range<usize>,
    (out, stride): Target,
) {
    let plain = !LEVELS && m.coding.flip == 0;
    // Where a block's codes are spread, flipping them is part of it.
    let whole =
        !LEVELS && (plain || H == 1) && m.groups == 1 && m.minimums.is_empty() && m.blocks.places.len() <= WHOLE_BLOCKS;
    let (first, count) = (rows.start, rows.len());
    if kind == Kind::Bytes && !whole && S::REGISTERS >= 32 && count >= Spread::rows::<S>() && x.rows() >= MANY {
        let spread = &mut Spread::new::<S>(m);
        // SAFETY: the caller's promise.
        return unsafe {
            match plain {
                true => S::compiled(Many::<H, false, true> { m, x, first, count, out, stride, spread }),
                false => S::compiled(Many::<H, LEVELS, false> { m, x, first, count, out, stride, spread }),
            }
        };
    }
    // SAFETY: the caller's promise.
    unsafe {
        match kind {
            Kind::Floats => S::compiled(Tiles::<H, LEVELS, { mode::FLOATS }> { m, x, first, count, out, stride }),
            Kind::Bytes if whole => S::compiled(Tiles::<H, false, { mode::WHOLE }> { m, x, first, count, out, stride }),
            Kind::Bytes if plain => S::compiled(Tiles::<H, false, { mode::PLAIN }> { m, x, first, count, out, stride }),
            Kind::Bytes => S::compiled(Tiles::<H, LEVELS, { mode::BYTES }> { m, x, first, count, out, stride }),
        }
    }
}

/// The products of `count` rows from the `first` one on with all inputs, tile by tile.
struct Tiles<'a, const H: usize, const LEVELS: bool, const MODE: u8> {
    m: &'a Rows<'a>,
    x: &'a Inputs,
    first: usize,
    count: usize,
    out: *mut f32,
    /// From one input's products to the next one's.
    stride: usize,
}

impl<S: Simd, const H: usize, const LEVELS: bool, const MODE: u8> Kernel<S> for Tiles<'_, H, LEVELS, MODE> {
    #[inline(always)]
    unsafe fn run(self) {
        let (count, batch) = (self.count, self.x.rows());
        // SAFETY: the caller's promise.
        unsafe {
            let coding = S::coding(&self.m.coding);
            let mut i = 0;
            // Where lanes are no registers, as many products at a time as a tile has would be in memory.
            if count < 4 || S::REGISTERS == 0 {
                while i < count {
                    let mut v = 0;
                    while v < batch {
                        self.tile::<S, 1, 1>(coding, i, v);
                        v += 1;
                    }
                    i += 1;
                }
                return;
            }
            while i < count {
                // The last tiles cover rows and inputs again rather than fewer of them.
                let row = if i < count - 4 { i } else { count - 4 };
                let mut v = 0;
                if batch < 4 {
                    while v < batch {
                        // Sums, scales and codes of four rows take sixteen registers.
                        if S::REGISTERS < 32 {
                            self.tile::<S, 2, 1>(coding, row, v);
                            self.tile::<S, 2, 1>(coding, row + 2, v);
                        } else {
                            self.tile::<S, 4, 1>(coding, row, v);
                        }
                        v += 1;
                    }
                }
                while v < batch {
                    let input = if v < batch - 4 { v } else { batch - 4 };
                    // Sums of floats are kept for a whole block: those of four rows would not fit into the registers.
                    if MODE == mode::FLOATS || S::REGISTERS < 32 {
                        let mut pair = 0;
                        while pair < 4 {
                            self.tile::<S, 2, 4>(coding, row + pair, input);
                            pair += 2;
                        }
                    } else {
                        self.tile::<S, 4, 4>(coding, row, input);
                    }
                    v += 4;
                }
                i += 4;
            }
        }
    }
}

impl<const H: usize, const LEVELS: bool, const MODE: u8> Tiles<'_, H, LEVELS, MODE> {
    /// `⟨row r, input v⟩` for `R` rows and `V` inputs from these on.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const V: usize>(&self, coding: S::Coding, i: usize, v: usize) {
        let (m, x, row) = (self.m, self.x, self.first + i);
        // SAFETY: the caller's promise: rows, their scales and the inputs are as long as the blocks say.
        unsafe {
            let packed = m.packed.as_ptr().wrapping_add(row * m.row_bytes);
            let mut tile = Tile::<S, R, V> {
                totals: [[S::zero(); V]; R],
                whole: [[S::zeros(); 4]; R],
                scales: [S::zero(); R],
                packed,
                // Rows to come, which the processor does not guess in time; what is only prefetched need not be there.
                ahead: packed.wrapping_add(m.ahead * m.row_bytes),
                row_bytes: m.row_bytes,
                block_bytes: m.block_bytes,
                floats: x.first::<f32>(v),
                float_stride: x.stride::<f32>(),
                bytes: x.first::<i8>(v),
                byte_stride: x.stride::<i8>(),
                places: m.blocks.places.as_ptr().cast(),
            };
            if MODE != mode::WHOLE && V == 1 {
                let first = (row + m.ahead) * m.groups;
                m.scales.prefetch::<S>(first, R * m.groups);
                m.minimums.prefetch::<S>(first, if m.minimums.is_empty() { 0 } else { R * m.groups });
            }
            if MODE != mode::WHOLE && (!m.zeros.is_empty() || m.zero != 0.0) {
                tile.subtract_zeros(m, x, row, v);
            }
            if MODE != mode::WHOLE && !m.minimums.is_empty() {
                tile.add_minimums(m, x, row, v);
            }
            let scales = row * m.groups;
            let (windows, mut number) = (m.blocks.windows.as_ptr(), 0);
            while number < m.blocks.windows.len() {
                let window: &Window = &*windows.wrapping_add(number);
                if MODE != mode::WHOLE {
                    let groups = opaque(m.groups);
                    each!(r in R, {
                        let from = scales.wrapping_add(r.wrapping_mul(groups).wrapping_add(window.first));
                        tile.scales[r] = m.scales.load::<S>(from, window.count);
                    });
                }
                let (full, mut block) = (window.bytes == m.block_bytes, 0);
                while block < window.blocks {
                    tile.add_block::<H, LEVELS, MODE>(full, window.bytes, coding);
                    block += 1;
                }
                number += 1;
            }
            let (out, stride) = (self.out.wrapping_add(v * self.stride + i), self.stride);
            if MODE == mode::WHOLE {
                tile.store_whole::<H>(m, x, row, v, out, stride);
            } else {
                tile.store_scaled(m, x, v, out, stride);
            }
        }
    }
}

/// `R` rows and `V` inputs on their way through the blocks: sums so far, and where each is.
struct Tile<S: Simd, const R: usize, const V: usize> {
    /// Sums of products times scales.
    totals: [[S::Float; V]; R],
    /// Sums of products of whole numbers. For one input a sum for each place that codes have in their bytes, for several
    /// one for each of them.
    whole: [[S::Int; 4]; R],
    /// The window's scales of each row.
    scales: [S::Float; R],
    packed: *const u8,
    ahead: *const u8,
    row_bytes: usize,
    block_bytes: usize,
    floats: *const f32,
    float_stride: usize,
    bytes: *const i8,
    byte_stride: usize,
    /// Where the block's scales are in their window.
    places: *const u32,
}

impl<S: Simd, const R: usize, const V: usize> Tile<S, R, V> {
    /// Takes `Σ scale · zero · Σ inputs` of all groups from the sums.
    #[inline(always)]
    unsafe fn subtract_zeros(&mut self, m: &Rows, x: &Inputs, row: usize, v: usize) {
        // SAFETY: the caller's promise; sums of inputs are filled up to whole registers.
        unsafe {
            let scales = row * m.groups;
            let (sums, stride) = (x.first_sum(v), x.sum_stride());
            let (same, own) = (S::splat(m.zero), !m.zeros.is_empty());
            let zeros = m.zeros.as_ptr().wrapping_add(row * m.groups);
            let mut group = 0;
            while group < m.groups {
                let left = m.groups - group;
                let count = if left < S::LANES { left } else { S::LANES };
                let groups = opaque(m.groups);
                each!(r in R, {
                    let from = scales.wrapping_add(r.wrapping_mul(groups).wrapping_add(group));
                    let scale = m.scales.load::<S>(from, count);
                    let zero = if own { S::bytes_some(zeros.wrapping_add(r.wrapping_mul(groups).wrapping_add(group)), count) } else { same };
                    let both = S::mul(scale, zero);
                    each!(c in V, {
                        self.totals[r][c] = S::fnma(both, S::load(sums.wrapping_add(c.wrapping_mul(stride).wrapping_add(group))), self.totals[r][c]);
                    });
                });
                group += S::LANES;
            }
        }
    }

    /// Adds `Σ minimum · Σ inputs` of all groups to the sums.
    #[inline(always)]
    unsafe fn add_minimums(&mut self, m: &Rows, x: &Inputs, row: usize, v: usize) {
        // SAFETY: the caller's promise; sums of inputs are filled up to whole registers.
        unsafe {
            let minimums = row * m.groups;
            let (sums, stride) = (x.first_sum(v), x.sum_stride());
            let mut group = 0;
            while group < m.groups {
                let left = m.groups - group;
                let count = if left < S::LANES { left } else { S::LANES };
                let groups = opaque(m.groups);
                each!(r in R, {
                    let from = minimums.wrapping_add(r.wrapping_mul(groups).wrapping_add(group));
                    let minimum = m.minimums.load::<S>(from, count);
                    each!(c in V, {
                        self.totals[r][c] = S::fma(minimum, S::load(sums.wrapping_add(c.wrapping_mul(stride).wrapping_add(group))), self.totals[r][c]);
                    });
                });
                group += S::LANES;
            }
        }
    }

    /// Adds the products with a block's codes, and goes on to the next block.
    #[inline(always)]
    unsafe fn add_block<const H: usize, const LEVELS: bool, const MODE: u8>(
        &mut self,
        full: bool,
        bytes: usize,
        coding: S::Coding,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut codes = [S::zeros(); R];
            let row_bytes = opaque(self.row_bytes);
            each!(r in R, {
                let from = self.packed.wrapping_add(r.wrapping_mul(row_bytes));
                codes[r] = if full {
                    S::block::<H, true>(from, bytes, coding)
                } else {
                    S::block::<H, false>(from, bytes, coding)
                };
                S::prefetch(self.ahead.wrapping_add(r.wrapping_mul(row_bytes)));
            });
            match MODE {
                mode::FLOATS => self.add_floats::<H, LEVELS>(codes, coding),
                mode::WHOLE if V == 1 => self.add_whole_in_place::<H>(codes, coding),
                mode::WHOLE => self.add_whole::<H>(codes, coding),
                mode::PLAIN if V == 1 => self.add_bytes_of_one::<H, LEVELS, true>(codes, coding),
                mode::PLAIN => self.add_bytes::<H, LEVELS, true>(codes, coding),
                _ if V == 1 => self.add_bytes_of_one::<H, LEVELS, false>(codes, coding),
                _ => self.add_bytes::<H, LEVELS, false>(codes, coding),
            }
            self.packed = self.packed.wrapping_add(self.block_bytes);
            self.ahead = self.ahead.wrapping_add(self.block_bytes);
            self.floats = self.floats.wrapping_add(S::LANES * 4 * H);
            self.bytes = self.bytes.wrapping_add(S::LANES * 4 * H);
            self.places = self.places.wrapping_add(16);
        }
    }

    /// Floats: products of a block are added up before they are multiplied with scales.
    #[inline(always)]
    unsafe fn add_floats<const H: usize, const LEVELS: bool>(&mut self, mut codes: [S::Int; R], coding: S::Coding) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut parts = [[S::zero(); V]; R];
            let mut x = [&*self.floats.cast::<[[Unaligned<S::Float>; 4]; H]>(); V];
            each!(c in V, {
                x[c] = &*self.floats.wrapping_add(c.wrapping_mul(self.float_stride)).cast();
            });
            each!(four in H, {
                each!(step in 4, {
                    let mut inputs = [S::zero(); V];
                    each!(c in V, {
                        inputs[c] = x[c][four][step].get();
                    });
                    each!(r in R, {
                        if four + step > 0 {
                            codes[r] = S::following::<H>(codes[r]);
                        }
                        let values = S::values::<H, LEVELS>(codes[r], coding);
                        each!(c in V, {
                            parts[r][c] = S::fma(values, inputs[c], parts[r][c]);
                        });
                    });
                });
            });
            each!(r in R, {
                let scale = S::pick(self.scales[r], self.places);
                each!(c in V, {
                    self.totals[r][c] = S::fma(parts[r][c], scale, self.totals[r][c]);
                });
            });
        }
    }

    /// Whole numbers of one input, with a sum for each place of codes in their bytes where the instruction set can.
    #[inline(always)]
    unsafe fn add_whole_in_place<const H: usize>(&mut self, codes: [S::Int; R], coding: S::Coding) {
        // SAFETY: the caller's promise.
        unsafe {
            each!(half in H, {
                let x = S::load_bytes(self.bytes.wrapping_add(half * 4 * S::LANES));
                let place = if S::IN_PLACE { half } else { 0 };
                each!(r in R, {
                    let codes = if S::IN_PLACE {
                        S::bytes_in_place::<H>(codes[r], half)
                    } else {
                        S::bytes::<H, false, true>(codes[r], half, coding)
                    };
                    self.whole[r][place] = S::dot(codes, x, self.whole[r][place], coding);
                });
            });
        }
    }

    /// Whole numbers of several inputs.
    #[inline(always)]
    unsafe fn add_whole<const H: usize>(&mut self, codes: [S::Int; R], coding: S::Coding) {
        // SAFETY: the caller's promise.
        unsafe {
            each!(half in H, {
                let mut inputs = [S::zeros(); V];
                each!(c in V, {
                    inputs[c] = S::load_bytes(self.bytes.wrapping_add(c.wrapping_mul(self.byte_stride).wrapping_add(half * 4 * S::LANES)));
                });
                each!(r in R, {
                    let codes = S::bytes::<H, false, true>(codes[r], half, coding);
                    each!(c in V, {
                        self.whole[r][c] = S::dot(codes, inputs[c], self.whole[r][c], coding);
                    });
                });
            });
        }
    }

    /// Whole numbers of one input under several scales. All rows side by side: none waits for its own last product.
    #[inline(always)]
    unsafe fn add_bytes_of_one<const H: usize, const LEVELS: bool, const PLAIN: bool>(
        &mut self,
        codes: [S::Int; R],
        coding: S::Coding,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [S::zeros(); R];
            each!(r in R, {
                let mut halves = [codes[r]; 4];
                each!(half in H, {
                    halves[half] = S::bytes::<H, LEVELS, PLAIN>(codes[r], half, coding);
                });
                sums[r] = S::dot_halves::<H, LEVELS>(halves, self.bytes, coding);
            });
            each!(r in R, {
                let scale = S::pick(self.scales[r], self.places);
                self.totals[r][0] = S::fma(S::to_float(sums[r]), scale, self.totals[r][0]);
            });
        }
    }

    /// Whole numbers of several inputs under several scales. Row after row: those of all rows would not fit into the
    /// registers.
    #[inline(always)]
    unsafe fn add_bytes<const H: usize, const LEVELS: bool, const PLAIN: bool>(
        &mut self,
        codes: [S::Int; R],
        coding: S::Coding,
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            each!(r in R, {
                let mut halves = [codes[r]; 4];
                each!(half in H, {
                    halves[half] = S::bytes::<H, LEVELS, PLAIN>(codes[r], half, coding);
                });
                let scale = S::pick(self.scales[r], self.places);
                each!(c in V, {
                    let x = self.bytes.wrapping_add(c.wrapping_mul(self.byte_stride));
                    let sum = S::dot_halves::<H, LEVELS>(halves, x, coding);
                    self.totals[r][c] = S::fma(S::to_float(sum), scale, self.totals[r][c]);
                });
            });
        }
    }

    /// Writes what the sums of floats come to.
    #[inline(always)]
    unsafe fn store_scaled(&self, m: &Rows, x: &Inputs, v: usize, out: *mut f32, stride: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let scales = x.scales().as_ptr().wrapping_add(v);
            each!(c in V, {
                let scale = *scales.wrapping_add(c);
                let mut totals = [S::zero(); 4];
                each!(r in R, {
                    totals[r] = self.totals[r][c];
                });
                let sums = if R == 4 { S::sums(totals) } else { [S::sum(totals[0]), S::sum(totals[1]), 0.0, 0.0] };
                each!(r in R, {
                    *out.wrapping_add(c.wrapping_mul(stride).wrapping_add(r)) = sums[r] * scale * m.factor;
                });
            });
        }
    }

    /// Writes what the sums of whole numbers come to: the same, to the bit, whatever the instruction set.
    #[inline(always)]
    unsafe fn store_whole<const H: usize>(
        &self,
        m: &Rows,
        x: &Inputs,
        row: usize,
        v: usize,
        out: *mut f32,
        stride: usize,
    ) {
        // SAFETY: the caller's promise; there is one group.
        unsafe {
            let (scales, totals) = (x.scales().as_ptr().wrapping_add(v), x.totals().as_ptr().wrapping_add(v));
            each!(r in R, {
                let scale = m.scales.at(row + r);
                let zero =
                    if m.zeros.is_empty() { m.zero as i64 } else { i64::from(*m.zeros.as_ptr().wrapping_add(row + r)) };
                each!(c in V, {
                    let sum = if V == 1 && S::IN_PLACE {
                        S::sum_whole(S::put_together::<H>(self.whole[r]))
                    } else {
                        S::sum_whole(self.whole[r][c])
                    };
                    let whole = (sum - zero * *totals.wrapping_add(c)) as f32;
                    *out.wrapping_add(c.wrapping_mul(stride).wrapping_add(r)) = whole * scale * *scales.wrapping_add(c) * m.factor;
                });
            });
        }
    }
}
