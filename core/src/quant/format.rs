//! What quantised weights are made of: the type of their codes, who shares a scale, and the bytes that all of it takes.

use std::fmt;

use half::{bf16, f16};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::scales::{SUPER_BLOCK, ScaleType};
use super::trits::TRITS;
use crate::error::{Error, Result};

/// The type of a weight's code. Written `"int2"` to `"int8"`, `"nf4"`, `"mxint2"` to `"mxint8"`, `"ternary"`, `"f16"` or
/// `"bf16"`; and of weights that another program has quantised `"fp4"`, `"mxfp4"`, `"iq4_nl"`,
/// `"f8_e4m3"` or `"f8_e5m2"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    /// Integers of this many bits, 2 to 8.
    Int(u8),
    /// 4-bit NormalFloat: the quantiles of a normal distribution (QLoRA).
    Nf4,
    /// The 4-bit floats of bitsandbytes, 0 … 1 in size.
    Fp4,
    /// The 4-bit floats of OCP Microscaling, twice their size, whose scale is a power of two (MXFP4).
    MxFp4,
    /// The 16 integers of llama.cpp's IQ4_NL and IQ4_XS.
    Iq4Nl,
    /// 8-bit floats of 4 bits of exponent, without infinity (E4M3FN).
    F8E4M3,
    /// 8-bit floats of 5 bits of exponent.
    F8E5M2,
    /// Signed integers of this many bits, 2 to 8, whose scale is a power of two (OCP Microscaling's MXINT).
    MxInt(u8),
    /// −1, 0 and 1: two bits each in memory, five to a byte where they are stored (BitNet b1.58).
    Ternary,
    /// Half precision, without scales.
    F16,
    /// bfloat16, without scales.
    Bf16,
}

impl WeightType {
    /// Bits per weight in memory, scales and zero points aside.
    pub fn bits(self) -> u32 {
        match self {
            WeightType::Int(bits) | WeightType::MxInt(bits) => bits.into(),
            WeightType::Nf4 | WeightType::Fp4 | WeightType::MxFp4 | WeightType::Iq4Nl => 4,
            WeightType::F8E4M3 | WeightType::F8E5M2 => 8,
            WeightType::Ternary => 2,
            WeightType::F16 | WeightType::Bf16 => 16,
        }
    }

    /// Bytes of one packed row of `columns` weights in memory.
    pub fn row_bytes(self, columns: usize) -> usize {
        (columns * self.bits() as usize).div_ceil(8)
    }

    /// Bytes of one row of `columns` weights as it is stored.
    pub fn stored_row_bytes(self, columns: usize) -> usize {
        match self {
            WeightType::Ternary => columns.div_ceil(TRITS),
            _ => self.row_bytes(columns),
        }
    }

    /// Returns whether a scale is a power of two, stored as its exponent.
    pub fn has_power_scales(self) -> bool {
        matches!(self, WeightType::MxInt(_) | WeightType::MxFp4)
    }

    /// Returns whether weights are floats by themselves.
    pub fn is_float(self) -> bool {
        matches!(self, WeightType::F16 | WeightType::Bf16)
    }

    fn parse(name: &str) -> Option<Self> {
        let bits = |digits: &str| digits.parse().ok().filter(|bits| (2..=8).contains(bits) && digits.len() == 1);
        match name {
            "nf4" => Some(WeightType::Nf4),
            "fp4" => Some(WeightType::Fp4),
            "mxfp4" => Some(WeightType::MxFp4),
            "iq4_nl" => Some(WeightType::Iq4Nl),
            "f8_e4m3" => Some(WeightType::F8E4M3),
            "f8_e5m2" => Some(WeightType::F8E5M2),
            "ternary" => Some(WeightType::Ternary),
            "f16" => Some(WeightType::F16),
            "bf16" => Some(WeightType::Bf16),
            _ => match name.strip_prefix("mxint") {
                Some(digits) => bits(digits).map(WeightType::MxInt),
                None => name.strip_prefix("int").and_then(bits).map(WeightType::Int),
            },
        }
    }
}

impl fmt::Display for WeightType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WeightType::Int(bits) => write!(f, "int{bits}"),
            WeightType::Nf4 => f.write_str("nf4"),
            WeightType::Fp4 => f.write_str("fp4"),
            WeightType::MxFp4 => f.write_str("mxfp4"),
            WeightType::Iq4Nl => f.write_str("iq4_nl"),
            WeightType::F8E4M3 => f.write_str("f8_e4m3"),
            WeightType::F8E5M2 => f.write_str("f8_e5m2"),
            WeightType::Ternary => f.write_str("ternary"),
            WeightType::MxInt(bits) => write!(f, "mxint{bits}"),
            WeightType::F16 => f.write_str("f16"),
            WeightType::Bf16 => f.write_str("bf16"),
        }
    }
}

impl Serialize for WeightType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for WeightType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        WeightType::parse(&name).ok_or_else(|| {
            de::Error::custom(format!(
                "weight type '{name}': expected int2 to int8, nf4, mxint2 to mxint8, ternary, f16 or bf16"
            ))
        })
    }
}

/// How many weights share one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// The whole matrix. Written `"tensor"`; the scale is stored with each row.
    Tensor,
    /// The whole row: one scale per output channel. Written `"channel"`.
    Channel,
    /// This many weights side by side in a row, which they must divide. Written as the number.
    Size(usize),
}

impl Serialize for Group {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Group::Tensor => serializer.serialize_str("tensor"),
            Group::Channel => serializer.serialize_str("channel"),
            Group::Size(n) => serializer.serialize_u64(*n as u64),
        }
    }
}

impl<'de> Deserialize<'de> for Group {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Group;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str(
                    "a group size of at least 1, \"channel\" for one scale per output channel, or \"tensor\" for one",
                )
            }
            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Group, E> {
                match usize::try_from(n) {
                    Ok(n) if n > 0 => Ok(Group::Size(n)),
                    _ => Err(E::invalid_value(de::Unexpected::Unsigned(n), &self)),
                }
            }
            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Group, E> {
                u64::try_from(n)
                    .map_err(|_| E::invalid_value(de::Unexpected::Signed(n), &self))
                    .and_then(|n| self.visit_u64(n))
            }
            fn visit_str<E: de::Error>(self, s: &str) -> Result<Group, E> {
                match s {
                    "tensor" => Ok(Group::Tensor),
                    "channel" => Ok(Group::Channel),
                    _ => Err(E::invalid_value(de::Unexpected::Str(s), &self)),
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A weight's type, its groups, and whether zero keeps a code of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Given")]
pub struct WeightFormat {
    /// The type of the codes.
    #[serde(rename = "type")]
    pub weight_type: WeightType,
    /// 64 where a rule does not say; 32 for MXINT.
    pub group: Group,
    /// Of integers. Symmetric: `w ≈ scale · q`, q signed. Asymmetric: `w ≈ scale · (q − zero)`, q unsigned. The other
    /// types are symmetric by themselves.
    pub symmetric: bool,
    /// Of integers that another program has quantised: groups have a minimum in place of a zero point, a number of the scales' type,
    /// so that `w ≈ scale · q + minimum`, q unsigned.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub minimum: bool,
    /// The type that scales are stored as.
    #[serde(skip_serializing_if = "is_f32")]
    pub scales: ScaleType,
}

fn is_f32(scales: &ScaleType) -> bool {
    *scales == ScaleType::F32
}

/// [`WeightFormat`] as a rule may give it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table, such as { type = \"int4\", group = 64 }")]
struct Given {
    #[serde(rename = "type")]
    weight_type: WeightType,
    group: Option<Group>,
    #[serde(default)]
    symmetric: bool,
    #[serde(default)]
    minimum: bool,
    #[serde(default)]
    scales: ScaleType,
}

impl TryFrom<Given> for WeightFormat {
    type Error = String;
    fn try_from(given: Given) -> Result<Self, String> {
        let group = if given.weight_type.has_power_scales() { 32 } else { 64 };
        Ok(WeightFormat {
            weight_type: given.weight_type,
            group: given.group.unwrap_or(Group::Size(group)),
            symmetric: given.symmetric,
            minimum: given.minimum,
            scales: given.scales,
        })
    }
}

impl Default for WeightFormat {
    fn default() -> Self {
        WeightFormat {
            weight_type: WeightType::Int(4),
            group: Group::Size(64),
            symmetric: false,
            minimum: false,
            scales: ScaleType::F32,
        }
    }
}

impl WeightFormat {
    /// Checks that weights can be quantised to the format here, as a rule may ask for.
    ///
    /// # Errors
    /// When it is one of those that only come from files of other programs.
    pub fn check_made(&self) -> Result<()> {
        let of_files = match self.weight_type {
            WeightType::Fp4 | WeightType::MxFp4 | WeightType::Iq4Nl | WeightType::F8E4M3 | WeightType::F8E5M2 => true,
            _ => self.minimum || !matches!(self.scales, ScaleType::F32 | ScaleType::F16),
        };
        match of_files {
            false => Ok(()),
            true => {
                let found = serde_json::to_string(self).unwrap_or_else(|_| self.weight_type.to_string());
                let expected = "int2 to int8, nf4, mxint2 to mxint8, ternary, f16 or bf16, with scales in f32 or f16 and no minimum: \
                                other formats are kept where a file has them, and not made";
                Err(Error::expected("weight format", found, expected))
            }
        }
    }

    /// Checks that what the format says fits together, and a matrix of so many columns.
    ///
    /// # Errors
    /// When it does not.
    pub(super) fn check_fields(&self, columns: usize) -> Result<()> {
        let is_int = matches!(self.weight_type, WeightType::Int(_));
        let nested = self.scales.nested();
        let minimum = nested.map_or(self.minimum, |nested| nested.minimum);
        if self.minimum != minimum || (minimum && (!is_int || self.symmetric)) {
            return Err(Error::expected("weight format", format!("{self:?}"), "minimums of asymmetric integers alone"));
        }
        let Some(nested) = nested else { return Ok(()) };
        let fits = self.group == Group::Size(nested.group) && columns.is_multiple_of(SUPER_BLOCK);
        if !fits || self.weight_type.is_float() || self.weight_type.has_power_scales() {
            let expected = format!("groups of {} in rows of a multiple of {SUPER_BLOCK} weights", nested.group);
            return Err(Error::expected("weight format", format!("{self:?} of {columns} columns"), expected));
        }
        Ok(())
    }

    /// Weights of a row of `columns` that share a scale.
    ///
    /// # Errors
    /// When the group does not divide the row.
    pub fn group_size(&self, columns: usize) -> Result<usize> {
        match self.group {
            _ if self.weight_type.is_float() => Ok(columns),
            Group::Channel | Group::Tensor => Ok(columns),
            Group::Size(n) if n > 0 && columns.is_multiple_of(n) => Ok(n),
            Group::Size(n) => {
                let valid: Vec<String> =
                    (2..=columns).filter(|d| columns.is_multiple_of(*d)).take(12).map(|d| d.to_string()).collect();
                Err(Error::expected(
                    "weight group",
                    n,
                    format!(
                        "a divisor of the row of {columns} weights ({}), \"channel\" or \"tensor\"",
                        valid.join(", ")
                    ),
                ))
            }
        }
    }

    /// Scales of a row of `columns`.
    ///
    /// # Errors
    /// As [`WeightFormat::group_size`].
    pub fn groups(&self, columns: usize) -> Result<usize> {
        let size = self.group_size(columns)?;
        Ok(if self.weight_type.is_float() { 0 } else { columns.checked_div(size).unwrap_or(0) })
    }

    /// Returns whether each scale has a zero point, of one byte, beside it.
    pub fn has_zeros(&self) -> bool {
        matches!(self.weight_type, WeightType::Int(_)) && !self.symmetric && !self.minimum
    }

    /// Bytes of a stored scale that is a number by itself.
    pub fn scale_bytes(&self) -> usize {
        match (self.weight_type, self.scales) {
            (WeightType::F16 | WeightType::Bf16, _) => 0,
            (weight_type, _) if weight_type.has_power_scales() => 1,
            (_, ScaleType::F32) => 4,
            (_, ScaleType::F16 | ScaleType::Bf16) => 2,
            (_, ScaleType::Q2K | ScaleType::Q3K | ScaleType::Q4K | ScaleType::Q6K | ScaleType::Iq4Xs) => 0,
        }
    }

    /// Bytes of the stored scales of a row of `columns`, and of its zero points or minimums.
    ///
    /// # Errors
    /// As [`WeightFormat::group_size`].
    pub fn row_scale_bytes(&self, columns: usize) -> Result<(usize, usize)> {
        let groups = self.groups(columns)?;
        Ok(match self.scales.nested() {
            Some(nested) => (columns / SUPER_BLOCK * nested.bytes, 0),
            None if self.minimum => (groups * self.scale_bytes(), groups * self.scale_bytes()),
            None => (groups * self.scale_bytes(), groups * usize::from(self.has_zeros())),
        })
    }

    /// Bytes of a stored `rows × columns` matrix in this format: codes, scales and zero points.
    ///
    /// # Errors
    /// As [`WeightFormat::group_size`].
    pub fn stored_bytes(&self, rows: usize, columns: usize) -> Result<usize> {
        let (scales, zeros) = self.row_scale_bytes(columns)?;
        Ok(rows * (self.weight_type.stored_row_bytes(columns) + scales + zeros))
    }

    /// The scale that is stored for this one: the nearest that the scales' type has; above 0, but for a scale of 0.
    pub(super) fn stored_scale(&self, scale: f32) -> f32 {
        match (self.weight_type, self.scales) {
            (weight_type, _) if weight_type.has_power_scales() => {
                let exponent = (scale.to_bits() >> 23).clamp(1, 254);
                f32::from_bits(exponent << 23)
            }
            (_, ScaleType::F16) if scale == 0.0 => 0.0,
            (_, ScaleType::F16) => f16::from_f32(scale).max(f16::from_bits(1)).min(f16::MAX).to_f32(),
            // Others are of files alone.
            _ => scale,
        }
    }

    /// Returns whether stored scales, and minimums, are f16 numbers by themselves.
    pub(super) fn has_half_scales(&self) -> bool {
        self.scales == ScaleType::F16 && !self.weight_type.has_power_scales()
    }

    /// Scales that are numbers by themselves, as they are stored.
    pub fn scales_to_bytes(&self, scales: &[f32]) -> Vec<u8> {
        match (self.weight_type, self.scales) {
            (WeightType::MxInt(_), _) => scales.iter().map(|s| (s.to_bits() >> 23) as u8).collect(),
            (WeightType::MxFp4, _) => scales.iter().map(|&s| half_power_byte(s)).collect(),
            (_, ScaleType::F16) => scales.iter().flat_map(|&s| f16::from_f32(s).to_le_bytes()).collect(),
            (_, ScaleType::Bf16) => scales.iter().flat_map(|&s| bf16::from_f32(s).to_le_bytes()).collect(),
            _ => scales.iter().flat_map(|s| s.to_le_bytes()).collect(),
        }
    }

    /// Scales that are numbers by themselves, from how they are stored.
    pub fn scales_from_bytes(&self, bytes: &[u8]) -> Vec<f32> {
        match (self.weight_type, self.scales) {
            (WeightType::MxInt(_), _) => bytes.iter().map(|&e| f32::from_bits(u32::from(e) << 23)).collect(),
            (WeightType::MxFp4, _) => bytes.iter().map(|&e| half_power(e)).collect(),
            (_, ScaleType::F16) => bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            (_, ScaleType::Bf16) => bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            _ => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        }
    }
}

/// Returns half the power of two that an E8M0 byte stands for: MXFP4's numbers are kept at twice their size.
fn half_power(byte: u8) -> f32 {
    f32::from_bits(match byte {
        0 | 1 => 0x0020_0000 << byte,
        _ => (u32::from(byte) - 1) << 23,
    })
}

/// Returns the E8M0 byte of twice a power of two.
fn half_power_byte(half: f32) -> u8 {
    match half.to_bits() {
        0x0020_0000 => 0,
        0x0040_0000 => 1,
        bits => (bits >> 23) as u8 + 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_others_are_refused() {
        let types = (2..=8).flat_map(|b| [WeightType::Int(b), WeightType::MxInt(b)]);
        for kind in types.chain([WeightType::Nf4, WeightType::Ternary, WeightType::F16, WeightType::Bf16]) {
            assert_eq!(WeightType::parse(&kind.to_string()), Some(kind));
        }
        for name in ["int1", "int9", "int04", "int", "nf3", "mxint", "mxint16", "f32", "INT4", ""] {
            assert_eq!(WeightType::parse(name), None, "{name}");
        }
    }

    #[test]
    fn a_group_that_does_not_divide_is_refused_with_those_that_do() {
        let format = WeightFormat { group: Group::Size(64), ..WeightFormat::default() };
        let message = format.group_size(96).unwrap_err().to_string();
        assert!(message.contains("found 64") && message.contains("48") && message.contains("channel"), "{message}");
    }

    #[test]
    fn formats_are_read_with_their_defaults() {
        let read = |text: &str| serde_json::from_str::<WeightFormat>(text);
        assert_eq!(read(r#"{"type":"int4"}"#).unwrap(), WeightFormat::default());
        assert_eq!(read(r#"{"type":"mxint4"}"#).unwrap().group, Group::Size(32));
        assert_eq!(read(r#"{"type":"int3","group":"channel"}"#).unwrap().group, Group::Channel);
        assert_eq!(read(r#"{"type":"int3","group":"tensor"}"#).unwrap().group, Group::Tensor);
        for bad in ["0", "-3", "\"row\"", "1.5"] {
            assert!(read(&format!(r#"{{"type":"int4","group":{bad}}}"#)).is_err());
        }
        assert!(read(r#"{"type":"int4","grouped":3}"#).unwrap_err().to_string().contains("grouped"));
        // What was stored before there were other scales keeps its bytes, and so its artifact's name.
        let stored = serde_json::to_string(&WeightFormat::default()).unwrap();
        assert_eq!(stored, r#"{"type":"int4","group":64,"symmetric":false}"#);
    }

    #[test]
    fn bytes_are_counted_with_scales_and_zero_points() {
        let bytes = |text: &str| serde_json::from_str::<WeightFormat>(text).unwrap().stored_bytes(3, 128).unwrap();
        assert_eq!(bytes(r#"{"type":"int4"}"#), 3 * (64 + 2 * 5));
        assert_eq!(bytes(r#"{"type":"int4","scales":"f16"}"#), 3 * (64 + 2 * 3));
        assert_eq!(bytes(r#"{"type":"int3","symmetric":true,"group":"channel"}"#), 3 * (48 + 4));
        assert_eq!(bytes(r#"{"type":"nf4","group":16,"scales":"f16"}"#), 3 * (64 + 8 * 2));
        assert_eq!(bytes(r#"{"type":"mxint8"}"#), 3 * (128 + 4));
        assert_eq!(bytes(r#"{"type":"bf16"}"#), 3 * 256);
        assert_eq!(bytes(r#"{"type":"ternary","group":"channel"}"#), 3 * (26 + 4));
    }
}
