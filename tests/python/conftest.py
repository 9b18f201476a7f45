"""What the tests of the Python package share: the fixtures of the Rust tests, and a store of them."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

import layerstore

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def read_safetensors(path):
    """Reads a file of floats, as f32, and of integers."""
    data = Path(path).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        part = data[8 + length + begin : 8 + length + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(part, "<u2").astype("<u4") << 16).view("<f4")
        else:
            kinds = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "<i1"}
            values = np.frombuffer(part, kinds[entry["dtype"]])
        values = values if entry["dtype"].startswith("I") else values.astype("<f4")
        found[name] = values.reshape(entry["shape"]).copy()
    return found


@pytest.fixture(scope="session")
def tensors():
    return read_safetensors(FIXTURES / "small.safetensors")


@pytest.fixture(scope="session")
def inputs():
    return read_safetensors(FIXTURES / "small-calibration.safetensors")


@pytest.fixture
def store(tmp_path):
    return layerstore.create(tmp_path / "layers")


@pytest.fixture
def filled(store):
    """Model `dense` as it is, `keys` and `int4` compressed."""
    file, calibration = FIXTURES / "small.safetensors", FIXTURES / "small-calibration.safetensors"
    store.import_model(file, "dense")
    for name in ("keys", "int4"):
        store.import_model(file, name, rules=FIXTURES / f"{name}.toml", calibration=calibration)
    return store
