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
