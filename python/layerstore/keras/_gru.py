"""The gated recurrent unit whose gates do not see the state, so that no product waits for the step before."""

from __future__ import annotations

import keras
from keras import activations, constraints, initializers, ops, regularizers

from ._checks import divides, positive, registered
from ._dense import DenseMML
from ._recurrent import Recurrent


@registered
class GRUCellMML(keras.layers.Layer):
    """One step: ``h = f · h' + (1 − f) · c``, outputs ``out(g · h)``; f, c and g are made of the input. The state is
    ``(batch, heads, units / heads)``. With ``fully_mml`` all layers are ternary, else only that of f and c.
    """

    def __init__(
        self,
        units,
        fully_mml=False,
        num_heads=1,
        activation="silu",
        recurrent_activation="sigmoid",
        use_bias=True,
        weights_initializer="glorot_uniform",
        bias_initializer="zeros",
        weights_regularizer=None,
        bias_regularizer=None,
        weights_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        positive("output dimension", units)
        divides(units, positive("the number of heads", num_heads))
        super().__init__(**kwargs)
        self.units, self.fully_mml, self.num_heads, self.use_bias = units, fully_mml, num_heads, use_bias
        self.activation, self.recurrent_activation = map(activations.get, (activation, recurrent_activation))
        self.weights_initializer, self.bias_initializer = map(initializers.get, (weights_initializer, bias_initializer))
        self.weights_regularizer, self.bias_regularizer = map(regularizers.get, (weights_regularizer, bias_regularizer))
        self.weights_constraint, self.bias_constraint = map(constraints.get, (weights_constraint, bias_constraint))
        self.state_size = self.output_size = units
        self.input_spec = keras.layers.InputSpec(ndim=2)
        self._kernel = self._g_gate = self._o_gate = None

    def _dense(self, kind, units, name, shape, **more):
        layer = kind(
            units,
            use_bias=self.use_bias,
            kernel_initializer=initializers.serialize(self.weights_initializer),
            bias_initializer=initializers.serialize(self.bias_initializer),
            kernel_regularizer=self.weights_regularizer,
            bias_regularizer=self.bias_regularizer,
            kernel_constraint=self.weights_constraint,
            bias_constraint=self.bias_constraint,
            name=name,
            **more,
        )
        layer.build(shape)
        return layer

    def build(self, input_shape):
        self._kernel = self._dense(DenseMML, self.units * (3 if self.fully_mml else 2), "kernel", input_shape)
        dense = keras.layers.Dense
        if not self.fully_mml:
            self._g_gate = self._dense(dense, self.units, "data_gate", input_shape, activation=self.recurrent_activation)
        kind = DenseMML if self.fully_mml else dense
        self._o_gate = self._dense(kind, self.units, "output_gate", (None, self.units))
        self.built = True

    def call(self, inputs, states, training=False):
        nested = isinstance(states, (list, tuple))
        before = states[0] if nested else states
        parts = ops.split(self._kernel(inputs), 3 if self.fully_mml else 2, axis=-1)
        g = self.recurrent_activation(parts[2]) if self.fully_mml else self._g_gate(inputs)
        heads = (-1, self.num_heads, self.units // self.num_heads)
        f = ops.reshape(self.recurrent_activation(parts[0]), heads)
        c = ops.reshape(self.activation(parts[1]), heads)
        state = f * before + (1.0 - f) * c
        output = self._o_gate(g * ops.reshape(state, (-1, self.units)))
        return output, [state] if nested else state

    def get_initial_state(self, batch_size=None):
        """Returns the state before the first step: zeros."""
        return [ops.zeros((batch_size, self.num_heads, self.units // self.num_heads), dtype=self.compute_dtype)]

    def get_config(self):
        return super().get_config() | {
            "units": self.units,
            "fully_mml": self.fully_mml,
            "num_heads": self.num_heads,
            "activation": activations.serialize(self.activation),
            "recurrent_activation": activations.serialize(self.recurrent_activation),
            "use_bias": self.use_bias,
            "weights_initializer": initializers.serialize(self.weights_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "weights_regularizer": regularizers.serialize(self.weights_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "weights_constraint": constraints.serialize(self.weights_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
        }


@registered
class GRUMML(Recurrent):
    """``GRUCellMML`` over sequences ``(batch, steps, features)``, with the arguments of ``keras.layers.RNN``."""

    cell_class = GRUCellMML
    cell_arguments = (
        "units",
        "fully_mml",
        "num_heads",
        "activation",
        "recurrent_activation",
        "use_bias",
        "weights_initializer",
        "bias_initializer",
        "weights_regularizer",
        "bias_regularizer",
        "weights_constraint",
        "bias_constraint",
    )
