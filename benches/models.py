#!/usr/bin/env python3
"""Tokens per second of a whole language model from a store, beside llama.cpp on the same GGUF file.

    python benches/models.py MODEL.gguf --binary target/debug/layerstore [--threads N] [--rounds N]

Both take turns, so that what else a machine does meets both; ratios are medians of those of each round. Needs
llama-cpp-python, which builds llama.cpp from source for this processor.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROMPT, GENERATED = 512, 128


def llama_cpp(cached):
    """Tokens per second of a prompt, and of tokens one by one."""
    tokens = [i * 37 % 40_000 + 100 for i in range(PROMPT)]
    cached.reset()
    since = time.perf_counter()
    cached.eval(tokens)
    prompt = PROMPT / (time.perf_counter() - since)
    cached.reset()
    cached.eval([1])
    since = time.perf_counter()
    for token in tokens[:GENERATED]:
        cached.eval([token])
    return prompt, GENERATED / (time.perf_counter() - since)


def ours(binary, store, activations, threads):
    """The same, and the bytes of weights and cache, and the largest resident memory of the process."""
    command = [binary, "--store", store, "--format", "json", "--quiet", "bench", "m", "-r", "1"]
    command += ["-p", str(PROMPT), "-n", str(GENERATED), "--activations", activations]
    environment = dict(os.environ, RAYON_NUM_THREADS=str(threads))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
    found = json.loads(process.stdout.read())
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    own = found["weight_bytes"] + found["cache_bytes"]
    return found["prompt_tokens_per_second"][0], found["generated_tokens_per_second"][0], own, used.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--binary", default="target/debug/layerstore")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from llama_cpp import Llama

    threads = args.threads
    peer = Llama(
        str(args.model), n_ctx=1024, n_batch=PROMPT, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        command = [args.binary, "--store", store, "--quiet", "import", str(args.model), "--model", "m"]
        subprocess.run(command, check=True, capture_output=True)
        llama_cpp(peer)
        rounds = []
        for _ in range(args.rounds):
            theirs = llama_cpp(peer)
            found = {activations: ours(args.binary, store, activations, threads) for activations in ("f32", "int8")}
            rounds.append((theirs, found))
    print(f"{args.model.name}, {threads} threads, {args.rounds} rounds; tokens per second, medians")
    print(f"{'':<22} {'pp512':>8} {'tg128':>8}   ratios to llama.cpp")
    median = statistics.median
    print(f"{'llama.cpp':<22} {median(r[0][0] for r in rounds):>8.1f} {median(r[0][1] for r in rounds):>8.1f}")
    for activations in ("f32", "int8"):
        values = [[r[1][activations][i] for r in rounds] for i in (0, 1)]
        ratios = [[r[1][activations][i] / r[0][i] for r in rounds] for i in (0, 1)]
        text = ", ".join(f"{median(ratio):.2f}× ({min(ratio):.2f} to {max(ratio):.2f})" for ratio in ratios)
        own, most = (max(r[1][activations][i] for r in rounds) / 1e6 for i in (2, 3))
        text += f"; {own:.0f} MB of weights and cache, {most:.0f} MB at most"
        print(f"{'layerstore, ' + activations + ' inputs':<22} {median(values[0]):>8.1f} {median(values[1]):>8.1f}   {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
