"""layerstore.jax: layers under jit, vmap and grad."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp

import layerstore
from layerstore.jax import linear, rows


@pytest.fixture
def layer():
    weight = np.random.default_rng(0).standard_normal((12, 24)).astype(np.float32)
    return layerstore.compress(weight, np.arange(12, dtype=np.float32), weight={"type": "int8", "group": 8}, rank=2)


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(0), (2, 3, 24))


def test_outputs_are_the_layers(layer, x):
    expected = layer(np.asarray(x))
    np.testing.assert_array_equal(linear(layer, x), expected)
    np.testing.assert_allclose(jax.jit(lambda x: linear(layer, x))(x), expected, atol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda x: linear(layer, x))(x), expected, atol=1e-5)
    assert linear(layer, x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="24"):
        linear(layer, x[..., :5])


def test_gradients_pass_straight_through(layer, x):
    grad = jax.grad(lambda x: (linear(layer, x) ** 2).sum())(x)
    np.testing.assert_allclose(grad, 2 * layer(np.asarray(x)) @ layer.weight(), rtol=1e-3, atol=1e-3)
    batched = jax.jit(jax.vmap(jax.grad(lambda x: linear(layer, x).sum())))(x)
    np.testing.assert_allclose(batched, np.broadcast_to(layer.weight().sum(0), x.shape), rtol=1e-3, atol=1e-3)


def test_rows(layer):
    indices = jnp.array([[3, 1], [0, 11]])
    np.testing.assert_array_equal(jax.jit(lambda i: rows(layer, i))(indices), layer.weight()[np.asarray(indices)])
