#!/usr/bin/env python3
"""A language model calibrated by reading a text, beside llama.cpp's Q3_K_M with an importance matrix from the same text.

    python benches/quantization.py MODEL.gguf FOLDER --llama DIR [--binary target/debug/layerstore] [--tokens N]

DIR has llama-imatrix and llama-quantize (in llama.cpp's sources: `cmake -B build && cmake --build build --target llama-imatrix
llama-quantize`). Both programs start from the weights of MODEL.gguf. The text is that of Python's own help topics: its first
half calibrates, of the other half 4,096 tokens are read to compare with the model as it is. Bytes are those of a GGUF file, and those
that the store holds for a model, its tokenizer included. FOLDER keeps what was made: run again, only what is missing is made.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from compare_methods import packed, toml  # noqa: E402

CORRECTION = {"scaling": "exact", "factors": "int8"}


def embedding(kind):
    """The table of tokens, and the head, which is the same."""
    weight = {"type": kind, "group": 64, "scales": "f16"}
    return [{"layers": r"model\.embed_tokens|lm_head", "method": "low_rank", "weight": weight}]


RULES = {
    "int3 g32 gptq, rank 16": packed("int3", 32, rank=16, **CORRECTION),
    "int3 g32 gptq, rank 64; int5 embedding": embedding("int5") + packed("int3", 32, rank=64, **CORRECTION),
    "int4 g32 gptq; int5 embedding": embedding("int5") + packed("int4", 32),
    "int4 g32 gptq; int6 embedding": embedding("int6") + packed("int4", 32),
}


def run(*command):
    """What a command prints, its seconds and the largest memory that it had, in bytes."""
    since = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE)
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    return printed, time.perf_counter() - since, used.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama", type=Path)
    parser.add_argument("--binary", default="target/debug/layerstore")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--only", action="append", help="part of a row's name; any number of times")
    args = parser.parse_args()
    from pydoc_data.topics import topics

    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    everything = "\n".join(topics[name] for name in sorted(topics))
    calibration, other = folder / "calibration.txt", folder / "other.txt"
    half = len(everything) // 2
    calibration.write_text(everything[:half])
    # About four letters are a token here.
    other.write_text(everything[half : half + 16_384])
    store = folder / "store"

    def layerstore(*words):
        printed, *cost = run(args.binary, "--store", store, "--quiet", "--format", "json", *words)
        return json.loads(printed), *cost

    known = {found["model"] for found in layerstore("models")[0]} if store.exists() else set()
    if "as it is" not in known:
        layerstore("import", args.model, "--model", "as it is")
    print("| weights | MB | mean KL | 99 % KL | same likeliest | perplexity | made in, s | memory, MB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)

    def row(name, size, cost=None):
        found = layerstore("perplexity", name, "--text", other, "--against", "as it is")[0]
        against = found["against"]
        cells = [f"{size / 1e6:.1f}", f"{against['mean_kl']:.4f}", f"{against['kl_99']:.3f}"]
        cells += [f"{100 * against['same_top']:.1f} %", f"{found['perplexity']:.3f}"]
        cells += [f"{cost[0]:.0f}", f"{cost[1] / 1e6:.0f}"] if cost else ["", ""]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)

    def stored(name):
        return next(found["stored_bytes"] for found in layerstore("models")[0] if found["model"] == name)

    wanted = lambda name: not args.only or any(part in name for part in args.only)
    if args.llama and wanted("llama.cpp Q3_K_M"):
        matrix, smaller, name = folder / "imatrix.gguf", folder / "Q3_K_M.gguf", "llama.cpp Q3_K_M"
        if not smaller.exists():
            chunks = args.tokens // 512
            tool = [args.llama / "llama-imatrix", "-m", args.model, "-f", calibration, "-o", matrix]
            _, first, _ = run(*tool, "--chunks", chunks, "-c", 512)
            tool = [args.llama / "llama-quantize", "--allow-requantize", "--imatrix", matrix, args.model, smaller, "Q3_K_M"]
            _, second, most = run(*tool)
            cost = (first + second, most)
        else:
            cost = None
        if name not in known:
            layerstore("import", smaller, "--model", name)
        row(name, smaller.stat().st_size, cost)
    row("as it is", args.model.stat().st_size)
    for name, rules in RULES.items():
        if not wanted(name):
            continue
        cost = None
        if name not in known:
            path = folder / "rules.toml"
            path.write_text("".join("[[rule]]\n" + "".join(f"{k} = {toml(v)}\n" for k, v in one.items()) for one in rules))
            options = ("--rules", path, "--calibration-text", calibration, "--calibration-tokens", args.tokens)
            _, *cost = layerstore("import", args.model, "--model", name, *options)
        row(name, stored(name), cost)
    return 0


if __name__ == "__main__":
    sys.exit(main())
