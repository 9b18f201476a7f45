"""Models of transformers whose layers run from a store.

>>> from layerstore.transformers import from_store
>>> model = from_store(store, "smollm2")  # doctest: +SKIP

``model.save_pretrained(folder)`` writes where the layers are, and the parameters that are none; with this module imported, transformers' own
``from_pretrained(folder)`` opens it again.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

try:
    import torch
    import transformers
except ImportError as _error:
    raise ImportError("layerstore.transformers needs PyTorch and transformers: pip install 'layerstore[transformers]'") from _error

from torch import nn

from .._native import Snapshot, Store
from ..errors import InvalidInputError, NotFoundError
from ._quantizer import LayerstoreConfig, attach
from ._replace import replace_modules, values_of

__all__ = ["LayerstoreConfig", "from_store", "tokenizer_from_store"]

# Files of a model that a tokenizer is made of.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "config.json",
)


def _snapshot(store: Store | Snapshot, at) -> Snapshot:
    if isinstance(store, Snapshot):
        if at is not None:
            raise ValueError(f"at: found {at!r} beside a snapshot, expected None")
        return store
    return store.latest() if at is None else store.at(at)


@contextlib.contextmanager
def _without_parameters():
    """Has modules that are made inside begin without numbers: their parameters are on ``meta``, buffers are as they are."""
    register = nn.Module.register_parameter

    def on_meta(module, name, parameter):
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def from_store(
    store: Store | Snapshot, name: str, *, at=None, dtype: torch.dtype = torch.float32, model_class=None
) -> transformers.PreTrainedModel:
    """Opens a stored model as one of transformers: its linear layers and embeddings run from the store, whatever their method, and dense
    copies of their weights are never made. What is neither, such as norms, is read as ``dtype``.

    The class is the one that the stored ``config.json`` names, or ``model_class``. Raises ``NotFoundError`` for parameters that the store
    does not have.
    """
    snapshot = _snapshot(store, at)
    layers = snapshot.handles(name)
    settings = json.loads(snapshot.file(name, "config.json"))
    settings.pop("quantization_config", None)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(settings))
        config = transformers.AutoConfig.from_pretrained(folder)
    model_class = model_class or _class_of(config, name)
    with _without_parameters():
        model = model_class._from_config(config) if hasattr(model_class, "_from_config") else model_class(config)
    model.eval()
    prefix = replace_modules(model, layers, dtype)
    missing = []
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.device.type != "meta":
            continue
        values = values_of(layers, prefix, path)
        if values is None:
            missing.append(path)
            continue
        parent, _, child = path.rpartition(".")
        tensor = torch.from_numpy(values).to(dtype).reshape(parameter.shape)
        setattr(model.get_submodule(parent), child, nn.Parameter(tensor, requires_grad=False))
    if missing:
        raise NotFoundError(f"model '{name}' has no layer for {', '.join(missing[:5])}, which {model_class.__name__} has")
    with contextlib.suppress(OSError):
        model.generation_config = transformers.GenerationConfig.from_model_config(config)
    attach(model, snapshot, name, at)
    return model


def tokenizer_from_store(store: Store | Snapshot, name: str, *, at=None):
    """Opens the tokenizer that is stored with a model, as one of transformers."""
    snapshot = _snapshot(store, at)
    with tempfile.TemporaryDirectory() as folder:
        for file in snapshot.show(name)["files"]:
            if file["name"] in _TOKENIZER:
                Path(folder, file["name"]).write_bytes(snapshot.file(name, file["name"]))
        return transformers.AutoTokenizer.from_pretrained(folder)


def _class_of(config, name: str):
    for architecture in config.architectures or []:
        found = getattr(transformers, architecture, None)
        if found is not None:
            return found
    raise InvalidInputError(f"model '{name}': found the architectures {config.architectures}, expected one of transformers")
