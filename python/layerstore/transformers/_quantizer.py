"""The plug-in by which transformers' ``from_pretrained`` opens a model whose layers are in a store."""

from __future__ import annotations

import re

import torch

from .. import _native
from .._native import Snapshot
from ..errors import LayerstoreError
from ..torch import Embedding, Linear
from ._replace import replace_modules

_METHOD = "layerstore"

try:
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError:
    # Before transformers had a registry: `from_store` works all the same.
    HfQuantizer = QuantizationConfigMixin = object

    def register_quantization_config(method):
        return lambda made: made

    register_quantizer = register_quantization_config


@register_quantization_config(_METHOD)
class LayerstoreConfig(QuantizationConfigMixin):
    """Says which stored model's layers a model of transformers runs: the store's path or URI, the model's name there, and a snapshot's name or
    a version's number, the latest where it is not said.

    It is ``quantization_config`` for ``from_pretrained``, and the entry of that name in the ``config.json`` of a saved model.
    """

    def __init__(self, store: str, model: str, at: str | int | None = None, **others) -> None:
        others.pop("quant_method", None)
        if others:
            raise TypeError(f"LayerstoreConfig: found {sorted(others)}, expected store, model and at")
        self.quant_method = _METHOD
        self.store, self.model, self.at = str(store), str(model), at

    def snapshot(self) -> Snapshot:
        """Opens the version of the store."""
        store = _native.open(self.store)
        return store.latest() if self.at is None else store.at(self.at)


@register_quantizer(_METHOD)
class LayerstoreQuantizer(HfQuantizer):
    """Has a model's linear layers and embeddings run from a store, before its other parameters are read."""

    requires_calibration = False

    def validate_environment(self, *arguments, **keywords) -> None:
        device_map = keywords.get("device_map")
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if not {str(device) for device in devices} <= {"None", "cpu", "auto"}:
            raise ValueError(f"device_map: found {device_map!r}, expected the CPU, where stored layers run")

    def update_device_map(self, device_map):
        return {"": torch.device("cpu")} if device_map is not None else None

    def _process_model_before_weight_loading(self, model, **keywords):
        layers = self.quantization_config.snapshot().handles(self.quantization_config.model)
        replace_modules(model, layers, keywords.get("dtype") or torch.get_default_dtype())
        replaced = _replaced(model)
        for module in replaced.values():
            # Nothing of them is looked for in a checkpoint.
            module._left_out = True
        if not replaced:
            found, model_name = type(model).__name__, self.quantization_config.model
            raise LayerstoreError(f"model '{model_name}': found no layer of the names of {found}, expected the layers of such a model")
        # A whole checkpoint has dense weights of these layers, which are not read.
        unread = {rf"^(.*\.)?{re.escape(path)}\.(weight|bias)$" for path in replaced}
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or []) | unread
        tied = getattr(model, "all_tied_weights_keys", {})
        for parameter in [key for key in tied if key.rpartition(".")[0] in replaced]:
            del tied[parameter]

    def _process_model_after_weight_loading(self, model, **keywords):
        for module in _replaced(model).values():
            module._left_out = False
        return model

    def get_state_dict_and_metadata(self, model):
        """Returns the parameters that are not in the store."""
        return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}, {}

    def is_serializable(self, *arguments, **keywords) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _replaced(model) -> dict[str, Linear | Embedding]:
    return {path: module for path, module in model.named_modules() if isinstance(module, (Linear, Embedding))}


def attach(model, snapshot: Snapshot, name: str, at: str | int | None) -> None:
    """Says in a model's configuration where its layers are, so that what is saved of it opens again: at the snapshot that ``at`` names, which
    gc keeps, or at this version.
    """
    if HfQuantizer is object:
        return
    config = LayerstoreConfig(snapshot.uri, name, snapshot.version if at is None else at)
    model.hf_quantizer = LayerstoreQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
