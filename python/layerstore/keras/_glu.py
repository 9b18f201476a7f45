"""Gated linear units of ternary layers."""

from __future__ import annotations

import keras
from keras import activations, ops

from ._checks import positive, registered
from ._dense import DenseMML

PERMITTED_ACTIVATIONS = {"sigmoid", "linear", "relu", "gelu", "silu", "swish", "selu"}


@registered
class GLUMML(keras.layers.Layer):
    """A gated linear unit: ``down(activation(gate(x)) · up(x))``; gate and up are one ternary layer.

    The width between is ``intermediate_size``, else two thirds of ``hidden_ratio`` times the input's, rounded up to a multiple of 256.
    """

    def __init__(self, units, hidden_ratio=4, intermediate_size=None, activation="sigmoid", **kwargs):
        super().__init__(**kwargs)
        self.units = positive("units", units)
        if activation not in PERMITTED_ACTIVATIONS:
            raise ValueError(f"Received an invalid value for activation, expected one of {sorted(PERMITTED_ACTIVATIONS)}, got {activation}")
        self.hidden_ratio, self.intermediate_size = hidden_ratio, intermediate_size
        self.activation = activations.get(activation)
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self._gate_dense = self._down_dense = None

    def build(self, input_shape):
        if self.intermediate_size is None:
            wanted = int(input_shape[-1] * self.hidden_ratio * 2 / 3)
            self.intermediate_size = -(-wanted // 256) * 256
        self._gate_dense = DenseMML(2 * self.intermediate_size)
        self._gate_dense.build(input_shape)
        self._down_dense = DenseMML(self.units)
        self._down_dense.build((None, self.intermediate_size))
        self.built = True

    def _gated(self, gate):
        # Keras's gelu is the approximate one on some paths: this is x · Φ(x).
        return activations.gelu(gate, approximate=False) if self.activation is activations.gelu else self.activation(gate)

    def call(self, inputs):
        gate, up = ops.split(self._gate_dense(inputs), 2, axis=-1)
        return self._down_dense(self._gated(gate) * up)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def get_config(self):
        return super().get_config() | {
            "units": self.units,
            "hidden_ratio": self.hidden_ratio,
            "intermediate_size": self.intermediate_size,
            "activation": activations.serialize(self.activation),
        }


def _with(activation: str, name: str, doc: str):
    """Makes the unit of one activation; another that is asked for is checked and not used."""

    def __init__(self, units, hidden_ratio=4, intermediate_size=None, activation=activation, **kwargs):
        if activation not in PERMITTED_ACTIVATIONS:
            raise ValueError(f"Received an invalid value for activation, got {activation}")
        GLUMML.__init__(self, units, hidden_ratio, intermediate_size, own, **kwargs)

    own = activation
    return registered(type(name, (GLUMML,), {"__init__": __init__, "__doc__": doc, "__module__": __name__}))


BilinearMML = _with("linear", "BilinearMML", "A gated linear unit without an activation.")
GeGLUMML = _with("gelu", "GeGLUMML", "A gated linear unit with x · Φ(x).")
ReGLUMML = _with("relu", "ReGLUMML", "A gated linear unit with max(x, 0).")
SeGLUMML = _with("selu", "SeGLUMML", "A gated linear unit with the scaled exponential unit.")
SwiGLUMML = _with("silu", "SwiGLUMML", "A gated linear unit with x · sigmoid(x).")
