"""What holds keys and values."""

from .base import FaissBackend, KVBackend, LayerBackend, NanoPQBackend

__all__ = ["FaissBackend", "KVBackend", "LayerBackend", "NanoPQBackend"]
