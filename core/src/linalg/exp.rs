//! An exponential that compilers turn into vectors.

/// An exponential of less than this is nothing beside 1.
const LEAST_EXPONENT: f32 = -87.0;

/// Adding and subtracting it rounds to the nearest whole number.
const TO_WHOLE: f32 = 12_582_912.0;

/// Returns e^x for x ≤ 0, within two units of the last place; 0 below [`LEAST_EXPONENT`]. Cephes' polynomial, without a branch.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // NaN stays what it is.
    let bounded = if x <= LEAST_EXPONENT { LEAST_EXPONENT } else { x };
    let shifted = bounded * std::f32::consts::LOG2_E + TO_WHOLE;
    let whole = shifted - TO_WHOLE;
    // ln 2 in two parts, the first of which has few bits.
    let r = (bounded - whole * 0.693_359_4) + whole * 2.121_944_4e-4;
    let p = ((((1.987_569_1e-4 * r + 1.398_199_9e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r + 1.666_666_5e-1)
        * r
        + 0.5;
    let fraction = p * (r * r) + r + 1.0;
    // The lowest bits of the shifted number are the whole one, which goes into the exponent.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x <= LEAST_EXPONENT { 0.0 } else { fraction * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_close() {
        for i in 0..200_000 {
            let x = -i as f32 * (86.9 / 200_000.0);
            let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((found - expected).abs() <= 3e-7 * expected, "{x}: {found} for {expected}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-90.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }
}
