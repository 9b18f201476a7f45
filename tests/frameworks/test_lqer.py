"""LQER-Qwix's interface over flax."""

import numpy as np
import pytest

jax = pytest.importorskip("jax")
nn = pytest.importorskip("flax.linen")

import jax.numpy as jnp

import layerstore
import layerstore.lqer as qwix
from layerstore.lqer import LqerProvider, LqerRule, LqerWeight, lqer_quantize_params


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(64, use_bias=False)(x))
        return nn.Dense(10)(nn.LayerNorm()(x))


@pytest.fixture
def model():
    return Perceptron()


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (5, 16))


@pytest.fixture
def params(model, x):
    return model.init(jax.random.key(0), x)["params"]


def error(model, params, rules, x):
    quantized = qwix.quantize_model(model, LqerProvider(rules))
    found = quantized.apply({"params": lqer_quantize_params(params, rules)}, x)
    exact = model.apply({"params": params}, x)
    return float(jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact))


def test_the_steps_of_its_example(model, params, x):
    rules = [LqerRule(module_path=".*", weight_qtype=jnp.int4, rank=16)]
    lqer_model = qwix.quantize_model(model, LqerProvider(rules))
    temporary = qwix.quantize_model(model, qwix.PtqProvider(rules))
    abstract = jax.eval_shape(temporary.init, jax.random.key(0), x)["params"]
    lqer_params = lqer_quantize_params(params, abstract, rules)
    assert isinstance(lqer_params["Dense_0"]["kernel"], LqerWeight)
    assert lqer_params["Dense_1"]["bias"] is params["Dense_1"]["bias"]
    output = lqer_model.apply({"params": lqer_params}, x)
    assert output.shape == (5, 10)
    # The correction of the first kernel is of full rank, that of the second of rank 10.
    np.testing.assert_allclose(output, model.apply({"params": params}, x), atol=1e-4)
    np.testing.assert_allclose(jax.jit(lqer_model.apply)({"params": lqer_params}, x), output, atol=1e-4)


def test_errors_fall_with_the_rank_and_the_bits(model, params, x):
    errors = [
        error(model, params, [LqerRule(module_path=".*", weight_qtype=f"int{bits}", rank=rank)], x)
        for bits, rank in ((3, 0), (4, 0), (4, 4), (8, 0))
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02 < errors[0]


def test_codes_are_those_of_symmetric_channels(params):
    rules = [LqerRule(module_path="Dense_0", weight_qtype=jnp.int8, rank=0, tile_size=8)]
    kernel = lqer_quantize_params(params, rules)["Dense_0"]["kernel"]
    assert kernel.layer.config["weight"]["group"] == 8 and kernel.shape == (16, 64)
    np.testing.assert_allclose(kernel.dequantized(), params["Dense_0"]["kernel"], atol=0.02)


def test_gradients_reach_what_is_not_quantised(model, params, x):
    rules = [LqerRule(module_path="Dense_0", weight_qtype=jnp.int8, rank=4)]
    quantized = qwix.quantize_model(model, LqerProvider(rules))
    lqer_params = lqer_quantize_params(params, rules)

    def loss(bias):
        changed = {**lqer_params, "Dense_1": {**lqer_params["Dense_1"], "bias": bias}}
        return quantized.apply({"params": changed}, x).sum()

    np.testing.assert_allclose(jax.grad(loss)(params["Dense_1"]["bias"]), np.full(10, 5.0), atol=1e-5)
    gradient = jax.grad(lambda x: quantized.apply({"params": lqer_params}, x).sum())(x)
    assert gradient.shape == x.shape and jnp.abs(gradient).sum() > 0


def test_parameters_are_kept_in_a_store(model, params, x, tmp_path):
    store = layerstore.create(tmp_path / "layers")
    rules = [LqerRule(module_path="Dense_.*", weight_qtype=jnp.int4, rank=8)]
    lqer_params = lqer_quantize_params(params, rules, store=store, name="perceptron")
    layers = {layer["layer"]: layer["method"] for layer in store.layers("perceptron")}
    assert layers["Dense_0"] == "low_rank" and layers["LayerNorm_0.scale"] == "dense"
    assert lqer_params["Dense_0"]["kernel"].layer.origin["model"] == "perceptron"
    quantized = qwix.quantize_model(model, LqerProvider(rules))
    stored = quantized.apply({"params": lqer_params}, x)
    np.testing.assert_array_equal(stored, quantized.apply({"params": lqer_quantize_params(params, rules)}, x))


def test_what_is_refused(model, params):
    for wrong in ({"weight_qtype": "int9"}, {"rank": -1}, {"weight_qtype": "int4", "tile_size": 0}):
        with pytest.raises(ValueError):
            LqerRule(**wrong)
    with pytest.raises(TypeError):
        LqerRule(".*")
    with pytest.raises(TypeError):
        lqer_quantize_params(params)
    with pytest.raises(ValueError, match="Dense_0"):
        lqer_quantize_params(params, [LqerRule(module_path="Nothing", weight_qtype="int4")])
    with pytest.raises(TypeError):
        qwix.quantize_model(3, LqerProvider([]))
    with pytest.raises(ValueError, match="rank"):
        LqerRule(rank="a")
    for wrong in ("abc", ["abc"], LqerRule):
        with pytest.raises(TypeError, match="LqerRule"):
            lqer_quantize_params(params, wrong)


def test_dense_general(x):
    class Heads(nn.Module):
        axis: int = -1

        @nn.compact
        def __call__(self, x):
            return nn.DenseGeneral(6, axis=self.axis)(x)

    params = Heads().init(jax.random.PRNGKey(0), x)["params"]
    rules = [LqerRule(weight_qtype="int8", rank=0)]
    quantized = lqer_quantize_params(params, rules)
    y = qwix.quantize_model(Heads(), LqerProvider(rules)).apply({"params": quantized}, x)
    np.testing.assert_allclose(y, Heads().apply({"params": params}, x), atol=0.05)
    with pytest.raises(TypeError, match="over axis 0"):
        qwix.quantize_model(Heads(axis=0), LqerProvider(rules)).apply({"params": quantized}, x.T)
