"""The ternary dense layer, and the norm before it."""

from __future__ import annotations

import keras
import numpy as np
from keras import activations, constraints, initializers, ops, regularizers

from ..errors import InvalidInputError
from .._native import decode_ternary, encode_ternary
from ._checks import positive, registered

_SMALL, _LARGE = 1e-5, 1e9


@registered
class RMSNorm(keras.layers.Layer):
    """Divides inputs by their root mean square over the last axis, and multiplies by a gain for each position and feature."""

    def __init__(
        self,
        has_learnable_weights=True,
        use_bias=False,
        gain_initializer="ones",
        bias_initializer="zeros",
        gain_regularizer=None,
        bias_regularizer=None,
        gain_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.has_learnable_weights, self.use_bias = has_learnable_weights, use_bias
        self.gain_initializer, self.bias_initializer = map(initializers.get, (gain_initializer, bias_initializer))
        self.gain_regularizer, self.bias_regularizer = map(regularizers.get, (gain_regularizer, bias_regularizer))
        self.gain_constraint, self.bias_constraint = map(constraints.get, (gain_constraint, bias_constraint))
        self._gain = self._bias = self._width = None

    @property
    def scale(self):
        """The square root of the number of features."""
        if self._width is None:
            raise ValueError("Scale not available as layer has not been built")
        return self._width**0.5

    def build(self, input_shape):
        self._width = input_shape[-1]
        if self.has_learnable_weights:
            self._gain = self.add_weight(
                name="gain",
                shape=input_shape[1:],
                initializer=self.gain_initializer,
                regularizer=self.gain_regularizer,
                constraint=self.gain_constraint,
            )
            if self.use_bias:
                self._bias = self.add_weight(
                    name="bias",
                    shape=input_shape[1:],
                    initializer=self.bias_initializer,
                    regularizer=self.bias_regularizer,
                    constraint=self.bias_constraint,
                )
        self.built = True

    def call(self, inputs):
        length = ops.sqrt(ops.sum(ops.square(inputs), axis=-1, keepdims=True))
        # Inputs of all zeros stay zeros.
        y = inputs * ops.minimum(1.0 / ops.maximum(length, 1e-30), 1e7) * self.scale
        y = y if self._gain is None else y * self._gain
        return y if self._bias is None else y + self._bias

    def compute_output_shape(self, input_shape):
        return tuple(input_shape)

    def get_config(self):
        return super().get_config() | {
            "has_learnable_weights": self.has_learnable_weights,
            "use_bias": self.use_bias,
            "gain_initializer": initializers.serialize(self.gain_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "gain_regularizer": regularizers.serialize(self.gain_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "gain_constraint": constraints.serialize(self.gain_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
        }


def _straight(rounded, value):
    """``rounded``, whose gradient is that of ``value``."""
    return value + ops.stop_gradient(rounded - value)


@registered
class DenseMML(keras.layers.Layer):
    """A dense layer of ternary weights and 8-bit inputs: ``activation((x̃ · W̃) · γ + b)``, γ the mean size of the weights.

    Gradients pass straight through roundings. A layer that was read from a file has its ternary weights and their scale, stays as it is,
    and gives the same outputs however often it is saved and read.
    """

    def __init__(
        self,
        units,
        activation=None,
        use_bias=True,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        activity_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        super().__init__(activity_regularizer=activity_regularizer, **kwargs)
        self.units, self.use_bias = positive("units", units), use_bias
        self.activation = activations.get(activation) if activation is not None else None
        self.kernel_initializer, self.bias_initializer = map(initializers.get, (kernel_initializer, bias_initializer))
        self.kernel_regularizer, self.bias_regularizer = map(regularizers.get, (kernel_regularizer, bias_regularizer))
        self.kernel_constraint, self.bias_constraint = map(constraints.get, (kernel_constraint, bias_constraint))
        self.input_spec = keras.layers.InputSpec(min_ndim=2)
        self._kernel = self._bias = self._activation_norm = None
        # Of a layer that was read: its kernel is ternary already.
        self._kernel_scale = None

    def build(self, input_shape):
        self._activation_norm = RMSNorm()
        self._activation_norm.build(input_shape)
        self._kernel = self.add_weight(
            name="kernel",
            shape=(input_shape[-1], self.units),
            initializer=self.kernel_initializer,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )
        if self.use_bias:
            self._bias = self.add_weight(
                name="bias",
                shape=(self.units,),
                initializer=self.bias_initializer,
                regularizer=self.bias_regularizer,
                constraint=self.bias_constraint,
            )
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: input_shape[-1]})
        self.built = True

    @staticmethod
    def _compute_kernel_scale(kernel):
        return 1.0 / ops.clip(ops.mean(ops.abs(kernel)), _SMALL, _LARGE)

    @staticmethod
    def _quantize_kernel(kernel, scale):
        return ops.clip(ops.round(kernel * scale), -1.0, 1.0)

    def call(self, inputs):
        n = self._activation_norm(inputs)
        step = 127.0 / ops.clip(ops.max(ops.abs(n), axis=-1, keepdims=True), _SMALL, _LARGE)
        x = _straight(ops.clip(ops.round(n * step), -128.0, 127.0) / step, n)
        if self._kernel_scale is None:
            kernel = ops.convert_to_tensor(self._kernel)
            scale = self._compute_kernel_scale(kernel)
            weight = _straight(self._quantize_kernel(kernel, scale), kernel * scale)
        else:
            weight, scale = self._kernel, self._kernel_scale
        y = ops.matmul(x, weight) / scale
        y = y if self._bias is None else y + self._bias
        # Roundings are of f32 whatever the policy.
        y = ops.cast(y, self.compute_dtype)
        return y if self.activation is None else self.activation(y)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def save_own_variables(self, store):
        kernel = ops.convert_to_tensor(self._kernel)
        scale = self._compute_kernel_scale(kernel) if self._kernel_scale is None else self._kernel_scale
        weight = self._quantize_kernel(kernel, scale) if self._kernel_scale is None else kernel
        weight = ops.convert_to_numpy(weight).astype(np.int8)
        store["kernel_encoded"] = np.frombuffer(encode_ternary(weight.reshape(-1)), np.uint8)
        store["kernel_shape"] = np.array(weight.shape)
        store["kernel_scale"] = np.float32(ops.convert_to_numpy(scale))
        if self._bias is not None:
            store["bias"] = ops.convert_to_numpy(self._bias)

    def load_own_variables(self, store):
        wanted = ["kernel_encoded", "kernel_shape", "kernel_scale", *(["bias"] if self.use_bias else [])]
        missing = [name for name in wanted if name not in store]
        if missing:
            raise InvalidInputError(f"layer '{self.name}': found no {', '.join(missing)} in the file, expected what DenseMML saves")
        shape = tuple(int(length) for length in store["kernel_shape"][()])
        if shape != tuple(self._kernel.shape):
            raise InvalidInputError(f"layer '{self.name}': found a kernel of shape {shape}, expected {tuple(self._kernel.shape)}")
        encoded = np.asarray(store["kernel_encoded"][()], np.uint8).tobytes()
        self._kernel.assign(decode_ternary(encoded, shape[0] * shape[1]).reshape(shape).astype(np.float32))
        self._kernel_scale = float(store["kernel_scale"][()])
        self._kernel.trainable = False
        if self._bias is not None:
            self._bias.assign(store["bias"][()])

    def get_config(self):
        return super().get_config() | {
            "units": self.units,
            "activation": None if self.activation is None else activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "activity_regularizer": regularizers.serialize(self.activity_regularizer),
            "kernel_constraint": constraints.serialize(self.kernel_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
        }
