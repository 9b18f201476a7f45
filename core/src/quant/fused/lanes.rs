//! What the kernels ask of an instruction set.

/// How codes become numbers.
#[derive(Debug, Clone, Copy)]
pub struct Coding {
    pub bits: u32,
    /// Flipped in every code: the sign bit of signed ones, which makes them unsigned.
    pub flip: u8,
    /// What the sixteen codes stand for, where that is not the code itself.
    pub levels: Option<&'static [f32; 16]>,
}

/// [`Coding::levels`], in −1 … 1, as bytes: 127 steps either way around 128.
pub fn level_byte(level: f32) -> u8 {
    (level * 127.0 + 128.0).round() as u8
}

/// The number itself, of which the compiler is told nothing: what it would work out from it before a loop, for each of
/// several rows, does not fit into the registers.
#[inline(always)]
pub fn opaque(number: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        let mut same = number;
        // SAFETY: there is no instruction.
        unsafe { std::arch::asm!("/* {0} */", inout(reg) same, options(nomem, nostack, preserves_flags)) };
        same
    }
    #[cfg(not(target_arch = "x86_64"))]
    number
}

/// Registers of one instruction set, and what is done with them.
///
/// Codes of a row are looked at in blocks. A lane of 32 bits holds codes that lie side by side in the row: `4 · H` of
/// them, as `H` registers of bytes. `H` is 2 for four bits and 4 for two, whose packed bytes are a block's lanes as they
/// are; it is 1 for any number of bits, whose codes are spread to a byte each.
///
/// # Safety
/// Of every function: the machine has the instructions, and what is pointed at is there.
pub trait Lanes: Copy {
    /// Lanes of a register.
    const LANES: usize;
    type Float: Copy;
    type Int: Copy;
    /// Registers that stay the same for a matrix.
    type Coding: Copy;

    unsafe fn coding(coding: &Coding) -> Self::Coding;

    unsafe fn zero() -> Self::Float;
    unsafe fn load(from: *const f32) -> Self::Float;
    unsafe fn store(to: *mut f32, value: Self::Float);
    /// The first `count`, at most [`Lanes::LANES`]; zeros behind them.
    unsafe fn load_some(from: *const f32, count: usize) -> Self::Float;
    /// The first `count` bytes as floats; zeros behind them.
    unsafe fn bytes_some(from: *const u8, count: usize) -> Self::Float;
    unsafe fn splat(value: f32) -> Self::Float;
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// `a · b + c`
    unsafe fn fma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// `c − a · b`
    unsafe fn fnma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    unsafe fn sum(value: Self::Float) -> f32;
    /// Lane i of the result is lane `places[i]` of `value`.
    unsafe fn pick(value: Self::Float, places: *const u32) -> Self::Float;

    /// A block of a row's codes: `bytes` of it are there, all of a block's where `FULL`. For `H` = 1 they are spread.
    unsafe fn block<const H: usize, const FULL: bool>(from: *const u8, bytes: usize, coding: Self::Coding)
    -> Self::Int;
    /// Unsigned codes of a block, a byte each: byte t of a lane is its code `t · H + half`. In `plain` ones nothing is to
    /// be flipped.
    unsafe fn bytes<const H: usize, const LEVELS: bool>(
        block: Self::Int,
        half: usize,
        coding: Self::Coding,
        plain: bool,
    ) -> Self::Int;
    /// Whether [`Lanes::dot`] takes bytes of any size without more work, so that codes may stay where they are in them.
    const IN_PLACE: bool;
    /// Plain codes where they are, all others in their bytes cleared: `16^half` (H = 2) or `4^half` (H = 4) times as large.
    unsafe fn bytes_in_place<const H: usize>(block: Self::Int, half: usize) -> Self::Int;
    /// The sum of the products of all codes, from one sum for each of their places.
    unsafe fn put_together<const H: usize>(sums: [Self::Int; 4]) -> Self::Int;
    /// What the first codes of all lanes stand for.
    unsafe fn values<const H: usize, const LEVELS: bool>(block: Self::Int, coding: Self::Coding) -> Self::Float;
    /// The lanes without their first codes.
    unsafe fn following<const H: usize>(block: Self::Int) -> Self::Int;

    /// Asks for a cache line.
    unsafe fn prefetch(from: *const u8);

    unsafe fn zeros() -> Self::Int;
    /// Four bytes a lane.
    unsafe fn load_bytes(from: *const i8) -> Self::Int;
    /// Adds the four products in each lane of unsigned bytes with signed ones to `sum`.
    unsafe fn dot(codes: Self::Int, x: Self::Int, sum: Self::Int, coding: Self::Coding) -> Self::Int;
    unsafe fn to_float(value: Self::Int) -> Self::Float;
    /// The sum of the lanes.
    unsafe fn sum_whole(value: Self::Int) -> i32;
}

/// Plain code, for every machine.
#[derive(Clone, Copy)]
pub struct Portable;

impl Lanes for Portable {
    const LANES: usize = 8;
    type Float = [f32; 8];
    type Int = [u32; 8];
    type Coding = Coding;

    #[inline(always)]
    unsafe fn coding(coding: &Coding) -> Coding {
        *coding
    }

    #[inline(always)]
    unsafe fn zero() -> [f32; 8] {
        [0.0; 8]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 8] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: [f32; 8]) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(value) }
    }

    #[inline(always)]
    unsafe fn load_some(from: *const f32, count: usize) -> [f32; 8] {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| if i < count { unsafe { *from.add(i) } } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn bytes_some(from: *const u8, count: usize) -> [f32; 8] {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| if i < count { f32::from(unsafe { *from.add(i) }) } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 8] {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn mul(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn fma(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn fnma(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|i| c[i] - a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn sum(value: [f32; 8]) -> f32 {
        value.iter().sum()
    }

    #[inline(always)]
    unsafe fn pick(value: [f32; 8], places: *const u32) -> [f32; 8] {
        // SAFETY: the caller's promise.
        std::array::from_fn(|i| value[unsafe { *places.add(i) } as usize & 7])
    }

    #[inline(always)]
    unsafe fn block<const H: usize, const FULL: bool>(from: *const u8, bytes: usize, coding: Coding) -> [u32; 8] {
        // SAFETY: the caller's promise.
        let byte = |i: usize| if i < bytes { u32::from(unsafe { *from.add(i) }) } else { 0 };
        if H > 1 {
            return std::array::from_fn(|lane| (0..4).map(|i| byte(4 * lane + i) << (8 * i)).sum());
        }
        let (bits, mask) = (coding.bits as usize, (1u32 << coding.bits) - 1);
        let code = |i: usize| {
            let (first, shift) = (i * bits / 8, i * bits % 8);
            (((byte(first) | (byte(first + 1) << 8)) >> shift) & mask) ^ u32::from(coding.flip)
        };
        std::array::from_fn(|lane| (0..4).map(|i| code(4 * lane + i) << (8 * i)).sum())
    }

    #[inline(always)]
    unsafe fn bytes<const H: usize, const LEVELS: bool>(
        block: [u32; 8],
        half: usize,
        coding: Coding,
        _: bool,
    ) -> [u32; 8] {
        let codes = match H {
            2 => block.map(|v| ((v >> (4 * half)) & 0x0f0f_0f0f) ^ (u32::from(coding.flip) * 0x0101_0101)),
            4 => block.map(|v| ((v >> (2 * half)) & 0x0303_0303) ^ (u32::from(coding.flip) * 0x0101_0101)),
            _ => block,
        };
        match coding.levels {
            Some(levels) if LEVELS => codes
                .map(|v| u32::from_le_bytes(v.to_le_bytes().map(|code| level_byte(levels[usize::from(code & 15)])))),
            _ => codes,
        }
    }

    const IN_PLACE: bool = false;

    #[inline(always)]
    unsafe fn bytes_in_place<const H: usize>(block: [u32; 8], _: usize) -> [u32; 8] {
        block
    }

    #[inline(always)]
    unsafe fn put_together<const H: usize>(sums: [[u32; 8]; 4]) -> [u32; 8] {
        sums[0]
    }

    #[inline(always)]
    unsafe fn values<const H: usize, const LEVELS: bool>(block: [u32; 8], coding: Coding) -> [f32; 8] {
        let codes = match H {
            2 => block.map(|v| (v & 15) as u8 ^ coding.flip),
            4 => block.map(|v| (v & 3) as u8 ^ coding.flip),
            _ => block.map(|v| v as u8),
        };
        match coding.levels {
            Some(levels) if LEVELS => codes.map(|code| levels[usize::from(code & 15)]),
            _ => codes.map(f32::from),
        }
    }

    #[inline(always)]
    unsafe fn following<const H: usize>(block: [u32; 8]) -> [u32; 8] {
        block.map(|v| v >> (8 / H))
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn zeros() -> [u32; 8] {
        [0; 8]
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> [u32; 8] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[[u8; 4]; 8]>().read_unaligned() }.map(u32::from_le_bytes)
    }

    #[inline(always)]
    unsafe fn dot(codes: [u32; 8], x: [u32; 8], sum: [u32; 8], _: Coding) -> [u32; 8] {
        std::array::from_fn(|lane| {
            let (codes, x) = (codes[lane].to_le_bytes(), x[lane].to_le_bytes());
            let product = |i: usize| i32::from(codes[i]) * i32::from(x[i] as i8);
            (sum[lane] as i32 + (0..4).map(product).sum::<i32>()) as u32
        })
    }

    #[inline(always)]
    unsafe fn to_float(value: [u32; 8]) -> [f32; 8] {
        value.map(|v| v as i32 as f32)
    }

    #[inline(always)]
    unsafe fn sum_whole(value: [u32; 8]) -> i32 {
        value.iter().map(|&v| v as i32).sum()
    }
}
