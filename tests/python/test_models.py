"""Language models and text encoders, run whole from Python."""

import json

import numpy as np
import pytest
from conftest import FIXTURES

import layerstore

LANGUAGE = FIXTURES / "language"


@pytest.fixture
def store(tmp_path):
    store = layerstore.create(tmp_path / "layers")
    for name in ("llama", "qwen3", "bert"):
        store.import_model(LANGUAGE / name, name)
    return store


def test_logits_and_texts_are_those_of_the_reference(store):
    references = json.loads((LANGUAGE / "references.json").read_text())
    for name in ("llama", "qwen3"):
        model, reference = store.language_model(name), references[name]
        logits = model.logits(reference["tokens"])
        np.testing.assert_allclose(logits[::5], reference["logits"], atol=1e-4)
        prompt, pieces = reference["tokens"][:9], []
        done = model.generate(prompt, max_tokens=12, cache="f32", exact=True, stream=pieces.append)
        assert done["tokens"] == reference["generated"] and "".join(pieces) == done["text"]
        both = model.generate_all([prompt, prompt], max_tokens=12, cache="f32", exact=True)
        assert [one["tokens"] for one in both] == [reference["generated"]] * 2


def test_sessions_go_on(store, tmp_path):
    model = store.language_model("llama")
    session = model.session(cache="f32")
    first = model.generate([1, 2, 3], max_tokens=4, session=session)
    assert session.tokens[:3] == [1, 2, 3]
    session.save(tmp_path / "session.safetensors")
    opened = model.open_session(tmp_path / "session.safetensors")
    assert opened.tokens == session.tokens
    again = model.generate([1, 2, 3], max_tokens=4, session=opened)
    assert again["tokens"] == first["tokens"] and again["cached_tokens"] == 2
    with pytest.raises(ValueError):
        store.language_model("qwen3").open_session(tmp_path / "session.safetensors")


def test_perplexity_and_divergence(store):
    rules = [{"layers": r"model\.layers\..*_proj", "method": "low_rank", "weight": {"type": "int4", "group": 16}}]
    store.import_model(LANGUAGE / "llama", "llama4", rules=rules)
    dense, four = store.language_model("llama"), store.language_model("llama4")
    tokens = list(range(1, 40))
    assert dense.perplexity(tokens, window=16, against=dense)["against"]["mean_kl"] < 1e-9
    assert four.perplexity(tokens, window=16, against=dense)["against"]["mean_kl"] > 1e-6
    assert four.memory_bytes < dense.memory_bytes


def test_what_a_callback_raises_comes_through(store):
    def stop(piece):
        raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        store.language_model("llama").generate([1, 2, 3], max_tokens=50, stream=stop)


def test_vectors_of_texts(store):
    encoder = store.encoder("bert")
    one, two = encoder.encode("hello"), encoder.encode(["hello", "a world"])
    assert one.shape == (encoder.features,) and two.shape == (2, encoder.features)
    np.testing.assert_allclose(two[0], one, atol=1e-5)
    assert not np.allclose(encoder.with_pooling("cls").encode("a world"), two[1])
    with pytest.raises(ValueError, match="'mean', 'cls' or 'last'"):
        encoder.with_pooling("max")


def test_files_of_a_model(store):
    assert json.loads(store.file("llama", "config.json"))["model_type"] == "llama"
    names = {file["name"] for file in store.show("llama")["files"]}
    assert "config.json" in names
    with pytest.raises(KeyError):
        store.file("llama", "nothing.json")
