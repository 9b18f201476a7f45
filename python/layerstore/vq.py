"""VQ attention's interface (a layer of Transformer-VQ whose queries and keys are both codes) over layerstore.

>>> from layerstore.vq import TransformerConfig, VQAttentionQK
>>> attention = VQAttentionQK(TransformerConfig(d_model=1024, d_k=128, d_v=128, n_head=1, n_code=128))
>>> y = attention(x)  # [batch, tokens, d_model]  # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

try:
    import torch
except ImportError as _error:
    raise ImportError("layerstore.vq needs PyTorch: pip install 'layerstore[torch]'") from _error

from torch import nn

from . import _native
from .torch import VQAttention

__all__ = ["TransformerConfig", "VQAttentionQK", "VQSpec"]


class TransformerConfig:
    """Settings by name, as a ``conf.yml`` has them; names that are not used here are kept. Dtypes are given as ``'float32'`` or torch's."""

    param_dtype: Any = torch.float32
    dtype: Any = torch.float32
    global_batch_size: int = 1
    block_len: int = 128
    mem_len: int = 0
    agg_cache: bool = True
    d_model: int
    d_k: int = 128
    d_v: int = 128
    n_head: int = 1
    n_code: int = 128
    n_code_k: int | None = None
    n_code_q: int | None = None
    c_beta: float = 0.0
    c_gamma: float = 0.99
    p_dropres: float = 0.0

    def __init__(self, **settings: Any) -> None:
        for name, value in settings.items():
            setattr(self, name, value)
        for name in ("param_dtype", "dtype"):
            if getattr(self, name) in ("float32", torch.float32):
                setattr(self, name, torch.float32)
            else:
                raise ValueError(f"{name}: found {getattr(self, name)!r}, expected 'float32'")
        for name in ("d_model", "d_k", "d_v", "n_head", "n_code", "block_len"):
            if not isinstance(getattr(self, name, None), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}: found {getattr(self, name, None)!r}, expected a whole number above 0")


class VQSpec:
    """What goes with a batch: which tokens count in losses and codebooks. ``loss_mask`` is ``None`` or all ones."""

    def __init__(self, n_device: Any = 1, n_block_per_update: Any = 1, loss_mask: Any = None, **_: Any) -> None:
        self.n_device, self.n_block_per_update, self.loss_mask = n_device, n_block_per_update, loss_mask
        if loss_mask is not None and not bool(torch.as_tensor(loss_mask).bool().all()):
            raise ValueError("loss_mask: found zeros, expected all ones: codebooks count every token")


def _normed(x: torch.Tensor) -> torch.Tensor:
    """``x`` less its mean, divided by its standard deviation, over the last dimension."""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


class VQAttentionQK(nn.Module):
    """Causal attention by codes of queries and keys, with its projections and a gate: ``[batch, tokens, d_model]`` to the same.

    Time and memory grow linearly with the tokens. In training mode codebooks follow queries and keys by moving averages, and gradients pass
    straight through codewords. ``attention.layer`` is the stored layer: ``store.save_layers`` keeps it.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        heads, d_k, d_v = config.n_head, config.d_k, config.d_v
        self.q_proj = nn.Linear(config.d_model, heads * d_k, bias=False)
        self.kvg_proj = nn.Linear(config.d_model, heads * (d_k + 2 * d_v), bias=False)
        self.res_proj = nn.Linear(heads * d_v, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.p_dropres)
        settings = {
            "mechanism": "vq_qk",
            "n_head": heads,
            "d_model": config.d_model,
            "d_k": d_k,
            "d_v": d_v,
            "n_code": config.n_code,
            "n_code_k": config.n_code_k or config.n_code,
            "n_code_q": config.n_code_q or config.n_code,
            "block_len": config.block_len,
            "mem_len": config.mem_len,
            "agg_cache": config.agg_cache,
            "c_gamma": config.c_gamma,
            # Queries and keys come with d_k^-1/4 each.
            "scale": 1.0,
        }
        # What normed vectors of that length are like: codebooks of random ones, until training or `fit_codebooks`.
        count = 4 * max(settings["n_code_k"], settings["n_code_q"])
        queries, keys = (_normed(torch.randn(count, heads, d_k)) * d_k**-0.25 for _ in range(2))
        layer = _native.vq_attention(settings, queries.reshape(count, -1), keys.reshape(count, -1))
        self.attention = VQAttention(layer)
        self.attention.commitment = float(config.c_beta)

    @property
    def layer(self) -> _native.Layer:
        """The stored layer: settings and codebooks."""
        return self.attention.layer

    def _projected(self, x: torch.Tensor):
        """Queries, keys and values by head, and the gate, of ``[batch, tokens, d_model]``."""
        heads, d_k, d_v = self.config.n_head, self.config.d_k, self.config.d_v
        x = _normed(x)
        k, v, g = self.kvg_proj(x).split([heads * d_k, heads * d_v, heads * d_v], -1)

        def by_head(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (heads, -1)).transpose(1, 2)

        q, k = (_normed(by_head(x)) * d_k**-0.25 for x in (self.q_proj(x), k))
        return q, k, by_head(nn.functional.silu(v)), nn.functional.silu(g)

    @torch.no_grad()
    def fit_codebooks(self, x: torch.Tensor) -> None:
        """Finds codewords anew by k-means of the queries and keys of ``x`` ``[batch, tokens, d_model]``."""
        flat = [part.transpose(1, 2).flatten(0, 1).flatten(1) for part in self._projected(x)[:2]]
        self.attention._slot.layer = _native.vq_attention(self.layer.config, *flat)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        """``attention(x)`` attends within ``[batch, tokens, d_model]``. ``attention(state, x, doc_ids, vq_spec)``, with blocks
        ``[blocks, batch, block_len, d_model]``, goes on from a state of ``initial_state``, and returns the next one and a dictionary of
        ``res``, ``l_commit`` and ``l_codebook``.
        """
        if len(arguments) + len(keywords) == 1:
            (x,) = (*arguments, *keywords.values())
            return self._attended(x, None)[0]
        return self._in_state(*arguments, **keywords)

    def _in_state(self, state: dict, input_features: torch.Tensor, doc_ids: Any = None, vq_spec: VQSpec | None = None):
        if doc_ids is not None and torch.as_tensor(doc_ids).unique().numel() > 1:
            raise ValueError("doc_ids: found several documents, expected one: start a state for each")
        blocks, batch, length, width = input_features.shape
        x = input_features.transpose(0, 1).reshape(batch, blocks * length, width)
        cache = state["cache"].copy()
        y, l_commit = self._attended(x, cache)
        res = y.reshape(batch, blocks, length, width).transpose(0, 1)
        after = {"pos_offset": state["pos_offset"] + blocks * length, "cache": cache}
        return after, {"res": res, "l_commit": l_commit, "l_codebook": torch.zeros(())}

    def _attended(self, x: torch.Tensor, cache: _native.AttentionCache | None):
        q, k, v, gate = self._projected(x)
        if cache is None:
            attended = self.attention(q, k, v)
        elif torch.is_grad_enabled() and q.requires_grad:
            raise ValueError("found a state in training, expected torch.no_grad(): gradients do not go back into a state")
        else:
            attended = torch.from_numpy(self.layer.attend(q, k, v, cache=cache))
        if self.training:
            measured = self.attention.learn(q, k)
            l_commit = torch.tensor(measured["query_commitment"] + measured["key_commitment"])
        else:
            l_commit = torch.zeros(())
        attended = attended.transpose(1, 2).flatten(2)
        return self.dropout(self.res_proj(attended * gate)), l_commit

    def initial_state(self, config: TransformerConfig | None = None) -> dict[str, Any]:
        """Returns the state before the first token, for ``global_batch_size`` sequences."""
        batch = (config or self.config).global_batch_size
        return {"pos_offset": 0, "cache": self.layer.empty_cache(batch)}

    def compute_k_q_v_g(self, x: torch.Tensor):
        """Returns queries, keys, values ``[blocks, batch, heads, block_len, …]`` and the gate, of blocks
        ``[blocks, batch, block_len, d_model]``."""
        blocks, batch = x.shape[:2]
        q, k, v, g = self._projected(x.flatten(0, 1))
        return tuple(part.unflatten(0, (blocks, batch)) for part in (q, k, v, g))

    def run_vqk(self, present_k: torch.Tensor, present_q: torch.Tensor | None = None, **_: Any):
        """Returns codes and codewords of keys, and of queries where they are given: dictionaries of ``shortcodes``, ``quantized_vecs_hat``,
        ``l_commit`` and ``l_codebook``."""
        found = [self._quantized(present_k, "keys")]
        if present_q is None:
            return found[0]
        return found[0], self._quantized(present_q, "queries")

    def _quantized(self, x: torch.Tensor, of: str) -> dict[str, torch.Tensor]:
        flat = x.flatten(0, 1)
        codes = torch.from_numpy(self.layer.codes(flat.detach(), of).astype("int64"))
        book = torch.from_numpy(self.layer.codebooks()[of])
        words = torch.stack([book[head][codes[:, head]] for head in range(book.shape[0])], 1)
        commit = (flat - words).square().sum(-1).mean(0).sum(0).mean()
        hat = (flat + (words - flat).detach()).reshape(x.shape)
        shape = x.shape[:-1]
        return {
            "shortcodes": codes.reshape(shape),
            "quantized_vecs_hat": hat,
            "l_commit": commit,
            "l_codebook": torch.zeros(()),
        }
