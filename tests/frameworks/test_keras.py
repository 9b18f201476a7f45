"""The layers of Keras-MatMulLess on Keras 3: outputs of the library itself, files, training, freezing. KERAS_BACKEND says on what."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")

import layerstore
import layerstore.keras as mml
from layerstore.errors import InvalidInputError

sys.path.append(str(Path(__file__).resolve().parents[1] / "python"))
from conftest import FIXTURES, read_safetensors

GOLDEN = FIXTURES / "golden/keras_mml"
CASES = [case for case in json.loads((GOLDEN / "index.json").read_text())["cases"] if hasattr(mml, case["layer"])]


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor)


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(0)


def built(case, tensors):
    """A layer of a case with its weights, and the arguments to call it with."""
    config = dict(case["config"])
    has_state = config.pop("initial_state", False)
    config.pop("dropout", None)
    layer = getattr(mml, case["layer"])(**config)
    x = next(value for name, value in tensors.items() if name.startswith("in.") and "state" not in name)
    layer.build(x.shape)
    # A sequence's cell is built by it.
    assert [list(weight.shape) for weight in layer.weights] == [entry["shape"] for entry in case["weight_order"]]
    layer.set_weights([tensors[entry["tensor"]] for entry in case["weight_order"]])
    return layer, x, tensors.get("in.initial_state") if has_state else None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"].removesuffix(".safetensors"))
def test_outputs_are_the_librarys(case):
    tensors = read_safetensors(GOLDEN / case["file"])
    layer, x, state = built(case, tensors)
    if "Cell" in case["layer"]:
        y, (after,) = layer(x, [tensors["in.state"]])
        found = {"out.y": y, "out.state": after}
    elif state is not None:
        found = layer(x, initial_state=[keras.ops.convert_to_tensor(state)])
    else:
        found = layer(x)
    if not isinstance(found, dict):
        found = dict(zip(("out.y", "out.state"), found if isinstance(found, (tuple, list)) else (found,), strict=False))
    for name, value in found.items():
        np.testing.assert_allclose(numpy(value), tensors[name], atol=2 * case["tolerance"][name]["abs"], err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["file"].removesuffix(".safetensors"))
def test_configurations_make_their_layers_again(case):
    layer, x, _ = built(case, read_safetensors(GOLDEN / case["file"]))
    config = layer.get_config()
    again = type(layer).from_config(json.loads(json.dumps(config)))
    assert again.get_config() == config
    assert keras.saving.get_registered_name(type(layer)) == f"keras_mml>{case['layer']}"


def classifier():
    return keras.Sequential(
        [
            keras.layers.Input((16,)),
            mml.DenseMML(32, activation="relu"),
            mml.SwiGLUMML(24, intermediate_size=32),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )


def sequence_model():
    return keras.Sequential(
        [
            keras.layers.Input((6,)),
            mml.TokenEmbedding(6, 20, 8, with_positions=True),
            mml.TransformerBlockMML(8, 16, 2),
            mml.GRUMML(8, num_heads=2, return_sequences=True),
            mml.LRUMML(5, 4),
        ]
    )


def data(count=512):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 16))
    labels = rng.integers(0, 3, count)
    return (centres[labels] + 0.4 * rng.standard_normal((count, 16))).astype("float32"), labels


def test_a_classifier_is_trained_and_frozen_into_a_store(tmp_path):
    x, labels = data()
    model = classifier()
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x, labels, epochs=12, batch_size=32, verbose=0)
    accuracy = model.evaluate(x, labels, verbose=0)[1]
    assert accuracy > 0.9
    store = layerstore.create(tmp_path / "layers")
    frozen = mml.freeze(model, store, "classifier", message="trained")
    np.testing.assert_allclose(frozen(x), model.predict(x, verbose=0), atol=1e-4)
    methods = {layer["method"] for layer in store.layers("classifier")}
    assert "ternary" in methods and store.log()[0]["message"] == "trained"
    assert (frozen(x).argmax(1) == labels).mean() == pytest.approx(accuracy, abs=0.01)


@pytest.mark.parametrize("make, x", [
    (classifier, np.random.default_rng(1).standard_normal((5, 16)).astype("float32")),
    (sequence_model, np.arange(12).reshape(2, 6) % 20),
])
def test_saved_and_loaded_again_it_is_the_same(make, x, tmp_path):
    model = make()
    before = model.predict(x, verbose=0)
    outputs = []
    for number in range(3):
        path = tmp_path / f"{number}.keras"
        model.save(path)
        model = keras.saving.load_model(path)
        outputs.append(model.predict(x, verbose=0))
    np.testing.assert_allclose(outputs[0], before, atol=1e-5)
    np.testing.assert_array_equal(outputs[1], outputs[0])
    np.testing.assert_array_equal(outputs[2], outputs[0])
    # What was read is no longer trained.
    ternary = [layer for layer in model.layers if isinstance(layer, mml.DenseMML)]
    assert all(not layer._kernel.trainable for layer in ternary)


def test_a_frozen_sequence_model_says_the_same(tmp_path):
    model, x = sequence_model(), np.arange(12).reshape(2, 6) % 20
    frozen = mml.freeze(model, layerstore.create(tmp_path / "layers"), "m")
    np.testing.assert_allclose(frozen(x.astype("float32")), model.predict(x, verbose=0), atol=1e-4)


@pytest.mark.parametrize("name", ["functional", "images", "tokens"])
def test_files_of_the_library_are_opened(name, tmp_path):
    """Models that the library itself saved, and what they said there."""
    expected = read_safetensors(FIXTURES / f"keras/{name}.safetensors")
    model = keras.saving.load_model(FIXTURES / f"keras/{name}.keras")
    found = model.predict(expected["x"], verbose=0)
    np.testing.assert_allclose(found, expected["y"], atol=1e-4)
    model.save(tmp_path / "again.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "again.keras").predict(expected["x"], verbose=0), found)


def test_a_layers_part_of_a_file_is_the_librarys():
    """What a file of the library holds of a layer: `dense_saved` has its datasets."""
    tensors = read_safetensors(GOLDEN / "dense_saved.safetensors")
    layer = mml.DenseMML(32, activation="relu")
    layer.build((None, 48))

    class Dataset:
        def __init__(self, value):
            self.value = value

        def __getitem__(self, key):
            return self.value

    names = ("kernel_encoded", "kernel_shape", "kernel_scale", "bias")
    layer.load_own_variables({name: Dataset(tensors[f"out.{name}"]) for name in names})
    layer._activation_norm.set_weights([tensors["w.norm_gain"]])
    np.testing.assert_allclose(numpy(layer(tensors["in.x"])), tensors["out.y_reloaded"], atol=2e-5)
    saved = {}
    layer.save_own_variables(saved)
    np.testing.assert_array_equal(saved["kernel_encoded"], tensors["out.kernel_encoded"])
    np.testing.assert_array_equal(saved["kernel_scale"], np.float32(tensors["out.kernel_scale"]))
    with pytest.raises(InvalidInputError, match="kernel_scale"):
        layer.load_own_variables({name: Dataset(tensors[f"out.{name}"]) for name in names if name != "kernel_scale"})


@pytest.mark.parametrize("make", [
    lambda: mml.DenseMML(0),
    lambda: mml.GLUMML(4, activation="tanh"),
    lambda: mml.GLUMML(-1),
    lambda: mml.SwiGLUMML(4, activation="nothing"),
    lambda: mml.GRUMML(4, num_heads=3),
    lambda: mml.GRUMML(0),
    lambda: mml.LRUMML(4, 0),
    lambda: mml.AttentionMML(0, 4),
    lambda: mml.AttentionMML(3, 4),
    lambda: mml.TransformerBlockMML(4, 8, 0),
    lambda: mml.TokenEmbedding(0, 4, 4),
    lambda: mml.PatchEmbedding(4, 0),
    lambda: mml.Patches(0),
    lambda: mml.RMSNorm().scale,
])
def test_what_is_refused(make):
    with pytest.raises(ValueError):
        make()


def test_layers_that_train_get_gradients():
    x = np.random.default_rng(2).standard_normal((64, 6, 4)).astype("float32")
    model = keras.Sequential(
        [keras.layers.Input((6, 4)), mml.AttentionMML(2, 8), mml.GRUMML(8, fully_mml=True), mml.GLUMML(1, intermediate_size=8)]
    )
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    target = x.mean((1, 2))[:, None]
    losses = model.fit(x, target, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < losses[0]


def test_arguments_that_are_none():
    for wrong in (2.5, "a", 0, True):
        with pytest.raises(ValueError, match="units"):
            mml.DenseMML(wrong)
    with pytest.raises(ValueError, match="expected a built one"):
        mml.freeze(keras.Sequential([mml.DenseMML(4)]), None, "m")


@pytest.mark.parametrize("policy", ["float16", "mixed_float16", "bfloat16"])
def test_outputs_are_of_the_policys_dtype(policy):
    layer = mml.DenseMML(4, dtype=policy)
    y = layer(np.random.default_rng(0).standard_normal((2, 8)).astype("f4"))
    assert keras.backend.standardize_dtype(y.dtype) == policy.removeprefix("mixed_")
