"""The verbs of the store, as a notebook uses them."""

import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from conftest import FIXTURES

import layerstore

INT4 = {"layers": r"blocks\..*", "method": "low_rank", "weight": {"type": "int4", "group": 16}, "rank": 8}


def test_models_of_files_and_of_dictionaries_are_the_same(tmp_path, store, tensors, inputs):
    layerstore.create(tmp_path / "before").import_model(FIXTURES / "small.safetensors", "small")
    layerstore.open(tmp_path / "before").export("small", tmp_path / "f32.safetensors", dtype="f32")
    by_file = store.import_model(
        tmp_path / "f32.safetensors",
        "file",
        rules=[INT4],
        calibration=FIXTURES / "small-calibration.safetensors",
        message="from a file",
    )
    assert by_file["version"] == 2 and by_file["stored_bytes"] < by_file["dense_bytes"]
    store.import_model(tensors, "dictionary", rules=INT4, calibration=inputs)
    artifacts = {
        name: {layer["layer"]: layer["artifact"] for layer in store.layers(name)} for name in ("file", "dictionary")
    }
    assert artifacts["file"] == artifacts["dictionary"]
    assert [model["model"] for model in store.models()] == ["dictionary", "file"]
    assert store.log()[1]["message"] == "from a file"


def test_statistics_stand_for_inputs(store, tensors, inputs, tmp_path):
    statistics = {}
    for name, x in inputs.items():
        statistics[name] = layerstore.Calibration(x.shape[1])
        for part in np.array_split(x, 5):
            statistics[name].update(part)
        assert statistics[name].tokens == len(x)
        np.testing.assert_allclose(statistics[name].mean(), x.mean(0), atol=1e-6)
        np.testing.assert_allclose(statistics[name].covariance(), np.cov(x.T), atol=1e-6)
    report = store.import_model(tensors, "counted", rules=[INT4], calibration=statistics)
    assert {layer["error_basis"] for layer in report["layers"] if layer["method"] == "low_rank"} == {"activations"}
    layerstore.write_statistics(tmp_path / "s.safetensors", statistics)
    again = store.import_model(tensors, "counted", rules=[INT4], calibration=tmp_path / "s.safetensors")
    assert again["written_bytes"] == 0


def test_rules_of_every_form(store, tensors, tmp_path):
    text = "[[rule]]\nlayers = 'blocks.*'\nmethod = 'ternary'\n"
    (tmp_path / "rules.toml").write_text(text)
    for rules in (text, tmp_path / "rules.toml", str(tmp_path / "rules.toml"), {"rule": [{"layers": "blocks.*", "method": "ternary"}]}):
        plan = store.plan(tensors, rules=rules)
        assert {layer["method"] for layer in plan["layers"]} >= {"ternary"}
    with pytest.raises(layerstore.InvalidInputError, match="line 3"):
        store.plan(tensors, rules=text.replace("ternary", "quaternary"))
    assert store.models() == []


def test_versions(filled):
    filled.create_snapshot("first")
    assert filled.at("first").version == 4
    filled.remove_model("keys")
    assert [model["model"] for model in filled.models()] == ["dense", "int4"]
    assert len(filled.at("first").models()) == 3
    assert {layer["model"] for layer in filled.diff("first")["removed"]} == {"keys"}
    filled.rename_model("int4", "four")
    filled.restore("first")
    assert sorted(model["model"] for model in filled.models()) == ["dense", "int4", "keys"]
    assert [snapshot["name"] for snapshot in filled.snapshots()] == ["first"]
    filled.delete_snapshot("first")
    with pytest.raises(layerstore.NotFoundError):
        filled.at("first")
    assert not filled.gc(older_than=0)["applied"]
    assert filled.verify()["sound"] and filled.verify(depth="deep")["sound"]
    assert filled.stats()["models"] == 3


def test_measures(filled, inputs):
    found = filled.evaluate("int4", inputs, checkpoint=FIXTURES / "small.safetensors")
    assert len(found["layers"]) == 6 and 0 < found["mean_relative_error"] < 0.2
    compared = filled.latest().compare("int4", "keys")
    assert compared["layers"]
    nearest = filled.nearest(filled.layer("keys", "blocks.0.mix").key(0)[None], count=3)
    assert nearest[0][0]["layers"][0]["layer"] == "blocks.0.mix" and nearest[0][0]["cosine"] > 0.999
    assert filled.latest().shared("keys", "keys")


def test_exports_and_copies(filled, tmp_path, tensors):
    report = filled.export("dense", tmp_path / "out.safetensors")
    assert report["format"] == "safetensors"
    again = layerstore.create(tmp_path / "other")
    again.import_model(tmp_path / "out.safetensors", "again")
    np.testing.assert_array_equal(again.layer("again", "blocks.0.mix").weight(), tensors["blocks.0.mix.weight"])
    filled.latest().copy("int4", again)
    assert {model["model"] for model in again.models()} == {"again", "int4"}
    with pytest.raises(ValueError, match="format"):
        filled.export("dense", tmp_path / "x.safetensors", format="zip")


def test_errors_are_exceptions_by_kind(store, filled, tensors, tmp_path):
    with pytest.raises(KeyError, match="no model named 'nobody'") as caught:
        filled.layer("nobody", "x")
    assert str(caught.value).startswith("no model named")
    assert isinstance(caught.value, layerstore.LayerstoreError)
    with pytest.raises(layerstore.NotFoundError, match="blocks.0.mix"):
        filled.layer("int4", "blocks.0.mixx")
    with pytest.raises(ValueError, match="not a layer store"):
        layerstore.open(tmp_path / "nowhere")
    with pytest.raises(layerstore.ConflictError):
        filled.create_snapshot("a")
        filled.create_snapshot("a")
    with pytest.raises(ValueError, match="NaN"):
        store.import_model({"x.weight": np.full((4, 4), np.nan, np.float32)}, "bad")
    with pytest.raises(TypeError):
        store.import_model({"x": np.array(["a"])}, "bad")
    with pytest.raises(ValueError):
        store.import_model(3, "bad")


def test_progress_is_told_and_what_it_raises_comes_through(store, tensors):
    events = []
    store.import_model(tensors, "a", rules=[INT4], progress=events.append)
    assert events[0]["event"] == "started" and events[-1]["event"] == "finished"
    assert events[-1]["done"] == events[-1]["total"] == len(store.layers("a"))

    class Enough(Exception):
        pass

    def stop(event):
        if event["event"] == "done":
            raise Enough

    version = store.latest().version
    with pytest.raises(Enough):
        store.import_model(tensors, "b", rules=[{**INT4, "rank": 3}], progress=stop)
    assert store.latest().version == version


def test_ctrl_c_stops_an_import(tmp_path):
    code = """
import os, signal, sys, threading, numpy as np, layerstore
store = layerstore.create(sys.argv[1])
rng = np.random.default_rng(0)
tensors = {f"l{i}.weight": rng.standard_normal((1024, 1024), dtype=np.float32) for i in range(40)}
fired = threading.Event()
def told(event):
    if event["event"] == "done" and not fired.is_set():
        fired.set()
        os.kill(os.getpid(), signal.SIGINT)
try:
    store.import_model(tensors, "m", rules=[{"layers": ".*", "method": "low_rank", "rank": 32}], progress=told)
except KeyboardInterrupt:
    print("stopped", len(store.models()))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], capture_output=True, text=True)
    assert done.stdout.strip() == "stopped 0", done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_of_a_process_that_used_the_store_refuses(filled):
    layer = filled.layer("int4", "blocks.0.mix")
    layer(np.zeros((1, 48), np.float32))
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            layer(np.zeros((1, 48), np.float32))
            os.write(write, b"ran")
        except RuntimeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert b"forked" in os.read(read, 1000)
    os.close(read)


def test_threads_share_a_store(filled, inputs):
    layer, x = filled.layer("int4", "blocks.0.mix"), inputs["blocks.0.mix"]
    expected, found = layer(x), []

    def run():
        for _ in range(20):
            found.append(filled.layer("int4", "blocks.0.mix")(x))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and all(np.array_equal(y, expected) for y in found)


def test_stores_and_layers_are_shown(filled):
    assert repr(filled).startswith("<layerstore.Store at ")
    assert repr(filled.layer("int4", "blocks.0.mix")).startswith("<layerstore.Layer int4/blocks.0.mix: low_rank, 48 to 48, ")
    assert "<td>int4</td>" in filled._repr_html_() and "<td>int4</td>" in filled.latest()._repr_html_()
    assert "low_rank" in filled.layer("int4", "blocks.0.mix")._repr_html_()


def test_a_store_is_pickled_as_its_address(filled):
    assert len(pickle.loads(pickle.dumps(filled)).models()) == 3
