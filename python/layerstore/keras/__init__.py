"""The layers of Keras-MatMulLess by their names, on Keras 3 with PyTorch or JAX behind it.

A program written for Keras-MatMulLess changes its import lines: ``keras_mml.layers`` becomes ``layerstore.keras``. Models are trained as any
of Keras; ``freeze`` puts one into a store, from where it runs without Keras. The layers are registered under Keras-MatMulLess's names, so
that its ``.keras`` files are opened, and it opens those that are saved here.
"""

from __future__ import annotations

try:
    import keras as _keras  # noqa: F401
except ImportError as _error:
    raise ImportError("layerstore.keras needs Keras 3 and a backend: pip install 'layerstore[keras,torch]'") from _error

from ._blocks import AttentionMML, TransformerBlockMML
from ._dense import DenseMML, RMSNorm
from ._embedding import PatchEmbedding, Patches, TokenEmbedding
from ._freeze import freeze
from ._glu import BilinearMML, GeGLUMML, GLUMML, ReGLUMML, SeGLUMML, SwiGLUMML
from ._gru import GRUCellMML, GRUMML
from ._lru import LRUCellMML, LRUMML

__all__ = [
    "AttentionMML",
    "BilinearMML",
    "DenseMML",
    "GLUMML",
    "GRUCellMML",
    "GRUMML",
    "GeGLUMML",
    "LRUCellMML",
    "LRUMML",
    "PatchEmbedding",
    "Patches",
    "RMSNorm",
    "ReGLUMML",
    "SeGLUMML",
    "SwiGLUMML",
    "TokenEmbedding",
    "TransformerBlockMML",
    "freeze",
]
