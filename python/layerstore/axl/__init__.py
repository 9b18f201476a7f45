"""AXL's interface over layerstore: ``ApproximateLinear`` and its configuration, by AXL's names.

A program written for AXL 1.0 changes its import lines: ``axl`` becomes ``layerstore.axl``. What is computed is layerstore's ``key_value``
layer; docs/axl.md says how that differs.
"""

from __future__ import annotations

from .config import ApproximateLinearConfig, BackendType, QuantizationType
from .layer import ApproximateLinear, create_backend

__all__ = ["ApproximateLinear", "ApproximateLinearConfig", "BackendType", "QuantizationType", "create_backend"]
