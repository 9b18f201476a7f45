//! Plain Rust, for every processor: eight lanes that a compiler may put into registers.

use half::f16;

use super::rows::Element;
use super::simd::{Coding, Kernel, Simd, each, level_byte, read, write};

/// The instruction set that is none.
#[derive(Debug, Clone, Copy)]
pub struct Portable;

/// What stays the same for a matrix.
#[derive(Clone, Copy)]
pub struct Registers {
    bits: usize,
    flip: u32,
    levels: [f32; 16],
    /// The levels as bytes.
    bytes: [u32; 16],
}

/// `$out[i]` for each of the eight lanes, without a closure.
macro_rules! lanes {
    ($zero:expr, $i:ident => $value:expr) => {{
        let mut out = [$zero; 8];
        let mut $i = 0;
        while $i < 8 {
            out[$i] = $value;
            $i += 1;
        }
        out
    }};
}

/// Byte `i` of those that are there; 0 behind them.
#[inline(always)]
unsafe fn byte(from: *const u8, i: usize, bytes: usize) -> u32 {
    // SAFETY: so many bytes are there.
    if i < bytes { u32::from(unsafe { *from.wrapping_add(i) }) } else { 0 }
}

impl Simd for Portable {
    const NAME: &'static str = "portable";
    const LANES: usize = 8;
    const REGISTERS: usize = 0;
    type Float = [f32; 8];
    type Int = [u32; 8];
    type Coding = Registers;

    fn available() -> bool {
        true
    }

    #[inline(never)]
    unsafe fn compiled<K: Kernel<Self>>(kernel: K) {
        // SAFETY: the caller's promise, as in every function here.
        unsafe { kernel.run() }
    }

    #[inline(always)]
    unsafe fn coding(coding: &Coding) -> Registers {
        let levels = match coding.levels {
            Some(levels) => *levels,
            None => [0.0; 16],
        };
        let (mut bytes, mut i) = ([0; 16], 0);
        while i < 16 {
            bytes[i] = u32::from(level_byte(levels[i]));
            i += 1;
        }
        Registers { bits: coding.bits as usize, flip: coding.flip.into(), levels, bytes }
    }

    #[inline(always)]
    unsafe fn zero() -> [f32; 8] {
        [0.0; 8]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 8] {
        unsafe { read(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, value: [f32; 8]) {
        unsafe { write(to.cast(), value) }
    }

    #[inline(always)]
    unsafe fn load_some(from: *const f32, count: usize) -> [f32; 8] {
        lanes!(0f32, i => if i < count { unsafe { *from.wrapping_add(i) } } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn halves(from: *const f16) -> [f32; 8] {
        lanes!(0f32, i => unsafe { *from.wrapping_add(i) }.value())
    }

    #[inline(always)]
    unsafe fn halves_some(from: *const f16, count: usize) -> [f32; 8] {
        lanes!(0f32, i => if i < count { unsafe { *from.wrapping_add(i) }.value() } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn bytes_some(from: *const u8, count: usize) -> [f32; 8] {
        lanes!(0f32, i => unsafe { byte(from, i, count) } as f32)
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 8] {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn mul(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        lanes!(0f32, i => a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn fma(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        lanes!(0f32, i => a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn fnma(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        lanes!(0f32, i => c[i] - a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn sum(value: [f32; 8]) -> f32 {
        let (mut sum, mut i) = (-0f32, 0);
        while i < 8 {
            sum += value[i];
            i += 1;
        }
        sum
    }

    #[inline(always)]
    unsafe fn pick(value: [f32; 8], places: *const u32) -> [f32; 8] {
        lanes!(0f32, i => value[unsafe { *places.wrapping_add(i) } as usize & 7])
    }

    #[inline(always)]
    unsafe fn block<const H: usize, const FULL: bool>(from: *const u8, bytes: usize, coding: Registers) -> [u32; 8] {
        if H > 1 {
            if FULL {
                return lanes!(0u32, i => unsafe { read::<u32>(from.wrapping_add(4 * i).cast()) });
            }
            return lanes!(0u32, i => unsafe {
                byte(from, 4 * i, bytes)
                    | byte(from, 4 * i + 1, bytes) << 8
                    | byte(from, 4 * i + 2, bytes) << 16
                    | byte(from, 4 * i + 3, bytes) << 24
            });
        }
        let (bits, mask, flip) = (coding.bits, (1u32 << coding.bits) - 1, coding.flip);
        lanes!(0u32, lane => {
            let (mut all, mut i) = (0, 0);
            while i < 4 {
                let (first, shift) = ((4 * lane + i) * bits / 8, (4 * lane + i) * bits % 8);
                let two = unsafe { byte(from, first, bytes) | byte(from, first + 1, bytes) << 8 };
                all |= (((two >> shift) & mask) ^ flip) << (8 * i);
                i += 1;
            }
            all
        })
    }

    #[inline(always)]
    unsafe fn bytes<const H: usize, const LEVELS: bool, const PLAIN: bool>(
        block: [u32; 8],
        half: usize,
        coding: Registers,
    ) -> [u32; 8] {
        let flip = coding.flip * 0x0101_0101;
        let codes = match H {
            2 => lanes!(0u32, i => ((block[i] >> (4 * half)) & 0x0f0f_0f0f) ^ flip),
            4 => lanes!(0u32, i => ((block[i] >> (2 * half)) & 0x0303_0303) ^ flip),
            _ => block,
        };
        if !LEVELS {
            return codes;
        }
        lanes!(0u32, i => {
            let (mut all, mut place) = (0, 0);
            while place < 32 {
                all |= coding.bytes[(codes[i] >> place & 15) as usize] << place;
                place += 8;
            }
            all
        })
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
    unsafe fn values<const H: usize, const LEVELS: bool>(block: [u32; 8], coding: Registers) -> [f32; 8] {
        let flip = coding.flip;
        let codes = match H {
            2 => lanes!(0u32, i => (block[i] & 15) ^ flip),
            4 => lanes!(0u32, i => (block[i] & 3) ^ flip),
            _ => lanes!(0u32, i => block[i] & 255),
        };
        if LEVELS {
            return lanes!(0f32, i => coding.levels[(codes[i] & 15) as usize]);
        }
        lanes!(0f32, i => codes[i] as i32 as f32)
    }

    #[inline(always)]
    unsafe fn following<const H: usize>(block: [u32; 8]) -> [u32; 8] {
        lanes!(0u32, i => block[i] >> (8 / H))
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}

    #[inline(always)]
    unsafe fn zeros() -> [u32; 8] {
        [0; 8]
    }

    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> [u32; 8] {
        // Byte t of a lane is its bits 8t to 8t + 7, whatever the processor's own order.
        lanes!(0u32, i => u32::from_le(unsafe { read::<u32>(from.wrapping_add(4 * i).cast()) }))
    }

    #[inline(always)]
    unsafe fn splat_bytes(from: *const i8) -> [u32; 8] {
        lanes!(0u32, _i => u32::from_le(unsafe { read::<u32>(from.cast()) }))
    }

    #[inline(always)]
    unsafe fn dot(codes: [u32; 8], x: [u32; 8], sum: [u32; 8], _: Registers) -> [u32; 8] {
        lanes!(0u32, lane => {
            let (mut all, mut place) = (sum[lane] as i32, 0);
            while place < 32 {
                all += (codes[lane] >> place & 255) as i32 * i32::from((x[lane] >> place) as i8);
                place += 8;
            }
            all as u32
        })
    }

    #[inline(always)]
    unsafe fn dot_halves<const H: usize, const LEVELS: bool>(
        halves: [[u32; 8]; 4],
        x: *const i8,
        coding: Registers,
    ) -> [u32; 8] {
        unsafe {
            let mut sum = Self::zeros();
            each!(half in H, {
                sum = Self::dot(halves[half], Self::load_bytes(x.wrapping_add(half * 4 * Self::LANES)), sum, coding);
            });
            sum
        }
    }

    #[inline(always)]
    unsafe fn to_float(value: [u32; 8]) -> [f32; 8] {
        lanes!(0f32, i => value[i] as i32 as f32)
    }

    #[inline(always)]
    unsafe fn sum_whole(value: [u32; 8]) -> i64 {
        let (mut sum, mut i) = (0, 0);
        while i < 8 {
            sum += i64::from(value[i] as i32);
            i += 1;
        }
        sum
    }
}
