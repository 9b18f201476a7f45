"""The operators of PyTorch: a layer by the number of its slot, with fake kernels and gradients, so that ``torch.compile`` and autograd
know them."""

from __future__ import annotations

import itertools
import threading
import weakref

import numpy as np
import torch

from .._native import Layer

_numbers = itertools.count()
_slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()


class Slot:
    """Holds a module's layer under a number that operators know it by."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.number = next(_numbers)
        self._made_of = None
        self._lock = threading.Lock()
        _slots[self.number] = self

    def __deepcopy__(self, memo) -> Slot:
        # The layer does not change: a copy shares it, but may be given another one.
        copy = Slot(self.layer)
        memo[id(self)] = copy
        return copy

    def __reduce__(self):
        return Slot, (self.layer,)

    @staticmethod
    def _state(weight: torch.Tensor, bias: torch.Tensor | None):
        return (weight.data_ptr(), weight._version, None if bias is None else (bias.data_ptr(), bias._version))

    def made_of(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Says that the layer is that of these weights."""
        self._made_of = self._state(weight, bias)

    def follow(self, weight: torch.Tensor, bias: torch.Tensor | None, recompress) -> Layer:
        """Returns the layer of these weights, which is made anew where they have changed."""
        state = self._state(weight, bias)
        with self._lock:
            if self._made_of != state:
                self.layer = recompress(weight, bias)
                self._made_of = state
            return self.layer


def _array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's numbers as f32, in place where they are that."""
    if tensor.dtype is not torch.float32:
        if not tensor.is_floating_point():
            raise TypeError(f"found a tensor of {tensor.dtype}, expected f32, f16 or bf16")
        tensor = tensor.float()
    return tensor.detach().numpy()


def _tensor(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    made = torch.from_numpy(array)
    return made if like.dtype is torch.float32 else made.to(like.dtype)


def run_plainly(layer: Layer, x: torch.Tensor) -> torch.Tensor | None:
    """Runs a layer without the dispatcher, which takes several times as long as a small product; ``None`` where somebody has to see the
    operator: autograd, the compiler, a tracer, a transform, or a tensor of another kind.
    """
    if type(x) is not torch.Tensor or x.dtype is not torch.float32 or torch.compiler.is_compiling():
        return None
    if (x.requires_grad and torch.is_grad_enabled()) or torch.jit.is_tracing():
        return None
    try:
        array = x.detach().numpy() if x.requires_grad else x.numpy()
    except (RuntimeError, TypeError):
        # Under vmap, or on another device.
        return None
    return torch.from_numpy(layer(array))


def _layer(number: int) -> Layer:
    slot = _slots.get(number)
    if slot is None:
        raise RuntimeError(f"the layer of slot {number} is gone: the module that held it was freed")
    return slot.layer


_library = torch.library.Library("layerstore", "DEF")
_library.define("linear(Tensor x, int slot, SymInt out_features) -> Tensor")
_library.define("linear_backward(Tensor x, Tensor grad, int slot) -> Tensor")
_library.define("trained(Tensor x, Tensor weight, Tensor? bias, int slot) -> Tensor")
_library.define("trained_backward(Tensor x, Tensor grad, int slot) -> (Tensor, Tensor, Tensor)")
_library.define("rows(Tensor indices, int slot, SymInt features) -> Tensor")
_library.define("attend(Tensor q, Tensor k, Tensor v, int slot, float commitment) -> Tensor")
_library.define(
    "attend_backward(Tensor q, Tensor k, Tensor v, Tensor grad, int slot, float commitment) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "linear", "CPU")
def _linear(x, slot, out_features):
    return _tensor(_layer(slot)(_array(x)), x)


@torch.library.register_fake("layerstore::linear", lib=_library)
def _(x, slot, out_features):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.impl(_library, "linear_backward", "CPU")
def _linear_backward(x, grad, slot):
    return _tensor(_layer(slot).backward_input(_array(x), _array(grad)), x)


@torch.library.register_fake("layerstore::linear_backward", lib=_library)
def _(x, grad, slot):
    return x.new_empty(x.shape)


def _linear_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.slot = inputs[1]


def _linear_gradient(ctx, grad):
    (x,) = ctx.saved_tensors
    return torch.ops.layerstore.linear_backward(x, grad, ctx.slot), None, None


torch.library.register_autograd(
    "layerstore::linear", _linear_gradient, setup_context=_linear_context, lib=_library
)


@torch.library.impl(_library, "trained", "CPU")
def _trained(x, weight, bias, slot):
    held = _slots[slot]
    return _tensor(held.follow(weight, bias, held.recompress)(_array(x)), x)


@torch.library.register_fake("layerstore::trained", lib=_library)
def _(x, weight, bias, slot):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.impl(_library, "trained_backward", "CPU")
def _trained_backward(x, grad, slot):
    gradients = _layer(slot).backward(_array(x), _array(grad))
    return tuple(_tensor(gradient, x) for gradient in gradients)


@torch.library.register_fake("layerstore::trained_backward", lib=_library)
def _(x, grad, slot):
    width, out_features = x.shape[-1], grad.shape[-1]
    return x.new_empty(x.shape), x.new_empty((out_features, width)), x.new_empty((out_features,))


def _trained_context(ctx, inputs, output):
    x, weight, bias, slot = inputs
    ctx.save_for_backward(x)
    ctx.slot, ctx.has_bias, ctx.dtype = slot, bias is not None, weight.dtype


def _trained_gradient(ctx, grad):
    (x,) = ctx.saved_tensors
    gx, gw, gb = torch.ops.layerstore.trained_backward(x, grad, ctx.slot)
    return gx, gw.to(ctx.dtype), gb.to(ctx.dtype) if ctx.has_bias else None, None


torch.library.register_autograd(
    "layerstore::trained", _trained_gradient, setup_context=_trained_context, lib=_library
)


@torch.library.impl(_library, "rows", "CPU")
def _rows(indices, slot, features):
    return torch.from_numpy(_layer(slot).rows(indices.numpy()))


@torch.library.register_fake("layerstore::rows", lib=_library)
def _(indices, slot, features):
    return indices.new_empty((*indices.shape, features), dtype=torch.float32)


@torch.library.impl(_library, "attend", "CPU")
def _attend(q, k, v, slot, commitment):
    return _tensor(_layer(slot).attend(_array(q), _array(k), _array(v)), q)


@torch.library.register_fake("layerstore::attend", lib=_library)
def _(q, k, v, slot, commitment):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.impl(_library, "attend_backward", "CPU")
def _attend_backward(q, k, v, grad, slot, commitment):
    arrays = (_array(x) for x in (q, k, v, grad))
    gradients = _layer(slot).attend_backward(*arrays, commitment=commitment)
    return tuple(_tensor(gradient, q) for gradient in gradients)


@torch.library.register_fake("layerstore::attend_backward", lib=_library)
def _(q, k, v, grad, slot, commitment):
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape)


def _attend_context(ctx, inputs, output):
    q, k, v, ctx.slot, ctx.commitment = inputs
    ctx.save_for_backward(q, k, v)


def _attend_gradient(ctx, grad):
    gradients = torch.ops.layerstore.attend_backward(*ctx.saved_tensors, grad, ctx.slot, ctx.commitment)
    return *gradients, None, None


torch.library.register_autograd(
    "layerstore::attend", _attend_gradient, setup_context=_attend_context, lib=_library
)


def _no_second(ctx, *gradients):
    raise RuntimeError("layers have first derivatives alone: found a second one asked for, expected create_graph=False")


for _name in ("linear_backward", "trained_backward", "attend_backward"):
    torch.library.register_autograd(f"layerstore::{_name}", _no_second, lib=_library)
