"""The configuration of an ``ApproximateLinear``, and the settings of a ``key_value`` layer that it stands for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any


class BackendType(Enum):
    """What searches keys: ``FAISS`` is an inverted file with product quantisation, ``NANOPQ`` product quantisation alone."""

    FAISS = "faiss"
    NANOPQ = "nanopq"


class QuantizationType(Enum):
    """What values are kept as: codes of a product quantiser, or 8-bit numbers."""

    PRODUCT_QUANTIZATION = "PQ"
    SCALAR_QUANTIZATION = "SQ"


@dataclass
class ApproximateLinearConfig:
    """Settings by AXL's names and defaults. Raises ``ValueError`` for numbers out of their range."""

    backend: BackendType = BackendType.FAISS
    quantization: QuantizationType = QuantizationType.PRODUCT_QUANTIZATION
    energy_keep: float = 0.98
    min_singular_value: float = 0.0
    ridge_regularization: float = 1e-6
    expected_keys_per_query: int | None = 64
    max_ids_capacity: int = 200_000
    use_straight_through_estimator: bool = True
    use_approximate_inference: bool = True
    use_bias: bool = True
    device: Any = "cpu"
    faiss_clusters: int = 4096
    faiss_probe_clusters: int = 64
    faiss_key_subvectors: int = 8
    faiss_key_bits: int = 8
    faiss_value_subvectors: int = 8
    faiss_value_bits: int = 8
    faiss_use_gpu: bool = False
    nanopq_key_subvectors: int = 8
    nanopq_key_codewords: int = 256
    nanopq_value_subvectors: int = 8
    nanopq_value_codewords: int = 256

    def __post_init__(self) -> None:
        if not 0.0 < self.energy_keep <= 1.0:
            raise ValueError(f"energy_keep must be in (0.0, 1.0], found {self.energy_keep}")
        for name in ("min_singular_value", "ridge_regularization"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be non-negative, found {getattr(self, name)}")
        if self.expected_keys_per_query is not None and self.expected_keys_per_query <= 0:
            raise ValueError(f"expected_keys_per_query must be positive, found {self.expected_keys_per_query}")
        for name in ("max_ids_capacity", "faiss_clusters"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")
        if not 0 < self.faiss_probe_clusters <= self.faiss_clusters:
            found = f"found {self.faiss_probe_clusters} of {self.faiss_clusters}"
            raise ValueError(f"faiss_probe_clusters must be positive and <= faiss_clusters, {found}")
        for name in ("nanopq_key_codewords", "nanopq_value_codewords"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, found {getattr(self, name)}")

    def to_dict(self) -> dict[str, Any]:
        """Returns all settings as values of JSON."""
        found = dataclasses.asdict(self)
        return {**found, "backend": self.backend.value, "quantization": self.quantization.value, "device": str(self.device)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> ApproximateLinearConfig:
        """Makes a configuration of what ``to_dict`` gave; what is missing is as its default."""
        given = dict(config_dict)
        for name, kind in (("backend", BackendType), ("quantization", QuantizationType)):
            if name in given:
                given[name] = kind(given[name])
        return cls(**given)


def settings_of(config: ApproximateLinearConfig) -> dict[str, Any]:
    """Returns the settings of the ``key_value`` layer that a configuration stands for. What does not fit a layer's shape is adapted."""
    if config.backend is BackendType.FAISS:
        backend = {
            "type": "ivf_pq",
            "clusters": config.faiss_clusters,
            "probes": config.faiss_probe_clusters,
            "subvectors": config.faiss_key_subvectors,
            "bits": config.faiss_key_bits,
        }
        values = {"type": "pq", "subvectors": config.faiss_value_subvectors, "codewords": 2**config.faiss_value_bits}
    elif config.backend is BackendType.NANOPQ:
        backend = {
            "type": "pq",
            "subvectors": config.nanopq_key_subvectors,
            "codewords": config.nanopq_key_codewords,
        }
        values = {
            "type": "pq",
            "subvectors": config.nanopq_value_subvectors,
            "codewords": config.nanopq_value_codewords,
        }
    else:
        raise ValueError(f"Unsupported backend type: {config.backend}")
    return {
        "backend": backend,
        "values": "int8" if config.quantization is QuantizationType.SCALAR_QUANTIZATION else values,
        "decomposition": "svd",
        "energy_keep": config.energy_keep,
        "min_singular_value": config.min_singular_value,
        "ridge_regularization": config.ridge_regularization,
        "expected_keys_per_query": config.expected_keys_per_query,
        "max_ids_capacity": config.max_ids_capacity,
        "use_straight_through_estimator": config.use_straight_through_estimator,
        "use_approximate_inference": config.use_approximate_inference,
        "use_bias": config.use_bias,
        "on_misfit": "adapt",
    }
