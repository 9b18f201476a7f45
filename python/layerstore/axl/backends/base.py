"""Backends: keys by number that a query is searched among, and the values that belong to them."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..._native import Layer


class KVBackend(abc.ABC):
    """Keys ``[keys, key_dim]`` and values ``[keys, value_dim]`` by number."""

    @abc.abstractmethod
    def fit_keys(self, K_tilde: np.ndarray, ids: np.ndarray, **kwargs: Any) -> None:
        """Takes keys and their numbers."""

    @abc.abstractmethod
    def fit_values(self, U_cols: np.ndarray, ids: np.ndarray, **kwargs: Any) -> None:
        """Takes values and their numbers."""

    @abc.abstractmethod
    def range_search_ip(self, z: np.ndarray, threshold: float) -> np.ndarray:
        """Returns the numbers of the keys whose inner product with a query is ``threshold`` or more."""

    @abc.abstractmethod
    def reconstruct_values(self, ids: Sequence[int]) -> np.ndarray:
        """Returns the values of these numbers."""

    @abc.abstractmethod
    def refine_scores(self, ids: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Returns the inner products of a query with the keys of these numbers."""

    @abc.abstractmethod
    def save(self, directory: str) -> None:
        """Writes the backend to a folder."""

    @abc.abstractmethod
    def load(self, directory: str) -> None:
        """Reads what ``save`` wrote."""

    @abc.abstractmethod
    def get_info(self) -> dict[str, Any]:
        """Returns ``is_fitted``, ``key_dim``, ``value_dim``, ``num_keys`` and ``backend_type``."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Forgets keys and values."""


class _Arrays(KVBackend):
    """Keeps vectors as they are, and scans all of them: exact. The indices that a layer searches by are made with the layer."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._keys: dict[int, np.ndarray] = {}
        self._values: dict[int, np.ndarray] = {}

    @staticmethod
    def _rows(rows: np.ndarray, ids: np.ndarray, what: str) -> dict[int, np.ndarray]:
        rows = np.asarray(rows, np.float32)
        if rows.ndim != 2 or len(rows) != len(ids):
            raise ValueError(f"{what}: found shape {rows.shape} for {len(ids)} numbers, expected [numbers, width]")
        return {int(number): row for number, row in zip(ids, rows, strict=True)}

    def fit_keys(self, K_tilde: np.ndarray, ids: np.ndarray, **kwargs: Any) -> None:
        self._keys = self._rows(K_tilde, ids, "keys")

    def fit_values(self, U_cols: np.ndarray, ids: np.ndarray, **kwargs: Any) -> None:
        if not self._keys:
            raise ValueError("found no keys, expected fit_keys before fit_values")
        self._values = self._rows(U_cols, ids, "values")

    def _fitted(self) -> None:
        if not self._keys:
            raise RuntimeError("Backend must be fitted before use")

    def range_search_ip(self, z: np.ndarray, threshold: float) -> np.ndarray:
        self._fitted()
        numbers = np.array(list(self._keys))
        return numbers[self.refine_scores(numbers, z) >= threshold]

    def _of(self, rows: dict[int, np.ndarray], ids: Sequence[int]) -> np.ndarray:
        unknown = [int(number) for number in ids if int(number) not in rows]
        if unknown:
            raise ValueError(f"found the numbers {unknown}, expected some of {len(rows)} known ones")
        width = len(next(iter(rows.values()))) if rows else 0
        return np.array([rows[int(number)] for number in ids], np.float32).reshape(len(ids), width)

    def reconstruct_values(self, ids: Sequence[int]) -> np.ndarray:
        self._fitted()
        return self._of(self._values, ids)

    def refine_scores(self, ids: np.ndarray, z: np.ndarray) -> np.ndarray:
        self._fitted()
        return self._of(self._keys, ids) @ np.asarray(z, np.float32)

    def save(self, directory: str) -> None:
        self._fitted()
        Path(directory).mkdir(parents=True, exist_ok=True)
        arrays = {}
        for name, rows in (("keys", self._keys), ("values", self._values)):
            arrays[f"{name}_ids"] = np.array(list(rows), np.int64)
            arrays[name] = np.array(list(rows.values()), np.float32)
        np.savez(Path(directory) / "backend.npz", **arrays)

    def load(self, directory: str) -> None:
        path = Path(directory) / "backend.npz"
        if not path.is_file():
            raise FileNotFoundError(f"Backend directory not found: {directory}")
        with np.load(path) as arrays:
            self._keys = self._rows(arrays["keys"], arrays["keys_ids"], "keys")
            self._values = self._rows(arrays["values"], arrays["values_ids"], "values") if len(arrays["values_ids"]) else {}

    def get_info(self) -> dict[str, Any]:
        def width(rows: dict[int, np.ndarray]) -> int | None:
            return len(next(iter(rows.values()))) if rows else None

        return {
            "is_fitted": bool(self._keys),
            "key_dim": width(self._keys),
            "value_dim": width(self._values),
            "num_keys": len(self._keys),
            "backend_type": type(self).__name__,
        }


class FaissBackend(_Arrays):
    """What AXL's configuration calls ``FAISS``, by itself."""


class NanoPQBackend(_Arrays):
    """What AXL's configuration calls ``NANOPQ``, by itself."""


class LayerBackend(KVBackend):
    """The keys and values of a ``key_value`` layer, which were made with it."""

    def __init__(self, layer: Layer, kind: str) -> None:
        self.layer = layer
        self._kind = kind

    def _made(self) -> RuntimeError:
        return RuntimeError("the keys of a layer are made with it: initialize a layer, or make a backend by itself")

    def fit_keys(self, K_tilde: np.ndarray, ids: np.ndarray, **kwargs: Any) -> None:
        raise self._made()

    def fit_values(self, U_cols: np.ndarray, ids: np.ndarray, **kwargs: Any) -> None:
        raise self._made()

    def load(self, directory: str) -> None:
        raise self._made()

    def reset(self) -> None:
        raise self._made()

    def range_search_ip(self, z: np.ndarray, threshold: float) -> np.ndarray:
        """Returns the keys of a query, an input ``[in_features]``, by the layer's own ranking."""
        return self.layer.search(z, threshold=threshold)[0]["keys"]

    def reconstruct_values(self, ids: Sequence[int]) -> np.ndarray:
        return self.layer.keys()[2][np.asarray(ids, np.int64)]

    def refine_scores(self, ids: np.ndarray, z: np.ndarray) -> np.ndarray:
        return self.layer.keys()[0][np.asarray(ids, np.int64)] @ np.asarray(z, np.float32)

    def save(self, directory: str) -> None:
        from ..._native import save_backend

        save_backend(self.layer, directory)

    def get_info(self) -> dict[str, Any]:
        return {
            "is_fitted": True,
            "key_dim": self.layer.in_features,
            "value_dim": self.layer.out_features,
            "num_keys": len(self.layer.spectrum()),
            "backend_type": self._kind,
        }
