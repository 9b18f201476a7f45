"""Modules of PyTorch over stored layers."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from .. import _native
from .._native import Layer
from ._ops import Slot, run_plainly


class _OverLayer(nn.Module):
    """What modules over one layer share: the layer in a slot, which a ``state_dict`` holds as its parts or as a reference."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self._slot = Slot(layer)
        self._by_reference = False
        # Whether the layer is left out of a `state_dict`, by whoever knows it otherwise.
        self._left_out = False

    @property
    def layer(self) -> Layer:
        """The layer that the module runs."""
        return self._slot.layer

    def keep_by_reference(self, reference: bool = True):
        """Has ``state_dict`` hold where the layer is stored, in place of its arrays; returns the module."""
        if reference and self.layer.origin is None:
            raise ValueError("found a layer in memory, expected one of a store: there is nothing to refer to")
        self._by_reference = reference
        return self

    def get_extra_state(self):
        if self._by_reference:
            return {"reference": dict(self.layer.origin)}
        header, arrays = self.layer.to_parts()
        return {"header": header, "arrays": [torch.from_numpy(np.array(array)) for array in arrays]}

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if not self._left_out:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def set_extra_state(self, state) -> None:
        if "reference" in state:
            origin = state["reference"]
            snapshot = _native.open(origin["uri"]).at(origin["version"])
            layer = snapshot.layer(origin["model"], origin["layer"])
            if layer.origin["artifact"] != origin["artifact"]:
                expected = origin["artifact"]
                raise ValueError(f"layer {layer!r}: found artifact {layer.origin['artifact']}, expected {expected}")
        elif "header" not in state:
            raise ValueError(f"state of a layer: found {sorted(state)}, expected 'header' and 'arrays', or 'reference'")
        else:
            layer = Layer.from_parts(state["header"], [array.numpy() for array in state["arrays"]])
        self._check(layer)
        self._slot.layer = layer

    def _check(self, layer: Layer) -> None:
        if layer.shape != self.layer.shape:
            raise ValueError(f"found a layer of shape {layer.shape}, expected {self.layer.shape}")
        wanted = getattr(self, "method", None)
        if wanted is not None and layer.method != wanted:
            raise ValueError(f"{type(self).__name__}: found a {layer.method} layer, expected a {wanted} one")

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        _link(self)


class Linear(_OverLayer):
    """A stored layer in the place of ``nn.Linear``: ``y = x · Wᵀ + b`` for ``x`` ``[..., in_features]`` of f32, f16 or bf16.

    Gradients of inputs are those of the stored weight (straight-through). ``trainable(settings)`` adds gradients of the weight.
    """

    method: str | None = None

    def __init__(self, layer: Layer) -> None:
        if self.method is not None and layer.method != self.method:
            raise ValueError(f"{type(self).__name__}: found a {layer.method} layer, expected a {self.method} one")
        super().__init__(layer)
        self.out_features, self.in_features = layer.shape
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.settings: dict | None = None

    @classmethod
    def compress(cls, linear: nn.Linear, *, method: str | None = None, calibration=None, **settings):
        """Compresses an ``nn.Linear`` by a method and its settings, for inputs with the statistics of ``calibration``."""
        bias = None if linear.bias is None else linear.bias.detach()
        method = method or cls.method or "low_rank"
        layer = _native.compress(linear.weight.detach(), bias, method=method, calibration=calibration, **settings)
        return cls(layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._parameters["weight"] is not None:
            return torch.ops.layerstore.trained(x, self.weight, self.bias, self._slot.number)
        y = run_plainly(self._slot.layer, x)
        return torch.ops.layerstore.linear(x, self._slot.number, self.out_features) if y is None else y

    def trainable(self, *, calibration=None, **settings):
        """Gives the module a weight and a bias to be trained, which begin as the layer's; returns the module.

        Every forward pass runs the layer that compressing them by the layer's method makes, which is done anew when they have changed:
        optimizers and operations in place count, changes behind PyTorch's back (through ``.data`` or NumPy) do not.
        ``settings`` are those of rules; what is not said is as in the layer. Gradients pass straight through the compression.
        """
        self.weight = nn.Parameter(torch.from_numpy(self.layer.weight()))
        bias = self.layer.bias()
        self.bias = None if bias is None else nn.Parameter(torch.from_numpy(bias))
        self.settings = {"calibration": calibration, **settings}
        _link(self)
        if settings:
            # Settings that the method does not have are an error here, and not in the first forward pass.
            self._slot.follow(self.weight, self.bias, self._slot.recompress)
        else:
            self._slot.made_of(self.weight, self.bias)
        return self

    def frozen(self):
        """Takes weight and bias away again: the layer that they made last is what runs; returns the module."""
        if self.weight is not None:
            self._slot.follow(self.weight, self.bias, self._slot.recompress)
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        return self

    def extra_repr(self) -> str:
        return f"{self.layer.method}, in_features={self.in_features}, out_features={self.out_features}"


class KeyValueLinear(Linear):
    """A ``Linear`` whose output is retrieved: the values of the keys that match an input (AXL)."""

    method = "key_value"

    def search(self, x: torch.Tensor, **limit):
        """Returns the keys that each input uses, as ``Layer.search`` does."""
        return self.layer.search(x, **limit)


class LowRankLinear(Linear):
    """A ``Linear`` of quantised weights with a low-rank correction (LQER)."""

    method = "low_rank"


class TernaryLinear(Linear):
    """A ``Linear`` of ternary weights (the MatMul-free language model)."""

    method = "ternary"


class Embedding(_OverLayer):
    """A stored layer in the place of ``nn.Embedding``: rows by token, ``[...]`` to ``[..., features]``, of ``dtype``."""

    def __init__(self, layer: Layer, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(layer)
        self.num_embeddings, self.embedding_dim = layer.shape
        self.dtype = dtype

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.ops.layerstore.rows(indices, self._slot.number, self.embedding_dim).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.layer.method}, {self.num_embeddings}, {self.embedding_dim}"


class VQAttention(_OverLayer):
    """Attention by codebooks (Transformer-VQ) over heads: queries ``[batch, heads, tokens, d_k]``, keys and values of ``n_kv_head``.

    Gradients pass straight through codewords, with ``commitment`` times those of the commitment loss, which draws queries and keys to their
    codewords. Codebooks are trained by moving averages, ``learn``.
    """

    mechanisms: tuple[str, ...] = ("vq_qk", "vq_k")

    def __init__(self, layer: Layer) -> None:
        if layer.method != "vq_attention" or layer.config["mechanism"] not in self.mechanisms:
            found = layer.config.get("mechanism", layer.method)
            raise ValueError(f"{type(self).__name__}: found {found}, expected {' or '.join(self.mechanisms)}")
        super().__init__(layer)
        self.commitment = 0.0
        self._step = 0

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.ops.layerstore.attend(q, k, v, self._slot.number, self.commitment)

    @torch.no_grad()
    def learn(self, q: torch.Tensor, k: torch.Tensor) -> dict:
        """Runs a training step of the codebooks on queries and keys of the shapes that ``forward`` takes; returns what it measured."""
        flat = [x.transpose(1, 2).reshape(-1, x.shape[1] * x.shape[3]) for x in (q, k)]
        self._slot.layer, measured = _native.learn_codebooks(self.layer, *flat, self._step)
        self._step += 1
        return measured

    def _check(self, layer: Layer) -> None:
        for name in ("mechanism", "n_head", "d_k", "d_v", "n_code"):
            found, expected = layer.config.get(name), self.layer.config.get(name)
            if found != expected:
                raise ValueError(f"{name} of the attention: found {found}, expected {expected}")

    def extra_repr(self) -> str:
        config = self.layer.config
        return f"{config['mechanism']}, n_head={config['n_head']}"


class HyperAttention(VQAttention):
    """Attention to the keys of a query's own hash bucket and a sample of the others (HyperAttention), over heads as ``VQAttention``.

    It has no gradients: going back through it is an error.
    """

    mechanisms = ("hyper",)


def _link(module) -> None:
    """Tells the slot of a module that is trained how its layer is made anew."""
    settings, slot = getattr(module, "settings", None), module._slot
    if settings is None:
        return

    def recompress(weight, bias):
        return slot.layer.recompress(weight.detach(), None if bias is None else bias.detach(), **settings)

    slot.recompress = recompress
