//! What the kernels ask of an instruction set.
//!
//! A library does not choose its user's profile, so nothing in a loop here may depend on what the compiler likes to inline: every
//! method of [`Simd`] and every [`Kernel::run`] is `#[inline(always)]`, and loops are written with `while` or with [`each!`]
//! rather than with closures and iterator adaptors, which are functions of their own and are compiled without the
//! instructions where they are not inlined. `make check-kernels` disassembles what comes of it.

use half::f16;

/// Repeats a block for `$i` = 0, 1, … below `$n`, which is a constant of at most 4, as straight code: no loop is left for
/// the compiler to unroll, and so what is indexed with `$i` stays in registers.
macro_rules! each {
    ($i:ident in $n:expr, $body:block) => {{
        const { assert!($n <= 4, "straight code for at most four") };
        {
            let $i: usize = 0;
            if $i < $n $body
        }
        {
            let $i: usize = 1;
            if $i < $n $body
        }
        {
            let $i: usize = 2;
            if $i < $n $body
        }
        {
            let $i: usize = 3;
            if $i < $n $body
        }
    }};
}
pub(super) use each;

/// How codes become numbers.
#[derive(Debug, Clone, Copy)]
pub struct Coding {
    /// Bits of a code, 2 to 8.
    pub bits: u32,
    /// The bits that are flipped in every code: the sign bit of signed ones, which makes them unsigned.
    pub flip: u8,
    /// The numbers that the sixteen codes stand for, where that is not the code itself.
    pub levels: Option<&'static [f32; 16]>,
}

/// Returns one of [`Coding::levels`], in −1 … 1, as a byte: 127 steps either way around 128.
#[inline(always)]
pub fn level_byte(level: f32) -> u8 {
    // Rounded: by a function it would be called for each.
    (level * 127.0 + 128.5) as u8
}

/// A value that may begin anywhere.
#[derive(Clone, Copy)]
#[repr(C, packed)]
pub struct Unaligned<T>(T);

impl<T: Copy> Unaligned<T> {
    /// Returns the value.
    #[inline(always)]
    pub fn get(&self) -> T {
        self.0
    }
}

/// Reads a value from wherever it begins. Where debug assertions are compiled in, the standard library's ways to do so check their
/// pointers each time, in several branches.
///
/// # Safety
/// The value is there.
#[inline(always)]
pub unsafe fn read<T: Copy>(from: *const u8) -> T {
    // SAFETY: the caller's promise.
    unsafe { (*from.cast::<Unaligned<T>>()).0 }
}

/// Writes a value to wherever it is to begin; see [`read`].
///
/// # Safety
/// There is room for the value.
#[inline(always)]
pub unsafe fn write<T: Copy>(to: *mut u8, value: T) {
    // SAFETY: the caller's promise.
    unsafe { (*to.cast::<Unaligned<T>>()).0 = value }
}

/// Returns the number itself, of which the compiler is told nothing: what it would work out from it before a loop, for each
/// of several rows, does not fit into the registers.
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

/// A loop over rows of codes, generic over the instruction set that it is compiled for.
pub trait Kernel<S: Simd> {
    /// Runs the loop. Implementations are `#[inline(always)]`, so that all of it is compiled inside [`Simd::compiled`].
    ///
    /// # Safety
    /// The processor has the instructions of `S`, and the kernel's own conditions hold.
    unsafe fn run(self);
}

/// Registers of one instruction set, and what is done with them.
///
/// Codes of a row are looked at in blocks. A lane of 32 bits holds codes that lie side by side in the row: `4 · H` of
/// them, as `H` registers of bytes. `H` is 2 for four bits and 4 for two, whose packed bytes are a block's lanes as they
/// are; it is 1 for any number of bits, whose codes are spread to a byte each.
///
/// # Safety
/// Of every function: the processor has the instructions, and what is pointed at is there.
pub trait Simd: Copy + Send + Sync + 'static {
    /// Name of the instruction set.
    const NAME: &'static str;
    /// 32-bit lanes of a register.
    const LANES: usize;
    /// Registers of the processor, which a tile's sums have to fit into; 0 where lanes are no registers.
    const REGISTERS: usize;
    /// A register of floats.
    type Float: Copy;
    /// A register of integers.
    type Int: Copy;
    /// Registers that stay the same for a matrix.
    type Coding: Copy;

    /// Returns whether the processor has the instructions.
    fn available() -> bool;

    /// Runs a kernel in a function of its own that is compiled with the instructions.
    unsafe fn compiled<K: Kernel<Self>>(kernel: K);

    /// Prepares the registers that stay the same for a matrix.
    unsafe fn coding(coding: &Coding) -> Self::Coding;

    /// Returns zeros.
    unsafe fn zero() -> Self::Float;
    /// Loads [`Simd::LANES`] floats.
    unsafe fn load(from: *const f32) -> Self::Float;
    /// Stores [`Simd::LANES`] floats.
    unsafe fn store(to: *mut f32, value: Self::Float);
    /// Loads the first `count` floats, at most [`Simd::LANES`]; zeros behind them.
    unsafe fn load_some(from: *const f32, count: usize) -> Self::Float;
    /// Loads [`Simd::LANES`] f16 numbers as floats.
    unsafe fn halves(from: *const f16) -> Self::Float;
    /// Loads the first `count` f16 numbers, at most [`Simd::LANES`], as floats; zeros behind them.
    unsafe fn halves_some(from: *const f16, count: usize) -> Self::Float;
    /// Loads the first `count` bytes as floats; zeros behind them.
    unsafe fn bytes_some(from: *const u8, count: usize) -> Self::Float;
    /// Returns `value` in every lane.
    unsafe fn splat(value: f32) -> Self::Float;
    /// Returns `a · b`.
    unsafe fn mul(a: Self::Float, b: Self::Float) -> Self::Float;
    /// Returns `a · b + c`.
    unsafe fn fma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// Returns `c − a · b`.
    unsafe fn fnma(a: Self::Float, b: Self::Float, c: Self::Float) -> Self::Float;
    /// Returns the sum of the lanes.
    unsafe fn sum(value: Self::Float) -> f32;
    /// Returns the sum of the lanes of each register, which is [`Simd::sum`] of each to the bit.
    #[inline(always)]
    unsafe fn sums(values: [Self::Float; 4]) -> [f32; 4] {
        // SAFETY: the caller's promise.
        unsafe { [Self::sum(values[0]), Self::sum(values[1]), Self::sum(values[2]), Self::sum(values[3])] }
    }
    /// Returns a register whose lane i is lane `places[i]` of `value`.
    unsafe fn pick(value: Self::Float, places: *const u32) -> Self::Float;

    /// Loads a block of a row's codes: `bytes` of it are there, all of a block's where `FULL`. For `H` = 1 they are spread.
    unsafe fn block<const H: usize, const FULL: bool>(from: *const u8, bytes: usize, coding: Self::Coding)
    -> Self::Int;
    /// Returns unsigned codes of a block, a byte each: byte t of a lane is its code `t · H + half`. In `PLAIN` ones nothing is
    /// to be flipped.
    unsafe fn bytes<const H: usize, const LEVELS: bool, const PLAIN: bool>(
        block: Self::Int,
        half: usize,
        coding: Self::Coding,
    ) -> Self::Int;
    /// Whether [`Simd::dot`] takes bytes of any size without more work, so that codes may stay where they are in them.
    const IN_PLACE: bool;
    /// Returns plain codes where they are, all others in their bytes cleared: `16^half` (H = 2) or `4^half` (H = 4) times as
    /// large.
    unsafe fn bytes_in_place<const H: usize>(block: Self::Int, half: usize) -> Self::Int;
    /// Returns the sum of the products of all codes, from one sum for each of their places.
    unsafe fn put_together<const H: usize>(sums: [Self::Int; 4]) -> Self::Int;
    /// Returns the numbers that the first codes of all lanes stand for.
    unsafe fn values<const H: usize, const LEVELS: bool>(block: Self::Int, coding: Self::Coding) -> Self::Float;
    /// Returns the lanes without their first codes.
    unsafe fn following<const H: usize>(block: Self::Int) -> Self::Int;

    /// Asks for a cache line, which need not be there.
    unsafe fn prefetch(from: *const u8);

    /// Returns integer zeros.
    unsafe fn zeros() -> Self::Int;
    /// Loads four bytes a lane.
    unsafe fn load_bytes(from: *const i8) -> Self::Int;
    /// Writes the lanes of [`Simd::LANES`] registers that lie side by side as registers, `stride` bytes apart: the first of all, the second of
    /// all, and so on.
    #[inline(always)]
    unsafe fn write_columns(from: *const u8, to: *mut u8, stride: usize) {
        let mut lane = 0;
        while lane < Self::LANES {
            let mut row = 0;
            while row < Self::LANES {
                // SAFETY: the caller's promise.
                unsafe {
                    let number = read::<u32>(from.wrapping_add(4 * (row * Self::LANES + lane)));
                    write(to.wrapping_add(lane * stride + 4 * row), number);
                }
                row += 1;
            }
            lane += 1;
        }
    }
    /// Loads four bytes for all lanes.
    unsafe fn splat_bytes(from: *const i8) -> Self::Int;
    /// Adds the four products in each lane of unsigned bytes with signed ones to `sum`.
    unsafe fn dot(codes: Self::Int, x: Self::Int, sum: Self::Int, coding: Self::Coding) -> Self::Int;
    /// Returns the sums in each lane of the products of all `H` registers of a block's codes with inputs that lie one register after
    /// another.
    unsafe fn dot_halves<const H: usize, const LEVELS: bool>(
        halves: [Self::Int; 4],
        x: *const i8,
        coding: Self::Coding,
    ) -> Self::Int;
    /// Converts each lane, a signed integer, to a float.
    unsafe fn to_float(value: Self::Int) -> Self::Float;
    /// Returns the sum of the lanes, signed integers, which is more than 32 bits hold where rows are long.
    unsafe fn sum_whole(value: Self::Int) -> i64;
}
