"""Stored layers as modules of PyTorch.

>>> from layerstore.torch import replace_linears
>>> replace_linears(model, store, "demo")  # doctest: +SKIP
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as _error:
    raise ImportError("layerstore.torch needs PyTorch: pip install 'layerstore[torch]'") from _error

from ._models import collect_statistics, commit, import_module, replace_linears
from ._modules import (
    Embedding,
    HyperAttention,
    KeyValueLinear,
    Linear,
    LowRankLinear,
    TernaryLinear,
    VQAttention,
)

__all__ = [
    "Embedding",
    "HyperAttention",
    "KeyValueLinear",
    "Linear",
    "LowRankLinear",
    "TernaryLinear",
    "VQAttention",
    "collect_statistics",
    "commit",
    "import_module",
    "replace_linears",
]
