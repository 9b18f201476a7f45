"""layerstore.torch and layerstore.transformers: modules, operators, gradients, whole models."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import layerstore
import layerstore.torch as lt
from layerstore.transformers import from_store, tokenizer_from_store

LANGUAGE = Path(__file__).resolve().parents[1] / "fixtures/language"
RULES = [{"layers": r".*(0|2|fc\d|proj)", "method": "low_rank", "weight": {"type": "int8", "group": 16}, "rank": 4}]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def store(tmp_path):
    return layerstore.create(tmp_path / "layers")


def perceptron():
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))


@pytest.fixture(params=["key_value", "low_rank", "ternary", "dense"])
def module(request):
    linear = nn.Linear(24, 12)
    settings = {"key_value": {"expected_keys_per_query": 6}, "low_rank": {"rank": 2, "weight": {"type": "int8", "group": 8}}}
    return lt.Linear.compress(
        linear, method=request.param, calibration=torch.randn(64, 24), **settings.get(request.param, {})
    )


def test_any_leading_dimensions_and_dtypes(module):
    x = torch.randn(2, 3, 24)
    y = module(x)
    assert y.shape == (2, 3, 12) and y.dtype is torch.float32
    np.testing.assert_array_equal(y.detach().numpy(), module.layer(x.numpy()))
    assert module(x[0, 0]).shape == (12,)
    assert module(x[:0]).shape == (0, 3, 12)
    torch.testing.assert_close(module(x.transpose(0, 1)), module(x).transpose(0, 1))
    for dtype in (torch.float16, torch.bfloat16):
        assert module(x.to(dtype)).dtype is dtype
        torch.testing.assert_close(module(x.to(dtype)).float(), module(x.to(dtype).float()), atol=2e-2, rtol=2e-2)


def test_operators_pass_torchs_own_checks(module):
    x = torch.randn(3, 24, requires_grad=True)
    slot = module._slot.number
    torch.library.opcheck(torch.ops.layerstore.linear.default, (x, slot, 12))
    torch.library.opcheck(torch.ops.layerstore.linear_backward.default, (x.detach(), torch.randn(3, 12), slot))
    embedding = lt.Embedding(module.layer)
    torch.library.opcheck(torch.ops.layerstore.rows.default, (torch.tensor([1, 0]), embedding._slot.number, 24))
    if module.layer.method == "low_rank":
        module.trainable()
        arguments = (x, module.weight, module.bias, slot)
        torch.library.opcheck(torch.ops.layerstore.trained.default, arguments)
        torch.library.opcheck(torch.ops.layerstore.trained_backward.default, (x.detach(), torch.randn(3, 12), slot))


def test_gradients_are_those_of_the_output():
    """f32 inside: gradcheck with steps and tolerances of f32. A dense layer is linear to rounding."""
    module = lt.Linear.compress(nn.Linear(6, 4), method="dense")
    x = torch.randn(2, 6, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), eps=1e-2, atol=1e-3, rtol=1e-3, nondet_tol=1e-6)


def test_gradients_pass_straight_through(module):
    x = torch.randn(5, 24, requires_grad=True)
    grad = torch.randn(5, 12)
    module(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ torch.from_numpy(module.layer.weight()), atol=1e-4, rtol=1e-3)


def test_it_compiles_without_a_graph_break(module):
    compiled = torch.compile(nn.Sequential(module, nn.ReLU()), fullgraph=True, backend="aot_eager")
    for rows in (3, 5, 7):
        x = torch.randn(rows, 24, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, module(x).relu())
        y.sum().backward()
        assert x.grad.shape == x.shape


def test_copies_pickles_and_state_dicts(module, store, tmp_path):
    x = torch.randn(3, 24)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert again._slot.number != module._slot.number
        torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    other = lt.Linear.compress(nn.Linear(24, 12), method="dense")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)
    with pytest.raises(ValueError, match="in memory"):
        module.keep_by_reference()
    store.save_layers("m", {"l": module.layer})
    stored = lt.Linear(store.layer("m", "l")).keep_by_reference()
    torch.save(stored.state_dict(), tmp_path / "reference.pt")
    assert (tmp_path / "reference.pt").stat().st_size < 5000
    other.load_state_dict(torch.load(tmp_path / "reference.pt"))
    torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        lt.Linear.compress(nn.Linear(5, 3), method="dense").load_state_dict(module.state_dict())


def test_modules_of_a_method_refuse_others(module):
    classes = {"key_value": lt.KeyValueLinear, "low_rank": lt.LowRankLinear, "ternary": lt.TernaryLinear}
    for method, made in classes.items():
        if method == module.layer.method:
            assert made(module.layer).layer is module.layer
        else:
            with pytest.raises(ValueError, match=method):
                made(module.layer)


def test_a_module_into_the_store_and_back(store):
    model = perceptron()
    batches = [torch.randn(16, 32) for _ in range(8)]
    statistics = lt.collect_statistics(model, batches)
    assert set(statistics) == {"0", "2"} and statistics["0"].tokens == 128
    report = lt.import_module(store, model, "mlp", rules=RULES, statistics=statistics)
    assert {layer["error_basis"] for layer in report["layers"]} == {"activations"}
    replaced = copy.deepcopy(model)
    assert lt.replace_linears(replaced, store, "mlp") == ["0", "2"]
    x = torch.randn(4, 32)
    torch.testing.assert_close(replaced(x), model(x), atol=0.05, rtol=0.05)
    with pytest.raises(layerstore.NotFoundError):
        lt.replace_linears(nn.Sequential(nn.Linear(2, 2)), store, "mlp", prefix="x.")


def test_layers_of_one_input_share_statistics():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.o(self.q(x) + self.k(x))

    statistics = lt.collect_statistics(Shared(), [torch.randn(4, 8) for _ in range(3)])
    assert statistics["q"] is statistics["k"] and statistics["o"] is not statistics["q"]
    with pytest.raises(ValueError, match="no batches"):
        lt.collect_statistics(Shared(), [])
    with pytest.raises(ValueError, match="tokenizer"):
        lt.collect_statistics(Shared(), ["a text"])


def test_training_through_the_compression(store):
    model, target = perceptron(), perceptron()
    lt.import_module(store, model, "mlp", rules=[{"layers": ".*", "method": "ternary"}])
    lt.replace_linears(model, store, "mlp")
    for layer in (model[0], model[2]):
        layer.trainable()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    x = torch.randn(256, 32)
    losses = []
    for _ in range(60):
        loss = (model(x) - target(x).detach()).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    version = lt.commit(store, model, "mlp", message="trained")
    assert store.log()[0]["message"] == "trained" and store.latest().version == version
    again = perceptron()
    lt.replace_linears(again, store, "mlp")
    torch.testing.assert_close(again(x), model(x), atol=1e-5, rtol=1e-5)
    model[0].frozen()
    torch.testing.assert_close(again(x), model(x), atol=1e-5, rtol=1e-5)
    assert not list(model[0].parameters())


def test_settings_of_training_that_there_are_not(module):
    with pytest.raises(ValueError, match="nothing"):
        module.trainable(nothing=1)


def test_attention():
    settings = {"mechanism": "vq_k", "n_head": 2, "d_model": 16, "d_k": 8, "d_v": 8, "n_code": 16, "block_len": 8}
    q, k, v = (torch.randn(1, 2, 32, 8) for _ in range(3))
    layer = layerstore.vq_attention(settings, torch.randn(64, 16), torch.randn(64, 16))
    attention = lt.VQAttention(layer)
    before = attention(q, k, v)
    assert before.shape == (1, 2, 32, 8)
    measured = [attention.learn(q, k)["key_commitment"] for _ in range(20)]
    assert measured[-1] < measured[0]
    assert not torch.equal(attention(q, k, v), before)
    hyper = layerstore.vq_attention({**settings, "mechanism": "hyper"})
    assert lt.HyperAttention(hyper)(q, k, v).shape == (1, 2, 32, 8)
    with pytest.raises(ValueError, match="hyper"):
        lt.VQAttention(hyper)
    torch.library.opcheck(torch.ops.layerstore.attend.default, (q.requires_grad_(), k, v, attention._slot.number, 0.0))


def test_gradients_through_attention():
    """At codewords that are the queries and keys themselves, the gradients are those of exact attention."""
    q, k, v = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    settings = {"mechanism": "vq_qk", "n_head": 2, "d_model": 8, "d_k": 4, "d_v": 4, "n_code": 8, "block_len": 4}
    flat = [x.detach().transpose(1, 2).reshape(-1, 8) for x in (q, k)]
    attention = lt.VQAttention(layerstore.vq_attention(settings, *flat))
    grad = torch.randn(1, 2, 8, 4)
    attention(q, k, v).backward(grad)
    found = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)
    for one, x in zip(found, (q, k, v), strict=True):
        torch.testing.assert_close(one, x.grad, atol=1e-4, rtol=1e-3)


def llama(tied=True):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_models_of_transformers_run_from_the_store(store):
    import transformers

    model = llama()
    tokens = torch.randint(0, 64, (2, 10))
    lt.import_module(store, model, "dense")
    whole = from_store(store, "dense")
    assert type(whole) is transformers.LlamaForCausalLM
    torch.testing.assert_close(whole(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-4)
    assert not any(parameter.device.type == "meta" for parameter in whole.parameters())
    linear = sum(isinstance(module, lt.Linear) for module in whole.modules())
    assert linear == 15 and not any(isinstance(module, nn.Linear) for module in whole.modules())
    # What the store runs by itself says the same.
    ours = store.language_model("dense").logits(tokens[0].tolist())
    np.testing.assert_allclose(ours, model(tokens[:1]).logits[0].detach().numpy(), atol=1e-4)
    statistics = lt.collect_statistics(model, [tokens])
    lt.import_module(store, model, "int8", rules=RULES, statistics=statistics)
    store.create_snapshot("both")
    store.remove_model("int8")
    small = from_store(store, "int8", at="both")
    agreement = (small(tokens).logits - model(tokens).logits).norm() / model(tokens).logits.norm()
    assert 0 < agreement < 0.05
    assert small.generate(tokens[:1], max_new_tokens=4, do_sample=False).shape[1] <= 14
    with pytest.raises(layerstore.NotFoundError):
        from_store(store, "nobody")


def test_a_model_of_transformers_is_saved_and_opened_again(store, tmp_path, caplog):
    """By transformers' own `from_pretrained`, from a folder without the layers, and in the place of dense weights."""
    import safetensors.torch
    import transformers

    from layerstore.transformers import LayerstoreConfig

    for tied in (True, False):
        model = llama(tied)
        with torch.no_grad():
            for norm in (module for module in model.modules() if isinstance(module, type(model.model.norm))):
                norm.weight.uniform_(0.5, 2)
        tokens = torch.randint(0, 64, (2, 10))
        name = f"tied {tied}"
        lt.import_module(store, model, name, rules=RULES)
        stored = from_store(store, name)
        folder = tmp_path / name
        stored.save_pretrained(folder)
        kept = safetensors.torch.load_file(folder / "model.safetensors")
        assert set(kept) == {key for key in model.state_dict() if "norm" in key}
        again = transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert not any(isinstance(module, nn.Linear) for module in again.modules())
        torch.testing.assert_close(again(tokens).logits, stored(tokens).logits, atol=0, rtol=0)
        again.save_pretrained(tmp_path / "again")
        dense = tmp_path / "dense"
        model.save_pretrained(dense)
        given = LayerstoreConfig(store.uri, name)
        over = transformers.AutoModelForCausalLM.from_pretrained(dense, quantization_config=given)
        torch.testing.assert_close(over(tokens).logits, stored(tokens).logits, atol=0, rtol=0)
        half = from_store(store, name, dtype=torch.bfloat16)
        assert half(tokens).logits.dtype is torch.bfloat16
        assert half.get_input_embeddings()(tokens).dtype is torch.bfloat16
    assert not [record for record in caplog.records if record.levelname == "WARNING"], caplog.text
    with pytest.raises(TypeError, match="expected store, model and at"):
        LayerstoreConfig(store.uri, "m", bits=4)


def test_a_stored_folder_runs_in_transformers(store):
    """The stored fixture of the Rust tests, with its tokenizer."""
    store.import_model(LANGUAGE / "llama", "llama")
    model, tokenizer = from_store(store, "llama"), tokenizer_from_store(store, "llama")
    reference = json.loads((LANGUAGE / "references.json").read_text())["llama"]
    logits = model(torch.tensor([reference["tokens"]])).logits[0].detach().numpy()
    np.testing.assert_allclose(logits[::5], reference["logits"], atol=1e-4)
    assert tokenizer.vocab_size > 0
