"""VQ attention's interface."""

import pytest
import torch

import layerstore
from layerstore.vq import TransformerConfig, VQAttentionQK, VQSpec

SETTINGS = {
    "param_dtype": "float32",
    "dtype": "float32",
    "global_batch_size": 2,
    "sequence_len": 64,
    "block_len": 16,
    "mem_len": 16,
    "agg_cache": True,
    "d_model": 32,
    "d_k": 16,
    "d_v": 16,
    "n_head": 2,
    "n_code": 32,
    "n_code_k": 32,
    "n_code_q": 32,
    "c_beta": 0.01,
    "c_gamma": 0.9,
    "p_dropres": 0.0,
    "n_layer": 4,
    "device": "cpu",
}


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return VQAttentionQK(TransformerConfig(**SETTINGS)).eval()


def exact(attention, x):
    """The same with exact attention."""
    q, k, v, gate = attention._projected(x)
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0)
    return attention.res_proj(attended.transpose(1, 2).flatten(2) * gate)


def test_a_sequence_goes_in_as_it_is(attention):
    x = torch.randn(2, 64, 32)
    assert attention(x).shape == x.shape
    attention.fit_codebooks(x)
    with torch.no_grad():
        error = (attention(x) - exact(attention, x)).norm() / exact(attention, x).norm()
        later = x.clone()
        later[:, 40:] = 0.5 * torch.randn_like(later[:, 40:])
        torch.testing.assert_close(attention(later)[:, :40], attention(x)[:, :40], atol=1e-4, rtol=1e-4)
    assert error < 0.5


def test_a_state_goes_on_where_a_sequence_was(attention):
    x = torch.randn(2, 64, 32)
    with torch.no_grad():
        whole = attention(x)
        state, parts = attention.initial_state(), []
        for piece in x.split(32, 1):
            blocks = piece.reshape(2, 2, 16, 32).transpose(0, 1)
            state, found = attention(state, blocks, torch.zeros(2, 2, 16), VQSpec(loss_mask=torch.ones(1)))
            parts.append(found["res"].transpose(0, 1).reshape(2, 32, 32))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    assert state["pos_offset"] == 64 and float(state["cache"].counts().sum()) > 0


def test_the_steps_of_its_benchmark(attention):
    x = torch.randn(4, 2, 16, 32)
    q, k, v, g = attention.compute_k_q_v_g(x)
    assert q.shape == k.shape == v.shape == (4, 2, 2, 16, 16) and g.shape == (4, 2, 16, 32)
    keys, queries = attention.run_vqk(present_k=k, present_q=q, loss_mask=torch.ones(1))
    assert keys["shortcodes"].shape == (4, 2, 2, 16) and keys["shortcodes"].max() < 32
    assert queries["quantized_vecs_hat"].shape == q.shape and keys["l_commit"] > 0


def test_it_is_trained(attention):
    attention.train()
    optimizer = torch.optim.Adam(attention.parameters(), lr=3e-3)
    x = torch.randn(2, 64, 32)
    target = x.cumsum(1) / torch.arange(1, 65)[None, :, None]
    losses = []
    for _ in range(30):
        loss = (attention(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert attention.q_proj.weight.grad.abs().sum() > 0


def test_the_layer_is_stored(attention, tmp_path):
    store = layerstore.create(tmp_path / "layers")
    store.save_layers("m", {"attention": attention.layer})
    other = VQAttentionQK(TransformerConfig(**SETTINGS)).eval()
    other.load_state_dict(attention.state_dict())
    x = torch.randn(2, 64, 32)
    torch.testing.assert_close(other(x), attention(x), rtol=0, atol=0)
    other.attention._slot.layer = store.layer("m", "attention")
    torch.testing.assert_close(other(x), attention(x), rtol=0, atol=0)


def test_what_is_refused(attention):
    for wrong in ({"d_model": 0}, {"n_code": "many"}, {"dtype": "float16"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TransformerConfig(**{**SETTINGS, **wrong})
    with pytest.raises(ValueError, match="loss_mask"):
        VQSpec(loss_mask=torch.tensor([1, 0]))
    blocks = torch.randn(4, 2, 16, 32)
    with torch.no_grad(), pytest.raises(ValueError, match="doc_ids"):
        attention(attention.initial_state(), blocks, torch.arange(4 * 2 * 16).reshape(4, 2, 16))
    with pytest.raises(ValueError, match="no_grad"):
        attention(attention.initial_state(), blocks)
