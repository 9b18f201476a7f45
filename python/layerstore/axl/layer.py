"""AXL's layer: an ``nn.Module`` whose output is retrieved by keys."""

from __future__ import annotations

import os
from typing import Any

try:
    import torch
except ImportError as _error:
    raise ImportError("layerstore.axl needs PyTorch: pip install 'layerstore[torch]'") from _error

from torch import nn

from .. import _native
from ..errors import InvalidInputError
from ..torch._ops import Slot
from .backends.base import FaissBackend, KVBackend, LayerBackend, NanoPQBackend
from .config import ApproximateLinearConfig, BackendType, QuantizationType, settings_of

__all__ = ["ApproximateLinear", "ApproximateLinearConfig", "BackendType", "QuantizationType", "create_backend"]

# What a folder of ``save_backend`` holds: a store of one model.
_MODEL, _LAYER, _WEIGHT = "backend", "layer", "weight"

_KINDS = {BackendType.FAISS: FaissBackend, BackendType.NANOPQ: NanoPQBackend}


def create_backend(config: ApproximateLinearConfig) -> KVBackend:
    """Makes an empty backend of the kind that a configuration names."""
    if config.backend not in _KINDS:
        raise ValueError(f"Unsupported backend type: {config.backend}")
    return _KINDS[config.backend]()


class ApproximateLinear(nn.Module):
    """A linear layer whose output is made of the values of those keys that match an input.

    Its weight can be trained before and after ``initialize``: a forward pass searches keys of the weight as it is, which are made anew when
    it has changed; gradients pass straight through. Inputs are ``[..., in_features]``; outputs are f32.
    """

    def __init__(self, in_features: int, out_features: int, config: ApproximateLinearConfig | None = None) -> None:
        super().__init__()
        if in_features <= 0 or out_features <= 0:
            raise ValueError(f"in_features and out_features must be positive, found {in_features} and {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self.config = ApproximateLinearConfig() if config is None else config
        self.device = torch.device(self.config.device)
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(out_features, in_features)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if self.config.use_bias else None
        self.register_buffer("whitening_matrix", torch.eye(in_features))
        self.register_buffer("key_scales", torch.ones(1))
        self._calibration: _native.Calibration | None = None
        self._reset()

    def _reset(self) -> None:
        self._slot: Slot | None = None
        self._settings: dict[str, Any] | None = None
        self.is_initialized = False
        self.search_threshold: float | None = None
        self.rank_kept = 0

    @property
    def layer(self) -> _native.Layer | None:
        """The stored layer that runs; ``None`` before ``initialize``."""
        return None if self._slot is None else self._slot.layer

    @property
    def backend(self) -> KVBackend | None:
        """The layer's keys and values; ``None`` before ``initialize``."""
        return None if self.layer is None else LayerBackend(self.layer, _KINDS[self.config.backend].__name__)

    def initialize(
        self, calibration_data: torch.Tensor | None = None, covariance_matrix: torch.Tensor | None = None
    ) -> None:
        """Makes the keys and values of the weight, for inputs ``[tokens, in_features]`` or of this covariance; without either, for inputs
        of unit covariance.

        Raises ``RuntimeError`` where that was done, and ``ValueError`` for inputs of another width.
        """
        if self.is_initialized:
            raise RuntimeError("Layer is already initialized")
        if covariance_matrix is not None:
            covariance = covariance_matrix.detach().float().cpu()
            if covariance.shape != (self.in_features, self.in_features):
                found = tuple(covariance.shape)
                raise ValueError(f"Covariance matrix must be square and match key dimension {self.in_features}, found {found}")
            calibration = _native.Calibration.from_covariance(torch.zeros(self.in_features), covariance)
        elif calibration_data is not None:
            if calibration_data.shape[-1] != self.in_features:
                found = calibration_data.shape[-1]
                raise ValueError(f"Calibration data must have {self.in_features} features, found {found}")
            calibration = _native.Calibration(self.in_features)
            calibration.update(calibration_data)
        else:
            eye = torch.eye(self.in_features)
            calibration = _native.Calibration.from_covariance(torch.zeros(self.in_features), eye)
        self._calibration = calibration
        self._hold(self._compressed(self.weight, self.bias))

    def _compressed(self, weight: torch.Tensor, bias: torch.Tensor | None) -> _native.Layer:
        settings = settings_of(self.config)
        bias = None if bias is None else bias.detach()

        def made() -> _native.Layer:
            return _native.compress(
                weight.detach(), bias, method="key_value", calibration=self._calibration, **settings
            )

        try:
            return made()
        except InvalidInputError:
            # Fewer keys than are asked for: all of them are used.
            if settings.pop("expected_keys_per_query") is None:
                raise
            return made()

    def _hold(self, layer: _native.Layer) -> None:
        slot = Slot(layer)
        slot.recompress = self._compressed
        slot.made_of(self.weight, self.bias)
        self._slot = slot
        self.rank_kept = len(layer.spectrum())
        self.key_scales = torch.from_numpy(layer.keys()[1].copy())
        self.search_threshold = float(layer.search([[0.0] * self.in_features])[0]["threshold"])
        self.is_initialized = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._slot is None:
            raise RuntimeError("Layer must be initialized before forward pass")
        y = torch.ops.layerstore.trained(x.float().cpu(), self.weight, self.bias, self._slot.number)
        return y.to(x.device)

    def to(self, device: str | torch.device) -> ApproximateLinear:
        """Sets the device that outputs are for; the layer itself computes on the CPU."""
        self.device = torch.device(device)
        self.config.device = device
        if self.device.type != "cpu":
            # There has to be such a device: torch says so.
            torch.empty(0, device=self.device)
        return self

    def save_backend(self, directory: str) -> None:
        """Writes keys, values and weight to a folder, which is a store of layerstore."""
        if self._slot is None:
            raise RuntimeError("Layer must be initialized before saving backend")
        layer = self._slot.follow(self.weight, self.bias, self._compressed)
        bias = None if self.bias is None else self.bias.detach()
        weight = _native.compress(self.weight.detach(), bias, method="dense")
        store = _native.create(directory)
        store.save_layers(_MODEL, {_LAYER: layer, _WEIGHT: weight})

    def load_backend(self, directory: str) -> None:
        """Reads what ``save_backend`` wrote: the layer gives the same outputs then.

        Raises ``FileNotFoundError`` where there is nothing, and ``ValueError`` for a layer of another shape.
        """
        if not os.path.isdir(directory):
            raise FileNotFoundError(f"Backend directory not found: {directory}")
        store = _native.open(directory)
        layer, weight = store.layer(_MODEL, _LAYER), store.layer(_MODEL, _WEIGHT)
        expected = (self.out_features, self.in_features)
        if layer.shape != expected:
            raise ValueError(f"{directory}: found a layer of shape {layer.shape}, expected {expected}")
        bias = weight.bias()
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(weight.weight()))
            if (bias is None) != (self.bias is None):
                self.bias = None if bias is None else nn.Parameter(torch.from_numpy(bias))
            elif bias is not None and self.bias is not None:
                self.bias.copy_(torch.from_numpy(bias))
        # The folder may go: what is needed is read now.
        layer.load()
        self._hold(layer)

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration as a dictionary."""
        return self.config.to_dict()

    def set_config(self, config: ApproximateLinearConfig) -> None:
        """Takes another configuration; the layer has to be initialized again."""
        self.config = config
        self.device = torch.device(config.device)
        self._reset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._slot is not None:
            self._slot.recompress = self._compressed

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.config.backend}"
