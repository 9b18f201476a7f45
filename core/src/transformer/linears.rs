//! Linear layers that meet the same inputs, run at once where all of them are packed.

use ndarray::{Array2, ArrayView2};

use crate::error::Result;
use crate::layer::{Accuracy, ActivationFormat, SharedLayer};
use crate::quant::{MOST_FUSED, PackedForward, Plan, SharedInputs, forward_packed};

/// Layers of the same inputs, at most [`MOST_FUSED`].
#[derive(Debug)]
pub(super) struct Linears {
    layers: Vec<SharedLayer>,
    /// How each layer's rows lie in registers; none where one of them is not packed.
    plans: Vec<Plan>,
}

impl Linears {
    /// Prepares layers.
    ///
    /// # Panics
    /// When they are more than can be run at once.
    pub(super) fn new(layers: &[&SharedLayer]) -> Self {
        assert!(layers.len() <= MOST_FUSED, "at most {MOST_FUSED} layers at once");
        let plan = |layer: &&SharedLayer| layer.packed_forward().and_then(|pass| pass.plan());
        Linears {
            layers: layers.iter().map(|&layer| layer.clone()).collect(),
            plans: layers.iter().map(plan).collect::<Option<_>>().unwrap_or_default(),
        }
    }

    /// Writes each layer's outputs `[rows, out_features]` for `x` `[rows, in_features]`, which is not looked through for numbers that
    /// are not finite where all layers are packed: they would be found in what comes out at the end.
    ///
    /// # Errors
    /// As [`Layer::forward`](crate::layer::Layer::forward).
    pub(super) fn forward(
        &self,
        x: &[f32],
        accuracy: Accuracy,
        outputs: &mut [&mut Vec<f32>],
        inputs: &mut SharedInputs,
    ) -> Result<()> {
        if !self.plans.is_empty() {
            let mut passes = [const { None }; MOST_FUSED];
            for ((layer, plan), pass) in self.layers.iter().zip(&self.plans).zip(&mut passes) {
                let Some(found) = layer.packed_forward() else { continue };
                let activations = match accuracy {
                    Accuracy::Full => ActivationFormat::F32,
                    Accuracy::Approximate => found.activations,
                };
                *pass = Some((PackedForward { activations, ..found }, plan));
            }
            forward_packed(x, &passes, outputs, inputs);
            return Ok(());
        }
        for (layer, y) in self.layers.iter().zip(outputs) {
            let width = layer.in_features();
            let x = ArrayView2::from_shape((x.len() / width.max(1), width), x).expect("whole rows");
            let found: Array2<f32> = layer.forward(x, accuracy)?.y;
            y.clear();
            y.extend(found.iter());
        }
        Ok(())
    }
}
