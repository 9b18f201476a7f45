"""What is refused, with what was found and what was expected."""

import numpy as np
import pytest
from conftest import FIXTURES

import layerstore

LANGUAGE = FIXTURES / "language"


@pytest.fixture
def models(store):
    for name in ("llama", "qwen3"):
        store.import_model(LANGUAGE / name, name)
    return {name: store.language_model(name) for name in ("llama", "qwen3")}


def test_sessions_of_another_model_and_sessions_at_work(models):
    session = models["llama"].session()
    models["llama"].generate([1, 2, 3], max_tokens=2, session=session)
    with pytest.raises(ValueError, match="another model"):
        models["qwen3"].generate([1, 2, 3], max_tokens=2, session=session)
    model = models["llama"]
    with pytest.raises(ValueError, match="being gone on in"):
        model.generate([1, 2], session=session, stream=lambda text: model.generate([1], session=session))


@pytest.mark.parametrize("name, value", [("temperature", float("nan")), ("temperature", -1.0), ("top_p", 0.0), ("top_p", 5.0)])
def test_sampling(models, name, value):
    with pytest.raises(ValueError, match=name):
        models["llama"].generate([1, 2], max_tokens=1, **{name: value})


@pytest.mark.parametrize("features", [0, 2**40])
def test_widths_of_statistics(features):
    with pytest.raises(ValueError, match="features"):
        layerstore.Calibration(features)


def test_settings_that_there_are_not(filled):
    for wrong in ({"foo": 1}, {"rank": 3}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            filled.layer("int4", "blocks.0.mix").with_settings(wrong)


def test_what_verify_tells_may_raise(filled):
    def stop(done, total):
        raise LookupError("enough")

    with pytest.raises(LookupError):
        filled.verify(progress=stop)


@pytest.mark.parametrize("value", [None, {"b": 1}, "text"])
def test_dictionaries_of_what_are_no_tensors(store, value):
    with pytest.raises(TypeError, match="tensor 'a'"):
        store.import_model({"a": value}, "m")


def test_complex_numbers(filled):
    with pytest.raises(TypeError, match="complex"):
        filled.layer("dense", "blocks.0.mix")(np.ones((1, 48), np.complex64))


@pytest.mark.parametrize("covariance", [[[1.0, 2.0], [2.0, 1.0]], [[1.0, 0.5], [0.0, 1.0]], [[-1.0, 0.0], [0.0, 1.0]]])
def test_matrices_that_are_no_covariances(covariance):
    with pytest.raises(ValueError, match="positive semidefinite"):
        layerstore.Calibration.from_covariance(np.zeros(2), np.array(covariance))


def test_a_covariance_is_of_no_number_of_inputs():
    known = layerstore.Calibration.from_covariance(np.zeros(2), np.eye(2))
    assert known.tokens is None and "of a covariance" in repr(known)


@pytest.mark.parametrize("model, layer", [("keys", "blocks.0.mix"), ("int4", "blocks.0.mix")])
def test_parts_that_are_none(filled, model, layer):
    header, arrays = filled.layer(model, layer).to_parts()
    wide = [array.astype("f8") for array in arrays]
    with pytest.raises(ValueError, match="float64.*expected an array of"):
        layerstore.Layer.from_parts(header, wide)
    place = next(place for place, array in enumerate(arrays) if array.dtype == np.float32 and array.size)
    broken = [array.copy() for array in arrays]
    broken[place].flat[0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        layerstore.Layer.from_parts(header, broken)


def test_layers_that_do_not_fit_their_model(filled):
    layer = layerstore.compress(np.ones((3, 5), "f4"), method="ternary")
    version = filled.latest().version
    with pytest.raises(ValueError, match="blocks.0.mix.*shape of the layer"):
        filled.save_layers("int4", {"blocks.0.mix": layer})
    with pytest.raises(ValueError, match="none, expected one at least"):
        filled.save_layers("int4", {})
    assert filled.latest().version == version
    assert filled.save_layers("another", {"blocks.0.mix": layer}) > version


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "", "./x", "a//b"])
def test_files_that_would_lie_elsewhere(store, tensors, name):
    with pytest.raises(ValueError, match="name of a file"):
        store.import_model(tensors, "m", files={name: b"x"})
    assert store.models() == []


def test_what_is_likely_a_mistake_is_warned_of(store, tensors):
    calibration = {"nothing": np.ones((4, 8), "f4")}
    with pytest.warns(UserWarning, match="calibration of 'nothing'"):
        store.import_model(tensors, "m", calibration=calibration)
    with pytest.warns(UserWarning, match="rule at .* takes no layer"):
        store.import_model(tensors, "m", rules=[{"layers": "nothing", "method": "ternary"}])


def test_storage_options(tmp_path):
    with pytest.raises(layerstore.InvalidInputError, match='there is no storage option "acces_key"') as refused:
        layerstore.open("s3://bucket/models", storage_options={"acces_key": "hidden"})
    assert "hidden" not in str(refused.value)
    with pytest.raises(layerstore.InvalidInputError, match="storage options"):
        layerstore.create(tmp_path / "layers", storage_options={"region": "eu-north-1"})
