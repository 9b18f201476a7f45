#!/usr/bin/env python3
"""Holds exports to the programs that they are for: llama.cpp, transformers, peft and compressed-tensors.

formats.py BINARIES: each check makes a store of its own in a temporary folder and says what it measured. Exit status 1 when one
fails.
"""

import json
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):",
    "Water boils at 100 degrees",
    "Dear Sir or Madam, I am writing to you because 2 of 31 parcels",
]
TEXTS = PROMPTS + ["naïve café — 12,345.67 €\n\n\tIndented   text's end", "日本語のテキスト 🎉", " leading and trailing "]


class Store:
    """A store, and the command that works on it."""

    def __init__(self, binaries, folder):
        self.command = [str(binaries / "layerstore"), "--quiet", "--format", "json", "--store", str(folder / "layers")]

    def run(self, *args):
        done = subprocess.run([*self.command, *map(str, args)], capture_output=True, text=True)
        if done.returncode != 0:
            raise AssertionError(f"layerstore {' '.join(map(str, args))}: {done.stderr}")
        return json.loads(done.stdout)


def smollm2(folder):
    subprocess.run([sys.executable, REPOSITORY / "scripts/fetch_model.py", "smollm2", folder], check=True)
    return folder / "SmolLM2-135M-Instruct.Q4_1.gguf"


def generated(path, prompts, count=64):
    from llama_cpp import Llama

    model = Llama(model_path=str(path), n_ctx=256, n_threads=2, verbose=False, logits_all=False, seed=0)
    texts = []
    for prompt in prompts:
        tokens = model.tokenize(prompt.encode(), special=True)
        found = []
        for token in model.generate(tokens, top_k=1, temp=0.0, repeat_penalty=1.0):
            found.append(token)
            if len(found) == count:
                break
        texts.append(found)
    vocabulary = [model.tokenize(text.encode(), add_bos=False, special=False) for text in TEXTS]
    return texts, vocabulary


def logits(model, ids):
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().numpy()


def gguf_of_smollm2(store, folder):
    """The GGUF comes back such that llama.cpp says the same; as a folder, transformers gives the logits of the GGUF."""
    path = smollm2(folder / "models")
    store.run("import", path, "--model", "smollm2")
    out = folder / "out.gguf"
    store.run("export", "smollm2", "--output", out)
    assert out.stat().st_size == path.stat().st_size, (out.stat().st_size, path.stat().st_size)
    before, vocabulary = generated(path, PROMPTS)
    after, _ = generated(out, PROMPTS)
    assert before == after, "llama.cpp generates other tokens from the exported file"
    store.run("export", "smollm2", "--output", folder / "hf")
    ours = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    found = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    assert found == vocabulary, f"tokens: {found} and llama.cpp's {vocabulary}"
    worst = max(np.abs(logits(ours, ids) - logits(theirs, ids)).max() for ids in found)
    assert worst < 1e-3, worst
    return f"64 tokens of {len(PROMPTS)} prompts are llama.cpp's own; logits within {worst:.1e} of transformers'"


def tiny_llama(folder, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, max_position_embeddings=64, **changes,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    model.save_pretrained(folder)
    return model


IDS = [3, 14, 15, 92, 65, 35, 89, 79]


def adapter_of_corrections(store, folder):
    """Base and adapter, through peft, compute what the layers do."""
    from peft import PeftModel

    tiny_llama(folder / "llama", tie_word_embeddings=False)
    rules = folder / "rules.toml"
    rules.write_text(
        "[[rule]]\nlayers = '.*(q|k)_proj'\nmethod = 'low_rank'\nrank = 4\nweight = { type = 'int3', group = 32 }\n"
        "[[rule]]\nlayers = '.*(proj|embed_tokens|lm_head)'\nmethod = 'low_rank'\nrank = 7\n"
        "weight = { type = 'int3', group = 32 }\n"
    )
    store.run("import", folder / "llama", "--model", "lora", "--rules", rules)
    store.run("export", "lora", "--to", "huggingface", "--without-correction", "--output", folder / "base")
    store.run("export", "lora", "--to", "peft", "--output", folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    worst, generator = 0.0, np.random.default_rng(0)
    modules = dict(model.base_model.model.named_modules())
    layers = store.run("layers", "lora")
    compared = 0
    for layer in layers:
        if layer["method"] != "low_rank" or "embed" in layer["layer"]:
            continue
        x = generator.standard_normal((5, layer["in_features"])).astype("f4")
        np.save(folder / "x.npy", x)
        store.run("forward", "lora", layer["layer"], "--input", folder / "x.npy", "--output", folder / "y.npy")
        y = np.load(folder / "y.npy")
        with torch.no_grad():
            theirs = modules[layer["layer"]](torch.from_numpy(x)).numpy()
        worst = max(worst, np.abs(y - theirs).max() / np.abs(y).max())
        compared += 1
    assert compared == 15 and worst < 1e-4, (compared, worst)
    # The embedding too: the whole model is that of the corrected weights.
    store.run("export", "lora", "--to", "huggingface", "--output", folder / "whole")
    whole = AutoModelForCausalLM.from_pretrained(folder / "whole", dtype=torch.float32).eval()
    off = np.abs(logits(model, IDS) - logits(whole, IDS)).max() / np.abs(logits(whole, IDS)).max()
    assert off < 1e-4, off
    return f"{compared} layers within {worst:.1e}, logits within {off:.1e}"


def packed_layers(store, folder):
    """A folder of packed layers, opened by transformers with compressed-tensors."""
    tiny_llama(folder / "packed-llama", tie_word_embeddings=False)
    worst = 0.0
    for bits, group in [(4, "32"), (8, '"channel"')]:
        rules = folder / "rules.toml"
        weight = f'{{ type = "int{bits}", group = {group}, symmetric = true, scales = "f16" }}'
        rules.write_text(f"[[rule]]\nlayers = '.*_proj'\nmethod = 'low_rank'\nweight = {weight}\n")
        name = f"packed-{bits}"
        store.run("import", folder / "packed-llama", "--model", name, "--rules", rules)
        store.run("export", name, "--to", "compressed-tensors", "--output", folder / name)
        store.run("export", name, "--to", "huggingface", "--output", folder / f"{name}-dense")
        packed = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
        dense = AutoModelForCausalLM.from_pretrained(folder / f"{name}-dense", dtype=torch.float32).eval()
        expected = logits(dense, IDS)
        worst = max(worst, np.abs(logits(packed, IDS) - expected).max() / np.abs(expected).max())
    assert worst < 2e-3, worst
    return f"logits within {worst:.1e} of those of the weights as numbers"


def conv1d_and_tied_heads(store, folder):
    """GPT-2 comes back as it went in, its layers the ones that transformers runs."""
    torch.manual_seed(1)
    config = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder / "gpt2")
    report = store.run("import", folder / "gpt2", "--model", "gpt2")
    assert any(layer["layer"] == "lm_head" for layer in report["layers"]), report
    x = np.random.default_rng(0).standard_normal((3, 48)).astype("f4")
    np.save(folder / "x.npy", x)
    layer = "transformer.h.1.mlp.c_fc"
    store.run("forward", "gpt2", layer, "--input", folder / "x.npy", "--output", folder / "y.npy")
    with torch.no_grad():
        theirs = dict(model.named_modules())[layer](torch.from_numpy(x)).numpy()
    assert np.abs(np.load(folder / "y.npy") - theirs).max() < 1e-5
    store.run("export", "gpt2", "--output", folder / "gpt2-again")
    again = AutoModelForCausalLM.from_pretrained(folder / "gpt2-again", dtype=torch.float32).eval()
    assert np.array_equal(logits(again, IDS), logits(model, IDS))
    return "logits are the same, to the bit"


def gguf_of_transformers(store, folder):
    """A Llama of transformers' becomes a GGUF file that llama.cpp opens, with its logits."""
    path = smollm2(folder / "models")
    store.run("import", path, "--model", "smollm2")
    store.run("export", "smollm2", "--output", folder / "made")
    # Without the metadata of the GGUF file that it came from.
    store.run("import", folder / "made", "--model", "made")
    out = folder / "made.gguf"
    store.run("export", "made", "--output", out, "--dtype", "f16")
    _, vocabulary = generated(path, [])
    _, found = generated(out, [])
    assert found == vocabulary, "llama.cpp divides texts into other tokens"
    from llama_cpp import Llama

    model = Llama(model_path=str(out), n_ctx=64, n_threads=2, verbose=False, logits_all=True)
    model.eval(found[0])
    theirs = np.array([model.scores[i] for i in range(len(found[0]))])
    ours = logits(AutoModelForCausalLM.from_pretrained(folder / "made", dtype=torch.float32).eval(), found[0])
    off = np.abs(theirs - ours).max() / np.abs(ours).max()
    assert off < 5e-3, off
    return f"llama.cpp's logits from f16 weights within {off:.1e} of transformers' from f32"


CHECKS = [gguf_of_smollm2, gguf_of_transformers, adapter_of_corrections, packed_layers, conv1d_and_tied_heads]


def main():
    binaries = Path(sys.argv[1]).resolve()
    wanted = sys.argv[2:]
    failed = 0
    for check in CHECKS:
        if wanted and check.__name__ not in wanted:
            continue
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            try:
                print(f"PASS {check.__name__}: {check(Store(binaries, folder), folder)}", flush=True)
            except Exception:
                failed += 1
                traceback.print_exc()
                print(f"FAIL {check.__name__}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
