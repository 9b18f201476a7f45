#!/usr/bin/env python3
"""compare_rules.py BINARIES RULES.toml ...: all-MiniLM-L6-v2 under each of these rules, as a table in Markdown.

Layers are calibrated on the inputs of `make demo-minilm`, and measured on other text: examples/minilm_embeddings/evaluation.txt.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo"
TEXT = ROOT / "examples/minilm_embeddings/evaluation.txt"


def main():
    parser = argparse.ArgumentParser(description="Compare rules files on all-MiniLM-L6-v2.")
    parser.add_argument("binaries", type=Path)
    parser.add_argument("rules", type=Path, nargs="+")
    arguments = parser.parse_args()
    checkpoint, calibration = DEMO / "minilm/model.safetensors", DEMO / "calibration.safetensors"
    if not calibration.is_file():
        print(f"{calibration} is not there: `make demo-minilm` fetches the model and captures it", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        compare(arguments.binaries.resolve(), checkpoint, calibration, arguments.rules, Path(folder))
    return 0


def compare(binaries, checkpoint, calibration, rules, folder):
    store, activations = folder / "layers", folder / "activations.safetensors"

    def run(program, *words):
        done = subprocess.run([str(word) for word in (program, *words)], stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    def layerstore(*words):
        return run(binaries / "layerstore", "--store", store, "--quiet", "--format", "json", *words)

    def embed(*words):
        program = binaries / "examples/minilm_embeddings"
        tokenizer = checkpoint.with_name("tokenizer.json")
        common = ("--json", "--store", store, "--tokenizer", tokenizer, "--sentences", TEXT)
        return run(program, *common, *words)

    layerstore("import", checkpoint, "--model", "f32")
    embed("--model", "f32", "--capture", activations)
    models = ["--model", "f32"]
    evaluations = {}
    for path in rules:
        layerstore("import", checkpoint, "--model", path.stem, "--rules", path, "--calibration", calibration)
        evaluations[path.stem] = layerstore("evaluate", path.stem, "--activations", activations)
        models += ["--model", path.stem]
        print(f"{path.stem}: imported", file=sys.stderr)
    rows = {row["model"]: row for row in embed(*models)["rows"]}

    print("| rules | MB | times smaller | bits a weight | error of outputs | cosine, mean | lowest | times as fast |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        cells = [name, f"{row['stored_bytes'] / 1e6:.1f}", f"{row['dense_to_stored']:.1f}"]
        if name in evaluations:
            # Attention blocks have no weights of their own.
            layers = [layer for layer in evaluations[name]["layers"] if layer["bits_per_weight"] is not None]
            stored = sum(layer["stored_bytes"] for layer in layers)
            errors = [layer["relative_error"] for layer in layers]
            count = sum(8 * layer["stored_bytes"] / layer["bits_per_weight"] for layer in layers)
            cells += [f"{8 * stored / count:.2f}", f"{sum(errors) / len(errors):.3f}"]
        else:
            cells += ["32.06", "0"]
        cosine = row["cosine_to_baseline"]
        cells += [f"{cosine['mean']:.4f}", f"{cosine['min']:.4f}", f"{row['speed']:.2f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
