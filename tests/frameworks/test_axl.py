"""AXL's interface: its documents' examples, written anew, with the import line changed."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch

from layerstore.axl import ApproximateLinear, ApproximateLinearConfig, BackendType, QuantizationType, create_backend
from layerstore.axl import utils
from layerstore.axl.backends.base import KVBackend


@pytest.fixture(params=list(BackendType))
def config(request):
    return ApproximateLinearConfig(
        backend=request.param,
        energy_keep=0.999,
        expected_keys_per_query=16,
        faiss_clusters=64,
        nanopq_key_codewords=32,
        nanopq_value_codewords=32,
    )


@pytest.fixture
def layer(config):
    torch.manual_seed(0)
    layer = ApproximateLinear(in_features=64, out_features=48, config=config)
    with torch.no_grad():
        layer.bias.normal_()
    layer.initialize(calibration_data=torch.randn(500, 64))
    return layer


def test_a_layer_is_used_like_one_of_torch(layer):
    assert layer.is_initialized and layer.rank_kept > 0 and layer.search_threshold is not None
    assert layer.key_scales.shape == (layer.rank_kept,)
    x = torch.randn(10, 64)
    y, dense = layer(x), x @ layer.weight.T + layer.bias
    assert y.shape == (10, 48) and layer(x[0]).shape == (48,) and torch.isfinite(y).all()
    assert (y - dense).norm() < (dense - layer.bias).norm()
    info = layer.backend.get_info()
    assert info["is_fitted"] and (info["key_dim"], info["value_dim"], info["num_keys"]) == (64, 48, layer.rank_kept)
    ids = layer.backend.range_search_ip(x[0].numpy(), layer.search_threshold)
    assert layer.backend.reconstruct_values(ids).shape == (len(ids), 48)


def test_it_is_trained_straight_through(layer):
    layer.train()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x, target = torch.randn(64, 64), torch.zeros(64, 48)
    losses = []
    for _ in range(15):
        loss = torch.nn.functional.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and layer.weight.grad.abs().sum() > 0


def test_backends_are_saved_and_loaded(layer, config, tmp_path):
    layer.save_backend(str(tmp_path / "backend"))
    other = ApproximateLinear(64, 48, config)
    other.load_backend(str(tmp_path / "backend"))
    x = torch.randn(10, 64)
    assert torch.allclose(other(x), layer(x)) and other.is_initialized
    with pytest.raises(FileNotFoundError):
        other.load_backend(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="shape"):
        ApproximateLinear(32, 48, config).load_backend(str(tmp_path / "backend"))
    with pytest.raises(RuntimeError):
        ApproximateLinear(64, 48, config).save_backend(str(tmp_path / "x"))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), layer(x))


def test_what_is_refused(layer, config):
    with pytest.raises(RuntimeError, match="already initialized"):
        layer.initialize()
    fresh = ApproximateLinear(64, 48, config)
    with pytest.raises(RuntimeError, match="initialized before forward"):
        fresh(torch.randn(64))
    with pytest.raises(ValueError, match="64 features"):
        fresh.initialize(calibration_data=torch.randn(10, 65))
    with pytest.raises(ValueError, match="square"):
        fresh.initialize(covariance_matrix=torch.eye(63))
    for shape in ((0, 4), (4, -1)):
        with pytest.raises(ValueError, match="positive"):
            ApproximateLinear(*shape)
    fresh.initialize(covariance_matrix=torch.eye(64))
    assert fresh(torch.randn(3, 64)).shape == (3, 48)
    layer.set_config(ApproximateLinearConfig(energy_keep=0.8))
    assert not layer.is_initialized and layer.backend is None
    assert layer.to("cpu") is layer and layer.config.device == "cpu"


def test_configurations():
    config = ApproximateLinearConfig(backend=BackendType.NANOPQ, quantization=QuantizationType.SCALAR_QUANTIZATION)
    given = config.to_dict()
    assert given["backend"] == "nanopq" and given["quantization"] == "SQ" and len(given) == 22
    assert ApproximateLinearConfig.from_dict(json.loads(json.dumps(given))) == config
    for wrong in (
        {"energy_keep": 0.0},
        {"energy_keep": 1.1},
        {"min_singular_value": -1.0},
        {"ridge_regularization": -1.0},
        {"expected_keys_per_query": 0},
        {"max_ids_capacity": 0},
        {"faiss_clusters": 0},
        {"faiss_probe_clusters": 5000},
        {"nanopq_key_codewords": 0},
        {"nanopq_value_codewords": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ApproximateLinearConfig(**wrong)
    config.backend = "invalid"
    with pytest.raises(ValueError, match="Unsupported"):
        create_backend(config)


def test_backends_by_themselves(tmp_path):
    backend = create_backend(ApproximateLinearConfig())
    assert isinstance(backend, KVBackend) and not backend.get_info()["is_fitted"]
    with pytest.raises(RuntimeError):
        backend.range_search_ip(np.zeros(4), 0.5)
    keys, values = np.eye(4, dtype=np.float32), np.arange(8, dtype=np.float32).reshape(4, 2)
    backend.fit_keys(keys, np.arange(4))
    backend.fit_values(values, np.arange(4))
    assert backend.range_search_ip(np.array([1, 0.6, 0, -1]), 0.5).tolist() == [0, 1]
    backend.save(str(tmp_path))
    other = create_backend(ApproximateLinearConfig())
    other.load(str(tmp_path))
    assert other.get_info() == backend.get_info()
    np.testing.assert_array_equal(other.reconstruct_values([2, 1]), values[[2, 1]])
    with pytest.raises(ValueError):
        other.reconstruct_values([9])


def test_utilities():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((10, 8))
    u, s, v, keys = utils.svd_keys_values(weight)
    np.testing.assert_allclose(u @ keys, weight, atol=1e-5)
    assert u.dtype == s.dtype == v.dtype == keys.dtype == np.float32
    covariance = utils.estimate_covariance(rng.standard_normal((100, 8)), 8)
    inverse, whitened, scales = utils.whiten_standardize_keys(keys, covariance)
    x = rng.standard_normal(8).astype(np.float32)
    np.testing.assert_allclose((whitened * scales[:, None]) @ (inverse @ x), keys @ x, rtol=1e-3, atol=1e-4)
    for probability in (1e-6, 0.1, 0.5, 0.999):
        assert abs(utils.standard_normal_cdf(utils.inverse_standard_normal_cdf(probability)) - probability) < 1e-9
    with pytest.raises(ValueError):
        utils.inverse_standard_normal_cdf(0.0)
    with pytest.raises(ValueError):
        utils.compute_search_threshold(101, 100)
