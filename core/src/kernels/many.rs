//! Products of rows of codes with many inputs of bytes: a row for each lane, whose codes are brought there once for all inputs.

use super::inputs::Inputs;
use super::packed::Rows;
use super::simd::{Kernel, Simd, each, read, write};

/// Inputs from which on this is less work than looking at the codes again for each four of them.
pub const MANY: usize = 24;

/// Registers of rows at a time.
const ROWS: usize = 2;

/// Inputs at a time, as so many times so many.
const INPUTS: (usize, usize) = (2, 3);

/// A cache line, so that no register's load crosses one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Lanes of a block that follow each other and have the same scale.
struct Segment {
    /// Bytes from an input's first to those of the first lane.
    first: usize,
    lanes: usize,
    group: usize,
}

/// Memory for rows as products take them.
pub struct Spread {
    /// The codes of a lane's each part, then the scales of each group, then what each group adds for each unit that its inputs add up to;
    /// of all rows each.
    lines: Vec<Line>,
    segments: Vec<Segment>,
    /// Codes of all parts of all lanes of a row, a block's last ones too where they are not there.
    quads: usize,
    /// Registers on their way.
    tile: [[Line; 16]; 4],
}

impl Spread {
    /// Makes room for rows of this matrix, whose last lane that has codes is that of the last column.
    pub fn new<S: Simd>(m: &Rows) -> Self {
        let places = m.blocks.places.as_ptr().cast::<[u32; 16]>();
        let (mut segments, mut block) = (Vec::<Segment>::new(), 0);
        for window in &m.blocks.windows {
            for _ in 0..window.blocks {
                // SAFETY: there is one for each block.
                let places = unsafe { &*places.wrapping_add(block) };
                let lanes = (window.bytes * S::LANES).div_ceil(m.block_bytes);
                let of_block = segments.len();
                for (lane, place) in places.iter().enumerate().take(lanes.min(S::LANES)) {
                    let group = window.first + *place as usize;
                    match segments[of_block..].last_mut() {
                        Some(last) if last.group == group => last.lanes += 1,
                        _ => {
                            segments.push(Segment { first: 4 * (block * m.halves * S::LANES + lane), lanes: 1, group })
                        }
                    }
                }
                block += 1;
            }
        }
        let quads = block * S::LANES * m.halves;
        // Whole registers of lanes and of groups are written, whether they are all there or not.
        let registers = quads + 2 * m.groups.next_multiple_of(S::LANES);
        Spread { lines: vec![Line([0; 64]); ROWS * registers], segments, quads, tile: [[Line([0; 64]); 16]; 4] }
    }

    /// Returns how many rows are spread at a time.
    pub const fn rows<S: Simd>() -> usize {
        ROWS * S::LANES
    }
}

/// The products of `count` rows, [`Spread::rows`] at least, from the `first` one on with all inputs, [`MANY`] at least.
pub struct Many<'a, const H: usize, const LEVELS: bool, const PLAIN: bool> {
    pub m: &'a Rows<'a>,
    pub x: &'a Inputs,
    pub first: usize,
    pub count: usize,
    pub out: *mut f32,
    /// From one input's products to the next one's.
    pub stride: usize,
    pub spread: &'a mut Spread,
}

impl<S: Simd, const H: usize, const LEVELS: bool, const PLAIN: bool> Kernel<S> for Many<'_, H, LEVELS, PLAIN> {
    #[inline(always)]
    unsafe fn run(mut self) {
        let (count, batch, rows) = (self.count, self.x.rows(), Spread::rows::<S>());
        // SAFETY: the caller's promise.
        unsafe {
            let coding = S::coding(&self.m.coding);
            let mut i = 0;
            while i < count {
                // The last tiles cover rows and inputs again rather than fewer of them.
                let row = if i < count - rows { i } else { count - rows };
                self.spread::<S>(coding, self.first + row);
                let (inputs, mut v) = (INPUTS.0 * INPUTS.1, 0);
                while v < batch {
                    self.tile::<S>(coding, row, if v < batch - inputs { v } else { batch - inputs });
                    v += inputs;
                }
                i += rows;
            }
        }
    }
}

impl<const H: usize, const LEVELS: bool, const PLAIN: bool> Many<'_, H, LEVELS, PLAIN> {
    /// Whether groups have more than scales.
    #[inline(always)]
    fn has_offsets(&self) -> bool {
        !self.m.zeros.is_empty() || self.m.zero != 0.0 || !self.m.minimums.is_empty()
    }

    /// Writes rows from this one on as products take them.
    #[inline(always)]
    unsafe fn spread<S: Simd>(&mut self, coding: S::Coding, first: usize) {
        let mut part = 0;
        while part < ROWS {
            // SAFETY: the caller's promise.
            unsafe {
                self.spread_codes::<S>(coding, first + part * S::LANES, part);
                self.spread_scales::<S>(first + part * S::LANES, part);
            }
            part += 1;
        }
    }

    #[inline(always)]
    unsafe fn spread_codes<S: Simd>(&mut self, coding: S::Coding, first: usize, part: usize) {
        let (m, register) = (self.m, 4 * S::LANES);
        let tile = self.spread.tile.as_mut_ptr().cast::<u8>();
        // SAFETY: the caller's promise: rows are as long as the blocks say, and there is room for them.
        unsafe {
            let mut to = self.spread.lines.as_mut_ptr().cast::<u8>().wrapping_add(part * register);
            let mut packed = m.packed.as_ptr().wrapping_add(first * m.row_bytes);
            let (windows, mut number) = (m.blocks.windows.as_ptr(), 0);
            while number < m.blocks.windows.len() {
                let window = &*windows.wrapping_add(number);
                let (full, mut block) = (window.bytes == m.block_bytes, 0);
                while block < window.blocks {
                    let mut r = 0;
                    while r < S::LANES {
                        let from = packed.wrapping_add(r * m.row_bytes);
                        let codes = if full {
                            S::block::<H, true>(from, window.bytes, coding)
                        } else {
                            S::block::<H, false>(from, window.bytes, coding)
                        };
                        each!(half in H, {
                            let place = tile.wrapping_add((half * S::LANES + r) * register);
                            write(place, S::bytes::<H, LEVELS, PLAIN>(codes, half, coding));
                        });
                        r += 1;
                    }
                    each!(half in H, {
                        let from = tile.wrapping_add(half * S::LANES * register);
                        S::write_columns(from, to.wrapping_add(half * ROWS * register), H * ROWS * register);
                    });
                    to = to.wrapping_add(S::LANES * H * ROWS * register);
                    packed = packed.wrapping_add(m.block_bytes);
                    block += 1;
                }
                number += 1;
            }
        }
    }

    /// Writes rows' scales, and what their groups add.
    #[inline(always)]
    unsafe fn spread_scales<S: Simd>(&mut self, first: usize, part: usize) {
        let (m, register) = (self.m, 4 * S::LANES);
        let tile = self.spread.tile.as_mut_ptr().cast::<u8>();
        // SAFETY: as for codes.
        unsafe {
            let lines = self.spread.lines.as_mut_ptr().cast::<u8>();
            let mut to = lines.wrapping_add((self.spread.quads * ROWS + part) * register);
            let offsets = m.groups.next_multiple_of(S::LANES) * ROWS * register;
            let (same, own, least) = (S::splat(m.zero), !m.zeros.is_empty(), !m.minimums.is_empty());
            let mut group = 0;
            while group < m.groups {
                let left = m.groups - group;
                let count = if left < S::LANES { left } else { S::LANES };
                let mut r = 0;
                while r < S::LANES {
                    let from = (first + r) * m.groups + group;
                    let zero = if own { S::bytes_some(m.zeros.as_ptr().wrapping_add(from), count) } else { same };
                    let minimum = if least { m.minimums.load::<S>(from, count) } else { S::zero() };
                    let scale = m.scales.load::<S>(from, count);
                    write(tile.wrapping_add(r * register), scale);
                    write(tile.wrapping_add((S::LANES + r) * register), S::fnma(scale, zero, minimum));
                    r += 1;
                }
                S::write_columns(tile, to, ROWS * register);
                let second = tile.wrapping_add(S::LANES * register);
                S::write_columns(second, to.wrapping_add(offsets), ROWS * register);
                to = to.wrapping_add(S::LANES * ROWS * register);
                group += S::LANES;
            }
        }
    }

    /// `⟨row, input⟩` for the rows that were spread and some inputs from this one on.
    #[inline(always)]
    unsafe fn tile<S: Simd>(&self, coding: S::Coding, i: usize, v: usize) {
        const A: usize = INPUTS.0;
        const B: usize = INPUTS.1;
        let (m, x, spread) = (self.m, self.x, &*self.spread);
        // SAFETY: the caller's promise: the inputs are as long as the blocks say.
        unsafe {
            let register = 4 * S::LANES;
            let mut totals = [[[S::zero(); B]; A]; ROWS];
            let mut quads = spread.lines.as_ptr().cast::<u8>();
            let scales = quads.wrapping_add(spread.quads * ROWS * register);
            if self.has_offsets() {
                let mut offsets = scales.wrapping_add(m.groups.next_multiple_of(S::LANES) * ROWS * register);
                let (sums, stride) = (x.first_sum(v), x.sum_stride());
                let mut group = 0;
                while group < m.groups {
                    each!(a in A, {
                        each!(b in B, {
                            let sum = S::splat(*sums.wrapping_add((a * B + b).wrapping_mul(stride).wrapping_add(group)));
                            each!(r in ROWS, {
                                let offset: S::Float = read(offsets.wrapping_add(r * register));
                                totals[r][a][b] = S::fma(offset, sum, totals[r][a][b]);
                            });
                        });
                    });
                    offsets = offsets.wrapping_add(ROWS * register);
                    group += 1;
                }
            }
            let (bytes, stride) = (x.first::<i8>(v), x.stride::<i8>());
            let (segments, mut number) = (spread.segments.as_ptr(), 0);
            while number < spread.segments.len() {
                let segment = &*segments.wrapping_add(number);
                let mut whole = [[[S::zeros(); B]; A]; ROWS];
                let (mut bytes, mut lane) = (bytes.wrapping_add(segment.first), 0);
                while lane < segment.lanes {
                    each!(half in H, {
                        let mut codes = [S::zeros(); ROWS];
                        each!(r in ROWS, {
                            codes[r] = read(quads.wrapping_add(r * register));
                        });
                        each!(a in A, {
                            each!(b in B, {
                                let place = (a * B + b).wrapping_mul(stride).wrapping_add(half * 4 * S::LANES);
                                let x = S::splat_bytes(bytes.wrapping_add(place));
                                each!(r in ROWS, {
                                    whole[r][a][b] = S::dot(codes[r], x, whole[r][a][b], coding);
                                });
                            });
                        });
                        quads = quads.wrapping_add(ROWS * register);
                    });
                    bytes = bytes.wrapping_add(4);
                    lane += 1;
                }
                each!(r in ROWS, {
                    let scale: S::Float = read(scales.wrapping_add((segment.group * ROWS + r) * register));
                    each!(a in A, {
                        each!(b in B, {
                            totals[r][a][b] = S::fma(S::to_float(whole[r][a][b]), scale, totals[r][a][b]);
                        });
                    });
                });
                number += 1;
            }
            let (out, stride) = (self.out.wrapping_add(v * self.stride + i), self.stride);
            let scales = x.scales().as_ptr().wrapping_add(v);
            each!(a in A, {
                each!(b in B, {
                    let scale = S::splat(*scales.wrapping_add(a * B + b) * m.factor);
                    each!(r in ROWS, {
                        let out = out.wrapping_add((a * B + b).wrapping_mul(stride).wrapping_add(r * S::LANES));
                        S::store(out, S::mul(totals[r][a][b], scale));
                    });
                });
            });
        }
    }
}
