#!/usr/bin/env python3
"""The Python package beside PyTorch, in one process and by turns.

    PYTHONPATH=python python benches/python.py MODEL.gguf [--rounds N]

What a call from Python and from PyTorch costs, threads of both pools at once, and SmolLM2 in transformers with layers of the store beside
f32 and beside PyTorch's own dynamic int8. Needs torch and transformers.
"""

import argparse
import statistics
import tempfile
import time
import warnings

import numpy as np
import torch

import layerstore
import layerstore.torch as lt
from layerstore.transformers import from_store, tokenizer_from_store


def seconds(work, least=0.3):
    """Seconds of one call: the best of five runs of at least this long."""
    work()
    count = 1
    while True:
        since = time.perf_counter()
        for _ in range(count):
            work()
        taken = time.perf_counter() - since
        if taken > least:
            break
        count = max(count + 1, int(count * least / max(taken, 1e-6) * 1.2))
    found = [taken / count]
    for _ in range(4):
        since = time.perf_counter()
        for _ in range(count):
            work()
        found.append((time.perf_counter() - since) / count)
    return min(found)


def calls():
    print("one input, microseconds a call")
    print(f"{'':<14} {'torch f32':>10} {'NumPy':>8} {'Linear':>8} {'with gradients':>15}")
    torch.manual_seed(0)
    for inputs, outputs in ((8, 8), (1536, 384)):
        linear = torch.nn.Linear(inputs, outputs)
        module = lt.Linear.compress(linear, weight={"type": "int4", "group": 8 if inputs == 8 else 64}, rank=0)
        x = torch.randn(1, inputs)
        tracked = x.clone().requires_grad_()
        array, layer = x.numpy(), module.layer
        with torch.no_grad():
            found = [seconds(lambda: linear(x)), seconds(lambda: layer(array)), seconds(lambda: module(x))]
        found.append(seconds(lambda: module(tracked)))
        print(f"{inputs:>5} to {outputs:<5} " + " ".join(f"{1e6 * one:>{width}.1f}" for one, width in zip(found, (10, 8, 8, 15))))


def pools():
    """Half of the work by torch's pool and half by ours, by turns, beside each alone."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(1024, 1024)
    module = lt.Linear.compress(linear, weight={"type": "int4", "group": 64}, rank=0)
    x = torch.randn(64, 1024)

    def run(*parts):
        with torch.no_grad():
            for part in parts:
                part(x)

    alone = [seconds(lambda: run(linear, linear)), seconds(lambda: run(module, module))]
    both = seconds(lambda: run(linear, module))
    print(
        f"batches of 64 at 1024 x 1024, two products: torch {1e3 * alone[0]:.2f} ms, layerstore {1e3 * alone[1]:.2f} ms,"
        f" one of each {1e3 * both:.2f} ms, {both / statistics.mean(alone):.2f} of their mean"
    )


def torchao(folder):
    """The same model with torchao's 4-bit weights, where it is installed and runs on this processor."""
    import transformers

    try:
        from torchao.quantization import Int8DynamicActivationInt4WeightConfig, quantize_

        model = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/dense", dtype=torch.float32).eval()
        quantize_(model, Int8DynamicActivationInt4WeightConfig(group_size=32))
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))
        return {"torchao, int4 and int8": model}
    except Exception as error:  # noqa: BLE001: whatever it is, the others are measured without it
        print(f"torchao is left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return {}


def decoding(path, rounds, tokens=64):
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        store = layerstore.create(f"{folder}/layers")
        store.import_model(path, "m")
        stored, tokenizer = from_store(store, "m"), tokenizer_from_store(store, "m")
        store.export("m", f"{folder}/dense", dtype="f32", allow_dequantize=True)
        # The same weights as numbers.
        dense = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/dense", dtype=torch.float32).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dynamic = torch.ao.quantization.quantize_dynamic(dense, {torch.nn.Linear}, dtype=torch.qint8)
        models = {"torch f32": dense, "torch int8, dynamic": dynamic, **torchao(folder), "layerstore": stored}
        rounded = from_store(store, "m")
        for module in rounded.modules():
            if isinstance(module, lt.Linear) and module.layer.method == "low_rank":
                module._slot.layer = module.layer.with_settings({"activations": "int8"})
        models["layerstore, int8 inputs"] = rounded
        whole = store.language_model("m").with_activations("int8")
        ids = tokenizer("Once upon a time, in a village by the sea,", return_tensors="pt").input_ids

        def write(model, count):
            with torch.no_grad():
                model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)

        for model in models.values():
            write(model, 2)
        found = {name: [] for name in (*models, "layerstore, run whole")}
        for _ in range(rounds):
            for name, model in models.items():
                since = time.perf_counter()
                write(model, tokens)
                found[name].append(tokens / (time.perf_counter() - since))
            done = whole.generate(ids[0].tolist(), max_tokens=tokens)
            found["layerstore, run whole"].append(len(done["tokens"]) / (done["prompt_seconds"] + done["seconds"]))
    print(f"{tokens} tokens of SmolLM2 one by one, medians of {rounds} rounds: tokens per second, ratio to torch f32, to int8")
    first, second = (statistics.median(found[name]) for name in ("torch f32", "torch int8, dynamic"))
    for name, rates in found.items():
        rate = statistics.median(rates)
        print(f"{name:<26} {rate:>7.1f} {rate / first:>6.2f}x {rate / second:>6.2f}x")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    np.random.seed(0)
    calls()
    pools()
    decoding(args.model, args.rounds)


if __name__ == "__main__":
    main()
