#!/usr/bin/env python3
"""Runs the Python of docs/notebooks.md on a store, and compares what it finds with what the command says of the same store.

page_check.py PAGE FOLDER, where FOLDER has what notebook_check.sh makes: the store `layers`; `models.json`; for each model
MODEL, `MODEL.safetensors`, as it is exported; and for each attention block NAME of the model `attention`, `NAME.npy`, its outputs
for the inputs `inputs.safetensors` of its projections.
"""

import argparse
import contextlib
import io
import json
import os
import re
import sys
from pathlib import Path

import duckdb
import numpy as np
import safetensors

# Sums of products in f32, in another order.
SUMS = 2e-6
# What an export rounds to.
ROUNDING = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}


def run(page, text):
    """Runs the page's blocks of Python, and returns what they have defined."""
    names = {}
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        # At its own lines, for tracebacks.
        lines = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines + block.group(1), str(page), "exec"), names)
    return names


def listed_columns(text):
    """The columns that the page's table of tables lists: by table, names and types in order."""
    tables = {}
    section = re.search(r"^## Tables\n(.*?)^## ", text, re.DOTALL | re.MULTILINE).group(1)
    for line in section.splitlines():
        row = re.match(r"\| (?:`(?P<table>[^`]+)`)? ?\| `(?P<column>\w+)` \| (?P<type>[\w \[\]]+) \|", line)
        if row:
            table = row["table"] or table
            tables.setdefault(table, []).append((row["column"], row["type"]))
    return tables


def stored_columns(store, open_table):
    """The columns that the store's tables have, by the page's names of tables."""
    tables = {}
    for path in sorted(Path(store).glob("*.lance")):
        found = open_table(path.stem)
        name = re.sub(r"_([dm])\d+$", r"_\1{\1}", path.stem)
        described = duckdb.sql("DESCRIBE found").fetchall()
        tables[name] = [(column, re.sub(r"\[\d+\]", f"[{name[-2]}]", kind)) for column, kind, *_ in described]
    return tables


def exported(folder, model):
    """The tensors of an exported model, by name: dtype, shape and bytes."""
    file = (folder / f"{model}.safetensors").read_bytes()
    return {name: (tensor["dtype"], tensor["shape"], tensor["data"]) for name, tensor in safetensors.deserialize(file)}


def check_weights(folder, page):
    """Compares each layer's rebuilt weight with the exported one, and returns how many there are by method."""
    counts, models = {}, {}
    for layer in page["catalogue"].itertuples():
        if layer.method not in page["REBUILD"]:
            continue
        models.setdefault(layer.model, exported(folder, layer.model))
        name = json.loads(layer.source)["tensors"][0]["tensor"]
        dtype, shape, raw = models[layer.model][name]
        expected = page["numbers"](raw, dtype).reshape(shape)
        found = page["REBUILD"][layer.method](layer)
        where = f"{layer.model} {layer.layer}, {layer.method}"
        assert found.shape == expected.shape, f"{where}: {found.shape}, exported {expected.shape}"
        if layer.method == "dense":
            assert found.tobytes() == expected.tobytes(), f"{where}: other bytes than those exported"
        else:
            limit = (SUMS + ROUNDING[dtype]) * np.abs(expected).max()
            apart = np.abs(found.astype(float) - expected).max()
            assert apart <= limit, f"{where}: {apart:e} apart, expected at most {limit:e}"
        counts[layer.method] = counts.get(layer.method, 0) + 1
    return counts


def check_attention(folder, page):
    """Compares what the page computes of each attention block with what the command computes."""
    weights = exported(folder, "attention")
    inputs = {name: tensor for name, tensor in safetensors.deserialize((folder / "inputs.safetensors").read_bytes())}
    blocks = [layer for layer in page["catalogue"].itertuples() if layer.method == "vq_attention"]
    for layer in blocks:
        config = json.loads(layer.config)

        def heads(projection):
            name = f"{layer.layer}.{config[projection]}"
            dtype, shape, raw = weights[f"{name}.weight"]
            x = page["numbers"](inputs[name]["data"], inputs[name]["dtype"]).reshape(inputs[name]["shape"])
            y = x.astype("f4") @ page["numbers"](raw, dtype).reshape(shape).astype("f4").T
            return y.reshape(len(y), config["n_head"], -1).transpose(1, 0, 2)

        found = page["attend"](layer, *map(heads, ("query", "key", "value")))
        found = found.transpose(1, 0, 2).reshape(found.shape[1], -1)
        expected = np.load(folder / f"{layer.layer}.npy")
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        for role in ("queries", "keys"):
            if role == "keys" or config["mechanism"] == "vq_qk":
                words, counts = page["codebook"](layer, role)
                shape = (config["n_head"], config["n_code"])
                assert words.shape == (*shape, config["d_k"]) and (counts == np.ones(shape)).all(), f"{layer.layer}: {role}"
    return len(blocks)


def main():
    parser = argparse.ArgumentParser(description="Run the code of a page; exit 1 if it fails or finds something else.")
    parser.add_argument("page", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    store = arguments.folder / "layers"
    os.environ["LAYERSTORE_URI"] = str(store)
    text = arguments.page.read_text()
    with contextlib.redirect_stdout(io.StringIO()):
        page = run(arguments.page, text)

    listed, there = listed_columns(text), stored_columns(store, page["table"])
    assert listed == there, f"columns on the page:\n{listed}\nin the store:\n{there}"

    models = {row["model"]: row for row in json.loads((arguments.folder / "models.json").read_text())}
    for row in page["sizes"].itertuples():
        known = models[row.model]
        found = (row.layers, row.dense_bytes, row.stored_bytes)
        assert found == tuple(known[name] for name in ("layers", "dense_bytes", "stored_bytes")), f"{row}\n{known}"
    assert len(page["sizes"]) == len(models)
    for name in ("shared", "worst", "packed_bytes", "spectra", "alike", "snapshots"):
        assert len(page[name]) > 0, f"{name} is empty"

    counts = check_weights(arguments.folder, page)
    counts["vq_attention"] = check_attention(arguments.folder, page)
    assert set(counts) == {*page["REBUILD"], "vq_attention"} and all(counts.values()), counts
    print(f"{arguments.page}: weights as exported of {', '.join(f'{n} {method}' for method, n in counts.items())} layers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
