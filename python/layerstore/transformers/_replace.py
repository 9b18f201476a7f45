"""Modules of a model of transformers replaced by those that run stored layers."""

from __future__ import annotations

import torch
from torch import nn

from .._native import Layer
from ..errors import InvalidInputError
from ..torch import Embedding, Linear


def replace_modules(model, layers: dict[str, Layer], dtype: torch.dtype) -> str:
    """Has a model's linear layers and embeddings run stored layers of their names, whatever the method; a head that has none of its own
    runs the embedding's. Returns what stands before the names of modules in the store.
    """
    prefix = prefix_of(model, layers)
    for path, module in list(model.named_modules()):
        layer = layers.get(prefix + path)
        if layer is None or not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        if layer.shape != tuple(module.weight.shape):
            raise InvalidInputError(f"layer '{prefix + path}': found {layer.shape}, expected {tuple(module.weight.shape)}")
        made = Linear(layer) if isinstance(module, nn.Linear) else Embedding(layer, dtype)
        if layer.origin is not None:
            made.keep_by_reference()
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, made.eval())
    _tie(model)
    return prefix


def prefix_of(model, layers) -> str:
    """What stands before the names of a model's modules in the store: nothing, or the base model's name, or less."""
    linears = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    base = getattr(model, "base_model_prefix", "")
    found = {prefix: sum(prefix + path in layers for path in linears) for prefix in ("", f"{base}." if base else "")}
    return max(found, key=lambda prefix: found[prefix])


def _tie(model) -> None:
    """Has a head that the store has no layer of its own for run the embedding's."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, nn.Linear) and head.weight.device.type == "meta" and isinstance(embedding, Embedding):
        tied = getattr(model.config, "tie_word_embeddings", False)
        if tied and tuple(head.weight.shape) == embedding.layer.shape:
            model.set_output_embeddings(Linear(embedding.layer).eval())


def values_of(layers, prefix: str, path: str):
    """The numbers of a parameter: a layer of its name, less ``.weight``, or the bias or own tensor of one."""
    owner, _, kind = (prefix + path).rpartition(".")
    if kind == "weight" and owner in layers:
        return layers[owner].values()
    if kind == "bias" and owner in layers:
        return layers[owner].bias()
    return layers[prefix + path].values() if prefix + path in layers else None
