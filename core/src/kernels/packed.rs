//! Packed weights as the kernels see them: plain slices, whose lengths are checked once.

use half::{bf16, f16};

use super::inputs::Kind;
use super::layout::{Blocks, Layout, Plan};
use super::rows::Element;
use super::simd::{Coding, Simd};
use crate::error::{Error, Result};

/// What codes stand for, scales aside.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CodeFormat {
    /// Bits of a code, 2 to 8, packed side by side from the lowest bit of a row's first byte on.
    pub bits: u32,
    /// Whether codes are two's complement.
    pub signed: bool,
    /// The numbers, −1 … 1, that the codes of four bits stand for; `None` where it is the code itself.
    pub levels: Option<&'static [f32; 16]>,
    /// The number that levels are multiplied with beside scales.
    pub unit: f32,
    /// The number that is subtracted from unsigned codes without zero points of their own.
    pub zero: u8,
}

/// Numbers of groups, `[rows, groups]`.
#[derive(Debug, Clone, Copy)]
pub enum GroupNumbers<'a> {
    /// Floats.
    F32(&'a [f32]),
    /// Half floats.
    F16(&'a [f16]),
}

impl GroupNumbers<'_> {
    /// Returns how many there are.
    pub fn len(&self) -> usize {
        match self {
            GroupNumbers::F32(all) => all.len(),
            GroupNumbers::F16(all) => all.len(),
        }
    }

    /// Returns whether there are none.
    #[inline(always)]
    pub fn is_empty(&self) -> bool {
        match self {
            GroupNumbers::F32(all) => all.is_empty(),
            GroupNumbers::F16(all) => all.is_empty(),
        }
    }

    /// Loads `count` of them as floats; behind them are zeros or the next ones, whatever is faster to load.
    ///
    /// # Safety
    /// They are there, and the processor has the instructions of `S`.
    #[inline(always)]
    pub(super) unsafe fn load<S: Simd>(&self, first: usize, count: usize) -> S::Float {
        // SAFETY: the caller's promise; whole registers are loaded where there are as many.
        unsafe {
            match self {
                GroupNumbers::F32(all) => {
                    let from = all.as_ptr().wrapping_add(first);
                    if first + S::LANES <= all.len() { S::load(from) } else { S::load_some(from, count) }
                }
                GroupNumbers::F16(all) => {
                    let from = all.as_ptr().wrapping_add(first);
                    if first + S::LANES <= all.len() { S::halves(from) } else { S::halves_some(from, count) }
                }
            }
        }
    }

    /// Asks for the cache lines of `count` of them, which need not be there.
    #[inline(always)]
    pub(super) unsafe fn prefetch<S: Simd>(&self, first: usize, count: usize) {
        let (from, bytes): (*const u8, usize) = match self {
            GroupNumbers::F32(all) => (all.as_ptr().wrapping_add(first).cast(), 4 * count),
            GroupNumbers::F16(all) => (all.as_ptr().wrapping_add(first).cast(), 2 * count),
        };
        let mut place = 0;
        while place < bytes {
            // SAFETY: the caller has the instructions of `S`.
            unsafe { S::prefetch(from.wrapping_add(place)) };
            place += 64;
        }
    }

    /// Returns one of them.
    ///
    /// # Safety
    /// It is there.
    #[inline(always)]
    pub(super) unsafe fn at(&self, place: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                GroupNumbers::F32(all) => *all.as_ptr().wrapping_add(place),
                GroupNumbers::F16(all) => (*all.as_ptr().wrapping_add(place)).value(),
            }
        }
    }
}

/// What the groups of packed codes have beside scales.
#[derive(Debug, Clone, Copy)]
pub enum Offsets<'a> {
    /// Nothing: [`CodeFormat::zero`] is the zero point of all.
    Same,
    /// Zero points `[rows, groups]`.
    Zeros(&'a [u8]),
    /// Numbers that are added to codes times scales, `[rows, groups]`.
    Minimums(GroupNumbers<'a>),
}

/// A matrix `[rows, columns]` of packed codes: `(code − zero) · scale`, `code · scale + minimum`, or `level · scale`, with a scale
/// (and a zero point or minimum) for each group of columns.
#[derive(Debug, Clone, Copy)]
pub struct PackedRows<'a> {
    format: CodeFormat,
    rows: usize,
    columns: usize,
    /// Groups of a row, at least one where there are columns.
    groups: usize,
    /// Row after row, each padded to whole bytes.
    codes: &'a [u8],
    /// `[rows, groups]`
    scales: GroupNumbers<'a>,
    /// `[rows, groups]`, or none.
    zeros: &'a [u8],
    /// `[rows, groups]`, or none.
    minimums: GroupNumbers<'a>,
}

/// Bytes of codes from those that are read to those that are asked for: what comes from memory meanwhile.
const AHEAD: usize = 6144;

impl<'a> PackedRows<'a> {
    /// Describes codes with their scales `[rows, groups]`, and what groups have beside. The groups are as many as there are scales
    /// for a row, and equally wide.
    ///
    /// # Errors
    /// When a length does not follow from the shape, or the format is none that kernels know.
    pub fn new(
        format: CodeFormat,
        (rows, columns): (usize, usize),
        codes: &'a [u8],
        scales: GroupNumbers<'a>,
        offsets: Offsets<'a>,
    ) -> Result<Self> {
        let none = GroupNumbers::F32(&[]);
        let (zeros, minimums): (&[u8], GroupNumbers) = match offsets {
            Offsets::Same => (&[], none),
            Offsets::Zeros(zeros) => (zeros, none),
            Offsets::Minimums(minimums) => (&[], minimums),
        };
        if !(2..=8).contains(&format.bits) || (format.levels.is_some() && format.bits != 4) {
            return Err(Error::expected("bits of a packed code", format.bits, "2 to 8, and 4 for levels"));
        }
        let is_plain = !format.signed && format.levels.is_none();
        if !is_plain && (format.zero != 0 || !zeros.is_empty() || !minimums.is_empty()) {
            return Err(Error::expected("packed codes", "signed ones or levels with zero points", "unsigned ones"));
        }
        let row_bytes = columns.checked_mul(format.bits as usize).map(|bits| bits.div_ceil(8));
        let bytes = row_bytes.and_then(|bytes| bytes.checked_mul(rows));
        if bytes != Some(codes.len()) {
            let expected = bytes.map_or("fewer columns".into(), |bytes| bytes.to_string());
            return Err(Error::expected(format!("bytes of {rows} × {columns} packed codes"), codes.len(), expected));
        }
        let groups = scales.len().checked_div(rows).unwrap_or(0);
        let fits = match rows * columns {
            0 => scales.is_empty(),
            _ => groups > 0 && groups * rows == scales.len() && columns.is_multiple_of(groups),
        };
        let as_many = |others: usize| others == 0 || others == scales.len();
        if !fits || !as_many(zeros.len()) || !as_many(minimums.len()) {
            return Err(Error::expected(
                format!("scales and zero points of {rows} × {columns} packed codes"),
                format!("{} and {}", scales.len(), zeros.len() + minimums.len()),
                "equally many for each row, which divide the columns, and as many zero points or none",
            ));
        }
        Ok(PackedRows { format, rows, columns, groups, codes, scales, zeros, minimums })
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns how the rows lie in registers of so many lanes; `None` where there are no columns, or where groups are so narrow
    /// that a lane would have codes of several.
    pub(super) fn plan(&self, lanes: usize) -> Option<Plan> {
        let group = self.columns / self.groups.max(1);
        let layout = Layout::new(self.columns, group, self.format.bits, lanes).filter(|_| self.columns > 0)?;
        let blocks = layout.blocks(self.row_bytes(), self.block_bytes(&layout));
        Some(Plan { layout, blocks })
    }

    fn row_bytes(&self) -> usize {
        (self.columns * self.format.bits as usize).div_ceil(8)
    }

    fn block_bytes(&self, layout: &Layout) -> usize {
        layout.block_codes() * self.format.bits as usize / 8
    }

    /// Returns the rows as the loops read them, for inputs of a kind.
    pub(super) fn for_kind(&self, plan: &'a Plan, kind: Kind) -> Rows<'a> {
        let half = 1u8 << (self.format.bits - 1);
        let flip = if self.format.signed { half } else { 0 };
        let (zero, factor) = match (self.format.levels, kind) {
            (Some(_), Kind::Floats) => (0.0, self.format.unit),
            (Some(_), Kind::Bytes) => (128.0, self.format.unit / 127.0),
            (None, _) if self.format.signed => (f32::from(half), 1.0),
            (None, _) if !self.zeros.is_empty() || !self.minimums.is_empty() => (0.0, 1.0),
            (None, _) => (f32::from(self.format.zero), 1.0),
        };
        Rows {
            packed: self.codes,
            row_bytes: self.row_bytes(),
            ahead: AHEAD.div_ceil(self.row_bytes().max(1)),
            block_bytes: self.block_bytes(&plan.layout),
            halves: plan.layout.halves,
            coding: Coding { bits: self.format.bits, flip, levels: self.format.levels },
            scales: self.scales,
            factor,
            zeros: self.zeros,
            zero,
            minimums: self.minimums,
            groups: self.groups,
            blocks: &plan.blocks,
        }
    }
}

/// Packed rows as the loops read them.
pub struct Rows<'a> {
    /// Row after row.
    pub packed: &'a [u8],
    /// Bytes of a row.
    pub row_bytes: usize,
    /// How many rows before they are read rows are asked for.
    pub ahead: usize,
    /// Bytes of a block of a row's codes.
    pub block_bytes: usize,
    /// See [`Layout::halves`].
    pub halves: usize,
    /// How codes become numbers.
    pub coding: Coding,
    /// `[rows, groups]`
    pub scales: GroupNumbers<'a>,
    /// The number that scales are multiplied with beside.
    pub factor: f32,
    /// `[rows, groups]`, or none where `zero` is every group's.
    pub zeros: &'a [u8],
    /// The zero point of all groups where they have none of their own.
    pub zero: f32,
    /// What is added to scaled codes, `[rows, groups]`, or none.
    pub minimums: GroupNumbers<'a>,
    /// Groups of a row.
    pub groups: usize,
    /// The blocks of a row.
    pub blocks: &'a Blocks,
}

/// The numbers of a matrix `[rows, columns]`, as far as kernels know them.
#[derive(Debug, Clone, Copy)]
pub enum Weights<'a> {
    /// Codes of a few bits.
    Packed(PackedRows<'a>),
    /// f16 numbers, row after row.
    F16(&'a [f16]),
    /// bf16 numbers, row after row.
    Bf16(&'a [bf16]),
    /// Numbers that lie in no way that kernels read: rows are dequantised by whoever has them.
    Other,
}

impl Weights<'_> {
    /// Whether these are the numbers of so many rows and columns.
    pub(super) fn fit(&self, rows: usize, columns: usize) -> bool {
        match self {
            Weights::Packed(packed) => (packed.rows, packed.columns) == (rows, columns),
            Weights::F16(numbers) => Some(numbers.len()) == rows.checked_mul(columns),
            Weights::Bf16(numbers) => Some(numbers.len()) == rows.checked_mul(columns),
            Weights::Other => true,
        }
    }
}
