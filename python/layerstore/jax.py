"""Stored layers in JAX: under ``jit``, ``vmap`` and ``grad``.

>>> from layerstore.jax import linear
>>> y = jax.jit(lambda x: linear(layer, x))(x)  # doctest: +SKIP
"""

from __future__ import annotations

import functools

try:
    import jax
    import jax.numpy as jnp
except ImportError as _error:
    raise ImportError("layerstore.jax needs JAX: pip install 'layerstore[jax]'") from _error

import numpy as np

from ._native import Layer

__all__ = ["linear", "rows"]


def _check(layer: Layer, x: jax.Array) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"input of a layer: found {x.dtype}, expected floats")
    if x.ndim == 0 or x.shape[-1] != layer.in_features:
        raise ValueError(f"width of the input: found shape {x.shape}, expected [..., {layer.in_features}]")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(layer: Layer, x: jax.Array) -> jax.Array:
    """Runs a layer on inputs ``[..., in_features]`` of any float dtype; ``[..., out_features]`` of the same.

    Gradients of inputs are those of the stored weight (straight-through). Under ``vmap`` all inputs go in one call.
    """
    _check(layer, x)
    shape = jax.ShapeDtypeStruct((*x.shape[:-1], layer.out_features), jnp.float32)

    def run(x: np.ndarray) -> np.ndarray:
        return layer(np.asarray(x))

    return jax.pure_callback(run, shape, x.astype(jnp.float32), vmap_method="broadcast_all").astype(x.dtype)


def _forward(layer: Layer, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return linear(layer, x), x


def _backward(layer: Layer, x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    def run(x: np.ndarray, grad: np.ndarray) -> np.ndarray:
        return layer.backward_input(np.asarray(x), np.asarray(grad))

    shape = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    arguments = (x.astype(jnp.float32), grad.astype(jnp.float32))
    return (jax.pure_callback(run, shape, *arguments, vmap_method="broadcast_all").astype(x.dtype),)


linear.defvjp(_forward, _backward)


def rows(layer: Layer, indices: jax.Array) -> jax.Array:
    """Returns rows of a layer's weight by token, ``[...]`` to ``[..., in_features]`` of f32: an embedding."""
    shape = jax.ShapeDtypeStruct((*indices.shape, layer.in_features), jnp.float32)

    def run(indices: np.ndarray) -> np.ndarray:
        return layer.rows(np.asarray(indices))

    return jax.pure_callback(run, shape, indices, vmap_method="broadcast_all")
