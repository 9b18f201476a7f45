"""LQER for flax by the names of LQER-Qwix: kernels of ``Dense`` modules in few bits, with a low-rank correction of what rounding lost.

A program written for LQER-Qwix changes its import lines: ``LQER_src`` becomes ``layerstore.lqer``, and so does ``qwix``.

>>> from layerstore.lqer import LqerProvider, LqerRule, lqer_quantize_params, quantize_model
>>> rules = [LqerRule(module_path=".*", weight_qtype="int4", rank=16)]
>>> lqer_params = lqer_quantize_params(params, rules)                       # doctest: +SKIP
>>> quantize_model(model, LqerProvider(rules)).apply({"params": lqer_params}, x)  # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

try:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
except ImportError as _error:
    raise ImportError("layerstore.lqer needs JAX and flax: pip install 'layerstore[jax]'") from _error

import numpy as np

from . import _native
from .jax import linear

__all__ = [
    "LqerProvider",
    "LqerRule",
    "LqerWeight",
    "PtqProvider",
    "QuantizationRule",
    "lqer_quantize_params",
    "quantize_model",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationRule:
    """Which modules are quantised, and how. ``module_path`` is a regular expression for a module's whole path (``block_0/ffn/fc1``), or for
    that of its parameter (``block_0/ffn/fc1/kernel``). ``weight_qtype`` is a name or a dtype (``jnp.int4``); ``None`` leaves the module as
    it is. ``tile_size`` is the length of the groups of inputs that share a scale; without it an output has one.
    """

    module_path: str = ".*"
    weight_qtype: Any = None
    tile_size: int | None = None

    def __post_init__(self) -> None:
        re.compile(self.module_path)
        _weight_format(self)

    def takes(self, path: str) -> bool:
        """Returns whether the rule takes the module of this path."""
        return bool(re.fullmatch(self.module_path, path) or re.fullmatch(self.module_path, f"{path}/kernel"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LqerRule(QuantizationRule):
    """A rule with the rank of the correction: at most so many singular values of the rounding error are kept."""

    rank: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 0:
            raise ValueError(f"rank: found {self.rank!r}, expected a whole number, 0 or more")


# What LQER-Qwix computes: scales by the largest weight, the singular values of the plain error, factors as they are.
_AS_LQER = {"scaling": "identity", "clipping": "absmax", "svd": "full", "factors": "f32"}


def _weight_format(rule: QuantizationRule) -> dict[str, Any] | None:
    if rule.weight_qtype is None:
        return None
    name = rule.weight_qtype if isinstance(rule.weight_qtype, str) else np.dtype(rule.weight_qtype).name
    known = (*(f"int{bits}" for bits in range(2, 9)), "nf4")
    if name not in known:
        raise ValueError(f"weight_qtype: found '{name}', expected one of {', '.join(known)}")
    if rule.tile_size is not None and (not isinstance(rule.tile_size, int) or rule.tile_size < 1):
        raise ValueError(f"tile_size: found {rule.tile_size!r}, expected a number of inputs, or None")
    group = "channel" if rule.tile_size is None else rule.tile_size
    return {"type": name, "group": group} if name == "nf4" else {"type": name, "group": group, "symmetric": True}


@jax.tree_util.register_pytree_node_class
class LqerWeight:
    """A kernel ``[in, out]`` that a stored layer stands for. It has no arrays that JAX could trace: it is part of the program."""

    def __init__(self, layer: _native.Layer) -> None:
        self.layer = layer

    @property
    def shape(self) -> tuple[int, int]:
        """``(in, out)``."""
        return self.layer.shape[::-1]

    @property
    def dtype(self) -> Any:
        """What the kernel computes with."""
        return jnp.dtype(jnp.float32)

    def dequantized(self) -> jax.Array:
        """Returns the kernel with its correction, ``[in, out]``."""
        return jnp.asarray(self.layer.weight().T)

    def tree_flatten(self) -> tuple[tuple[()], _native.Layer]:
        return (), self.layer

    @classmethod
    def tree_unflatten(cls, layer: _native.Layer, children: tuple[()]) -> LqerWeight:
        return cls(layer)

    def __repr__(self) -> str:
        return f"LqerWeight({self.layer!r})"


def lqer_quantize_params(
    fp_params: Mapping[str, Any],
    *given: Any,
    store: _native.Store | None = None,
    name: str = "lqer",
    debug: bool = False,
) -> dict[str, Any]:
    """Returns parameters like ``fp_params`` in which the kernels that a rule takes are ``LqerWeight``.

    ``given`` are the rules, or, as LQER-Qwix has it, the abstract parameters of the quantised model, which are not needed here, and the
    rules. With ``store`` all parameters are put into it as model ``name``, and kernels run from there.

    Raises ``TypeError`` without rules, and ``ValueError`` where a rule takes no kernel.
    """
    if len(given) not in (1, 2):
        raise TypeError("lqer_quantize_params: expected the parameters and a list of rules")
    rules: Sequence[QuantizationRule] = _rules(given[-1])
    chosen: dict[str, tuple[QuantizationRule, dict[str, Any]]] = {}
    used: set[int] = set()
    tensors: dict[str, np.ndarray] = {}
    _gather(fp_params, "", tensors)
    for path, value in tensors.items():
        module, _, kind = path.rpartition("/")
        if kind != "kernel" or value.ndim != 2:
            continue
        for place, rule in enumerate(rules):
            if rule.takes(module):
                used.add(place)
                weight = _weight_format(rule)
                if weight is not None:
                    rank = min(getattr(rule, "rank", 0), *value.shape)
                    chosen[path] = (rule, {"weight": weight, "rank": rank, **_AS_LQER})
                break
    unused = [rule.module_path for place, rule in enumerate(rules) if place not in used]
    if unused:
        raise ValueError(f"no kernel for the rules {unused}; modules: {', '.join(sorted(_modules(tensors))[:8])}")
    layers = {path: _compressed(tensors[path], settings) for path, (_, settings) in chosen.items()}
    if store is not None:
        layers = _stored(store, name, tensors, layers)
    if debug:
        for path, (rule, settings) in chosen.items():
            print(f"{path}: {rule.module_path!r}, {settings}")
    return _replaced(fp_params, "", layers)


def _rules(given: Any) -> list[QuantizationRule]:
    """Returns rules; what is none is an error."""
    rules = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    for rule in rules:
        if not isinstance(rule, QuantizationRule):
            raise TypeError(f"rules: found {rule!r}, expected a list of LqerRule or QuantizationRule")
    return rules


def _gather(tree: Mapping[str, Any], prefix: str, found: dict[str, np.ndarray]) -> None:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            _gather(value, f"{path}/", found)
        else:
            found[path] = np.asarray(value)


def _modules(tensors: Mapping[str, np.ndarray]) -> set[str]:
    return {path.rpartition("/")[0] for path in tensors if path.endswith("/kernel")}


def _compressed(kernel: np.ndarray, settings: dict[str, Any]) -> _native.Layer:
    return _native.compress(np.ascontiguousarray(kernel.T), method="low_rank", **settings)


def _stored(
    store: _native.Store, name: str, tensors: Mapping[str, np.ndarray], layers: Mapping[str, _native.Layer]
) -> dict[str, _native.Layer]:
    """Puts all parameters into a store: those that no rule took as they are, under their paths with dots."""
    dotted = {path: path.replace("/", ".") for path in tensors}
    store.import_model({dotted[path]: value for path, value in tensors.items() if path not in layers}, name)
    of_kernel = {path: dotted[path].removesuffix(".kernel") for path in layers}
    store.save_layers(name, {of_kernel[path]: layer for path, layer in layers.items()}, message="LQER")
    snapshot = store.latest()
    return {path: snapshot.layer(name, of_kernel[path]) for path in layers}


def _replaced(tree: Mapping[str, Any], prefix: str, layers: Mapping[str, _native.Layer]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            made[key] = _replaced(value, f"{path}/", layers)
        else:
            made[key] = LqerWeight(layers[path]) if path in layers else value
    return made


class PtqProvider:
    """What ``quantize_model`` takes: rules. Parameters say by themselves how they run."""

    def __init__(self, rules: Sequence[QuantizationRule]) -> None:
        self.rules = _rules(rules)


class LqerProvider(PtqProvider):
    """What ``quantize_model`` takes for parameters with ``LqerWeight``."""


def quantize_model(model: nn.Module, provider: PtqProvider) -> QuantizedModel:
    """Returns a model of flax's linen whose ``Dense`` and ``DenseGeneral`` modules run the stored layer where their kernel is an
    ``LqerWeight``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model: found {type(model).__name__}, expected a module of flax.linen")
    return QuantizedModel(model, provider)


class QuantizedModel:
    """A linen module run with stored layers: ``init`` and ``apply`` are the module's."""

    def __init__(self, model: nn.Module, provider: PtqProvider) -> None:
        self.model, self.provider = model, provider

    def init(self, *arguments: Any, **keywords: Any) -> Any:
        """Makes parameters, as the module's ``init``."""
        return self.model.init(*arguments, **keywords)

    def apply(self, variables: Mapping[str, Any], *arguments: Any, **keywords: Any) -> Any:
        """Runs the module, as its ``apply``."""
        with nn.intercept_methods(_intercept):
            return self.model.apply(variables, *arguments, **keywords)


def _intercept(call: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any], context: Any) -> Any:
    module = context.module
    if context.method_name != "__call__" or not module.has_variable("params", "kernel"):
        return call(*arguments, **keywords)
    kernel = module.get_variable("params", "kernel")
    if not isinstance(kernel, LqerWeight):
        return call(*arguments, **keywords)
    (x,) = arguments or tuple(keywords.values())
    last = getattr(module, "axis", -1) in (-1, (-1,), [-1], x.ndim - 1, (x.ndim - 1,), [x.ndim - 1])
    if not isinstance(module, (nn.Dense, nn.DenseGeneral)) or not last:
        found = f"{type(module).__name__} over axis {getattr(module, 'axis', -1)}"
        raise TypeError(f"module {'/'.join(module.path)}: found {found} with an LqerWeight, expected Dense, or DenseGeneral over the last axis")
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    y = linear(kernel.layer, x)
    return y + module.get_variable("params", "bias") if module.use_bias else y
