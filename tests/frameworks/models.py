#!/usr/bin/env python3
"""models.py BINARIES: whole models from a store beside transformers in f32, on the same weights.

SmolLM2-135M-Instruct: what ten prompts are gone on with, token by token, and the perplexity of a text. all-MiniLM-L6-v2: the
vectors of sentences. Where a model cannot be had, its part is skipped and said so.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from formats import REPOSITORY, Store

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "The three laws of thermodynamics are",
    "To make bread you need flour,",
    "In 1969, the first",
    "A neural network learns by",
    "The difference between a list and a tuple in Python is",
    "Dear Sir or Madam,",
]
TOKENS = 64
# Logits that are nearer to each other than this may change places by rounding.
TIE = 1e-3


class Checks:
    def __init__(self, binaries, folder):
        self.store, self.failed = Store(binaries, folder), 0

    def check(self, what, good, detail):
        print(f"{'ok  ' if good else 'FAIL'} {what}: {detail}")
        self.failed += not good


def fetch(name, folder):
    done = subprocess.run([sys.executable, REPOSITORY / "scripts/fetch_model.py", name, folder])
    if done.returncode == 3:
        print(f"skipped: {name} is out of reach")
    elif done.returncode != 0:
        raise SystemExit(f"fetching {name} failed")
    return done.returncode == 0


def language_model(checks, folder):
    if not fetch("smollm2", folder / "smollm2"):
        return
    checks.store.run("import", next((folder / "smollm2").glob("*.gguf")), "--model", "smollm2")
    exported = folder / "exported"
    checks.store.run("export", "smollm2", "--to", "huggingface", "--dtype", "f32", "--allow-dequantize", "-o", exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    same = ties = 0
    for prompt in PROMPTS:
        options = ("--max-tokens", TOKENS, "--exact")
        ours = checks.store.run("generate", "smollm2", "--prompt", prompt, *options)["tokens"]
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            theirs = model.generate(tokens, max_new_tokens=TOKENS, do_sample=False)[0, tokens.shape[1] :].tolist()
        # What ends a text is none of it here.
        theirs = theirs[:-1] if len(theirs) < TOKENS else theirs
        if ours == theirs:
            same += 1
            continue
        place = next((i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
        before = torch.cat([tokens, torch.tensor([theirs[:place]], dtype=torch.long)], dim=1)
        with torch.no_grad():
            best = model(before).logits[0, -1].topk(2).values
        gap = float(best[0] - best[1])
        ties += gap < TIE
        print(f"     {prompt!r}: token {place} differs, where the two likeliest are {gap:.1e} apart")
    good = same + ties == len(PROMPTS)
    checks.check(f"{TOKENS} tokens after {len(PROMPTS)} prompts", good, f"{same} alike, {ties} decided by a tie")
    text = (REPOSITORY / "examples/minilm_embeddings/evaluation.txt").read_text()
    file = folder / "text.txt"
    file.write_text(text)
    window = 512
    ours = checks.store.run("perplexity", "smollm2", "--text", file, "--window", window, "--exact")["perplexity"]
    tokens = tokenizer(text)["input_ids"]
    losses = []
    for start in range(0, len(tokens) - window + 1, window):
        part = torch.tensor([tokens[start : start + window]])
        with torch.no_grad():
            shares = torch.log_softmax(model(part).logits[0].double(), dim=-1)
        second = torch.arange(window // 2, window)
        losses.append(-shares[second - 1, part[0, second]])
    theirs = float(torch.cat(losses).mean().exp())
    off = abs(ours / theirs - 1)
    checks.check("perplexity", off < 1e-3, f"{ours:.4f}, transformers {theirs:.4f}, {off:.1e} apart")


def encoder(checks, folder):
    if not fetch("minilm", folder / "minilm"):
        return
    checks.store.run("import", folder / "minilm", "--model", "minilm")
    lines = (REPOSITORY / "examples/minilm_embeddings/evaluation.txt").read_text().splitlines()
    lines = [line for line in lines if line.strip()][:64]
    (folder / "lines.txt").write_text("\n".join(lines) + "\n")
    checks.store.run("embed", "minilm", "--input", folder / "lines.txt", "--output", folder / "e.npy")
    ours = np.load(folder / "e.npy")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "minilm/tokenizer.json"))
    model = transformers.AutoModel.from_pretrained(folder / "minilm", dtype=torch.float32).eval()
    theirs = []
    for line in lines:
        tokens = torch.tensor([tokenizer(line, truncation=True, max_length=512)["input_ids"]])
        with torch.no_grad():
            vector = model(tokens).last_hidden_state[0].mean(0)
        theirs.append((vector / vector.norm()).numpy())
    lowest = float((ours * np.stack(theirs)).sum(1).min())
    checks.check("vectors of sentences", lowest > 1 - 1e-5, f"lowest cosine {lowest:.7f}")


def main():
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(Path(sys.argv[1]).resolve(), Path(folder))
        language_model(checks, Path(folder))
        encoder(checks, Path(folder))
    return min(checks.failed, 1)


if __name__ == "__main__":
    sys.exit(main())
