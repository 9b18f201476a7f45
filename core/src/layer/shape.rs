//! A layer's lengths, which are known before its numbers are read, and the measure of what it is stored in.

/// The lengths of a weight and its bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerShape {
    /// Length of an output row.
    pub out_features: usize,
    /// Length of an input row.
    pub in_features: usize,
    /// Whether the layer has a bias, `[out_features]`.
    pub has_bias: bool,
}

impl LayerShape {
    /// Returns the bytes that the bias takes as f32; 0 without one.
    pub fn bias_bytes(self) -> usize {
        if self.has_bias { 4 * self.out_features } else { 0 }
    }
}

/// Returns the bits that a layer is stored in for each of its `out_features × in_features` weights: those of all its arrays, the
/// bias included. `None` where there are no weights.
pub fn bits_per_weight(stored_bytes: u64, out_features: u64, in_features: u64) -> Option<f64> {
    let weights = out_features.saturating_mul(in_features);
    (weights > 0).then(|| 8.0 * stored_bytes as f64 / weights as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_count_all_that_is_stored() {
        assert_eq!(bits_per_weight(4 * 12 * 8 + 4 * 12, 12, 8), Some(36.0));
        assert_eq!(bits_per_weight(10, 0, 8), None);
        let shape = LayerShape { out_features: 12, in_features: 8, has_bias: true };
        assert_eq!((shape.bias_bytes(), LayerShape { has_bias: false, ..shape }.bias_bytes()), (48, 0));
    }
}
