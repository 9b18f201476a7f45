"""An embedded store for compressed neural-network layers, which run from it.

>>> import layerstore
>>> store = layerstore.create("layers")
>>> store.import_model("model.safetensors", "demo", rules="rules.toml")   # doctest: +SKIP
>>> store.layer("demo", "encoder.dense")(x)                                # doctest: +SKIP

``layerstore.torch`` has modules of PyTorch over stored layers, ``layerstore.transformers`` opens whole models with them.
"""

from __future__ import annotations

import os as _os

from . import errors
from ._native import (
    AttentionBlock,
    AttentionCache,
    Calibration,
    LanguageModel,
    Layer,
    Lease,
    Module,
    Session,
    Snapshot,
    Store,
    TextEncoder,
    after_fork as _after_fork,
    compress,
    create,
    decode_ternary,
    encode_ternary,
    exact_attention,
    learn_codebooks,
    load_backend,
    methods,
    open,
    save_backend,
    vq_attention,
    write_statistics,
)
from ._native import __version__
from .errors import (
    ConflictError,
    CorruptError,
    IncompatibleError,
    InvalidInputError,
    LayerstoreError,
    NotFoundError,
    StorageError,
)

__all__ = [
    "AttentionBlock",
    "AttentionCache",
    "Calibration",
    "ConflictError",
    "CorruptError",
    "IncompatibleError",
    "InvalidInputError",
    "LanguageModel",
    "Layer",
    "LayerstoreError",
    "Lease",
    "Module",
    "NotFoundError",
    "Session",
    "Snapshot",
    "StorageError",
    "Store",
    "TextEncoder",
    "__version__",
    "compress",
    "create",
    "decode_ternary",
    "encode_ternary",
    "errors",
    "exact_attention",
    "learn_codebooks",
    "load_backend",
    "methods",
    "open",
    "save_backend",
    "vq_attention",
    "write_statistics",
]

# Threads are not in a fork: what is asked for there is refused with a message, in place of a process that hangs.
if hasattr(_os, "register_at_fork"):
    _os.register_at_fork(after_in_child=_after_fork)
