"""Layers by themselves and from a store."""

import copy
import pickle

import numpy as np
import pytest

import layerstore


def relative(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_outputs_of_any_leading_dimensions(filled, tensors, inputs):
    layer, x = filled.layer("dense", "blocks.0.up"), inputs["blocks.0.up"]
    expected = x @ tensors["blocks.0.up.weight"].T + tensors["blocks.0.up.bias"]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert layer(x[0]).shape == (96,)
    assert layer(x[:24].reshape(2, 3, 4, 48)).shape == (2, 3, 4, 96)
    assert layer(x[:0]).shape == (0, 96)
    np.testing.assert_array_equal(layer(x[::2]), layer(np.ascontiguousarray(x[::2])))
    np.testing.assert_array_equal(layer(np.asfortranarray(x)), layer(x))
    for other in (x.astype(np.float64), x.astype(np.float16), x.tolist()):
        np.testing.assert_allclose(layer(other), layer(x), atol=1e-2)
    frozen = x.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(layer(frozen), layer(x))


def test_what_does_not_fit_is_refused(filled):
    layer = filled.layer("int4", "blocks.0.mix")
    for wrong in (np.zeros((1, 47), np.float32), np.float32(1.0), np.full((1, 48), np.inf, np.float32)):
        with pytest.raises(ValueError):
            layer(wrong)
    with pytest.raises(TypeError):
        layer(np.array(["a"]))
    with pytest.raises(ValueError, match="key_value"):
        layer.search(np.zeros((1, 48), np.float32))


def test_a_layer_is_read_when_it_is_used(filled):
    layer = filled.layer("int4", "blocks.0.mix")
    assert not layer.is_loaded and layer.shape == (48, 48) and layer.method == "low_rank"
    assert layer.config["rank"] == 8 and layer.record["layer"] == "blocks.0.mix"
    assert not layer.is_loaded
    layer.load()
    assert layer.is_loaded and layer.memory_bytes > 0
    assert layer.origin["model"] == "int4" and layer.origin["uri"] == filled.uri


def test_exact_outputs_and_bounds(filled, inputs, tensors):
    x = inputs["blocks.0.mix"]
    dense = x @ tensors["blocks.0.mix.weight"].T
    layer = filled.layer("int4", "blocks.0.mix")
    assert relative(layer.forward(x, exact=True), dense) < 1e-6 < relative(layer(x), dense) < 0.2
    keys = filled.layer("keys", "blocks.0.mix")
    y, bound = keys.forward_with_bound(x, max_error=0.1)
    assert bound is not None and bound < 0.1 + 1e-6
    errors = np.linalg.norm(y - dense, axis=1) / np.linalg.norm(dense, axis=1)
    assert errors.max() <= bound + 1e-5


def test_search(filled, inputs):
    layer, x = filled.layer("keys", "blocks.0.mix"), inputs["blocks.0.mix"][:5]
    found = layer.search(x, keys=4)
    assert len(found) == 5 and found[0]["keys"].dtype == np.uint32
    for query, on_disk in zip(found, layer.search(x, keys=4, on_disk=True), strict=True):
        np.testing.assert_array_equal(query["keys"], on_disk["keys"])
    with pytest.raises(ValueError, match="more than one"):
        layer.search(x, keys=4, max_error=0.1)
    assert layer.key(0).shape == (48,)
    with pytest.raises(ValueError):
        layer.key(10_000)


@pytest.mark.parametrize("method, settings", [
    ("dense", {}),
    ("key_value", {"expected_keys_per_query": 8}),
    ("key_value", {"backend": {"type": "pq", "subvectors": 4, "codewords": 16}, "values": "int8"}),
    ("key_value", {"backend": {"type": "hnsw", "store_float_keys": True}}),
    ("low_rank", {"weight": {"type": "int4", "group": 16}, "rank": 4}),
    ("low_rank", {"weight": {"type": "nf4", "group": 16, "scales": "f16"}, "bias_correction": True}),
    ("ternary", {"rank": 4}),
])
def test_layers_made_here_are_pickled_bit_for_bit(method, settings, tensors, inputs, store):
    weight, x = tensors["blocks.0.up.weight"], inputs["blocks.0.up"]
    layer = layerstore.compress(weight, tensors["blocks.0.up.bias"], method=method, calibration=x, **settings)
    assert layer.method == method and layer.shape == (96, 48) and layer.name is None
    again = pickle.loads(pickle.dumps(layer))
    assert again.config == layer.config
    np.testing.assert_array_equal(again(x), layer(x))
    assert copy.deepcopy(layer) is layer
    store.save_layers("made", {"here": layer})
    stored = store.layer("made", "here")
    np.testing.assert_array_equal(stored(x), layer(x))
    assert stored.config == layer.config


def test_gradients_are_those_of_the_stored_weight(filled, inputs):
    layer, x = filled.layer("int4", "blocks.0.up"), inputs["blocks.0.up"][:7]
    grad = np.random.default_rng(0).standard_normal((7, 96)).astype(np.float32)
    gx, gw, gb = layer.backward(x, grad)
    np.testing.assert_allclose(gx, grad @ layer.weight(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gw, grad.T @ x, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gb, grad.sum(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layer.backward_input(x.reshape(7, 1, 48), grad.reshape(7, 1, 96))[:, 0], gx)


def test_settings_of_how_a_layer_runs(filled, inputs):
    layer, x = filled.layer("int4", "blocks.0.mix"), inputs["blocks.0.mix"]
    rounded = layer.with_settings({"activations": "int8"})
    assert 0 < relative(rounded(x), layer(x)) < 0.05
    with pytest.raises(ValueError):
        layer.with_settings({"activations": "int7"})


def test_embeddings_by_row(filled, tensors):
    layer = filled.layer("dense", "embedding")
    np.testing.assert_array_equal(layer.rows([[3, 1], [0, 63]]), tensors["embedding.weight"][[[3, 1], [0, 63]]])
    for wrong, error in (([64], ValueError), ([-1], IndexError), ([0.5], TypeError)):
        with pytest.raises(error):
            layer.rows(wrong)


def test_backends_by_themselves(tmp_path, tensors, inputs):
    layer = layerstore.compress(tensors["blocks.0.mix.weight"], method="key_value", calibration=inputs["blocks.0.mix"])
    layerstore.save_backend(layer, str(tmp_path / "one"))
    again = layerstore.load_backend(str(tmp_path / "one"))
    np.testing.assert_array_equal(again(inputs["blocks.0.mix"]), layer(inputs["blocks.0.mix"]))


def test_a_contiguous_input_is_not_copied_on_its_way_in(filled):
    """NumPy tells tracemalloc of every array that it makes: of 4 MB of f32 none is made, of f64 one is."""
    import tracemalloc

    layer, x = filled.layer("int4", "blocks.0.mix"), np.ones((20_000, 48), np.float32)
    layer(x)
    taken = {}
    for kind in (np.float32, np.float64):
        given = x.astype(kind)
        tracemalloc.start()
        layer(given)
        taken[kind] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert taken[np.float32] < 100_000 < x.nbytes <= taken[np.float64]


def test_vq_attention(inputs):
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 2, 32, 8)).astype(np.float32) for _ in range(3))
    exact = layerstore.exact_attention(q, k, v, causal=True)
    scores = np.where(np.tril(np.ones((32, 32))), q @ k.swapaxes(2, 3) / np.sqrt(8), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(exact, weights / weights.sum(-1, keepdims=True) @ v, atol=1e-5)
    settings = {"mechanism": "vq_k", "n_head": 2, "d_model": 16, "d_k": 8, "d_v": 8, "n_code": 16, "block_len": 8}
    flat = [x.swapaxes(1, 2).reshape(-1, 16) for x in (q, k)]
    layer = layerstore.vq_attention(settings, *flat)
    assert layer.method == "vq_attention"
    assert relative(layer.attend(q, k, v), exact) < 0.7
    trained, measured = layerstore.learn_codebooks(layer, *flat, 0)
    assert measured["key_commitment"] > 0 and trained.method == "vq_attention"
    assert np.array_equal(pickle.loads(pickle.dumps(trained)).attend(q, k, v), trained.attend(q, k, v))
