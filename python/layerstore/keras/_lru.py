"""The linear recurrent unit: a diagonal complex recurrence between ternary layers."""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from ._checks import positive, registered
from ._dense import DenseMML
from ._recurrent import Recurrent


@registered
class LRUCellMML(keras.layers.Layer):
    """One step: ``h = λ h' + γ B x``, outputs ``Re(C h) + D x``. The state is ``(batch, 2, state_dim)``, real parts first. λ is drawn
    with sizes in ``r_min … r_max`` and phases up to ``max_phase``. With ``fully_mml`` C and D are ternary, too.
    """

    def __init__(
        self, units, state_dim, fully_mml=False, r_min=0, r_max=1, max_phase=2 * math.pi, use_bias=False, **kwargs
    ):
        super().__init__(**kwargs)
        self.units, self.state_dim = positive("output dimension", units), positive("the state's dimension", state_dim)
        self.fully_mml, self.use_bias = fully_mml, use_bias
        self.r_min, self.r_max, self.max_phase = r_min, r_max, max_phase
        self.state_size, self.output_size = 2 * state_dim, units
        self.input_spec = keras.layers.InputSpec(ndim=2)

    def _nu_log(self, shape, dtype=None):
        size = self.r_min**2 + keras.random.uniform(shape, 1e-6, 1.0 - 1e-6) * (self.r_max**2 - self.r_min**2)
        return ops.log(-0.5 * ops.log(size))

    def _theta_log(self, shape, dtype=None):
        return ops.log(self.max_phase * keras.random.uniform(shape, 1e-6, 1.0))

    def build(self, input_shape):
        inputs, states = input_shape[-1], self.state_dim
        self._nu = self.add_weight(name="nu_log", shape=(states,), initializer=self._nu_log)
        self._theta = self.add_weight(name="theta_log", shape=(states,), initializer=self._theta_log)
        size = np.exp(-np.exp(ops.convert_to_numpy(self._nu)))
        gamma = np.log(np.sqrt(np.maximum(1.0 - size**2, 1e-12)))
        self._gamma = self.add_weight(name="gamma_log", shape=(states,), initializer=lambda shape, dtype=None: ops.convert_to_tensor(gamma, dtype))
        output = DenseMML if self.fully_mml else keras.layers.Dense

        def normal(fan):
            return keras.initializers.RandomNormal(stddev=1.0 / math.sqrt(fan))

        def dense(kind, units, initializer, name, width):
            layer = kind(units, use_bias=self.use_bias, kernel_initializer=initializer, name=name)
            layer.build((None, width))
            return layer

        self._b_gate_re = dense(DenseMML, states, normal(2 * inputs), "B_re", inputs)
        self._b_gate_im = dense(DenseMML, states, normal(2 * inputs), "B_im", inputs)
        self._c_gate_re = dense(output, self.units, normal(states), "C_re", states)
        self._c_gate_im = dense(output, self.units, normal(states), "C_im", states)
        self._d_gate = dense(output, self.units, "glorot_normal", "D", inputs)
        self.built = True

    def call(self, inputs, states, training=False):
        nested = isinstance(states, (list, tuple))
        before = states[0] if nested else states
        re, im = before[:, 0], before[:, 1]
        size, phase = ops.exp(-ops.exp(self._nu)), ops.exp(self._theta)
        lambda_re, lambda_im, gamma = size * ops.cos(phase), size * ops.sin(phase), ops.exp(self._gamma)
        new_re = lambda_re * re - lambda_im * im + gamma * self._b_gate_re(inputs)
        new_im = lambda_re * im + lambda_im * re + gamma * self._b_gate_im(inputs)
        output = self._c_gate_re(new_re) - self._c_gate_im(new_im) + self._d_gate(inputs)
        state = ops.stack([new_re, new_im], axis=1)
        return output, [state] if nested else state

    def get_initial_state(self, batch_size=None):
        """Returns the state before the first step: zeros."""
        return [ops.zeros((batch_size, 2, self.state_dim), dtype=self.compute_dtype)]

    def get_config(self):
        names = ("units", "state_dim", "fully_mml", "r_min", "r_max", "max_phase", "use_bias")
        return super().get_config() | {name: getattr(self, name) for name in names}


@registered
class LRUMML(Recurrent):
    """``LRUCellMML`` over sequences ``(batch, steps, features)``, with the arguments of ``keras.layers.RNN``."""

    cell_class = LRUCellMML
    cell_arguments = ("units", "state_dim", "fully_mml", "r_min", "r_max", "max_phase", "use_bias")
