"""Trained models put into a store."""

from __future__ import annotations

import os
import tempfile

from .._native import Module, Store


def freeze(model, store: Store, name: str, **options) -> Module:
    """Puts a model of Keras into a store as model ``name``, and returns it as it runs from there, without Keras.

    The model is a Sequential one, or one whose layers form a chain, of this package's layers and those of Keras that docs/matmul_free.md
    lists; another layer is an error that names it. ``options`` are ``Store.import_model``'s, such as ``rules`` for its float kernels.
    """
    if not model.built:
        raise ValueError(f"model '{model.name}': found one without weights, expected a built one: call it on inputs, or build it")
    with tempfile.TemporaryDirectory(prefix="layerstore-") as folder:
        path = os.path.join(folder, "model.keras")
        model.save(path)
        store.import_model(path, name, **options)
    return store.module(name, "model")
