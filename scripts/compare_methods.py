#!/usr/bin/env python3
"""compare_methods.py BINARY FOLDER [NAME ...]: SmolLM2-135M-Instruct under each method, as a table in Markdown.

The model reads 2,048 tokens of this project's documents to be calibrated, and is measured against its own 4-bit weights on
README.md. FOLDER keeps the model and the store: run again, what was made before is not made again. With names, only these.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINEAR = r"model\.layers\..*_proj"
ATTENTION = {
    "layers": r"model\.layers\.\d+\.self_attn",
    "method": "vq_attention",
    "mechanism": "vq_k",
    "n_head": 9,
    "n_kv_head": 3,
    "mem_len": 128,
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
}


def packed(kind, group, **more):
    weight = {"type": kind, "group": group, "scales": "f16"}
    return [{"layers": LINEAR, "method": "low_rank", "weight": weight, "rounding": "gptq", **more}]


def key_value(keys):
    """So many keys a query; layers of keys and values have 192 in all."""
    rule = {"method": "key_value", "backend": {"type": "flat", "keys": "int8"}, "values": "int8"}
    narrow = {"layers": r"model\.layers\..*\.(k|v)_proj", "expected_keys_per_query": min(keys, 192)}
    return [rule | narrow, rule | {"layers": LINEAR, "expected_keys_per_query": keys}]


RULES = {
    "as it is": [],
    "low_rank, 4 bits": packed("int4", 64),
    "low_rank, 3 bits": packed("int3", 32),
    "low_rank, 3 bits, rank 16": packed("int3", 32, rank=16),
    "low_rank, 2 bits, rank 32": packed("int2", 32, rank=32),
    "ternary, rank 64": [{"layers": LINEAR, "method": "ternary", "rank": 64}],
    "key_value, 384 keys": key_value(384),
    "key_value, 256 keys": key_value(256),
    "key_value, 128 keys": key_value(128),
    "vq_attention, 512 codes": [ATTENTION | {"n_code": 512}],
    "vq_attention, 2048 codes": [ATTENTION | {"n_code": 2048}],
}


def toml(value):
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + " }"
    return f"'{value}'" if isinstance(value, str) else str(value).lower()


def main():
    binary, folder = sys.argv[1], Path(sys.argv[2])
    names = sys.argv[3:] or list(RULES)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, ROOT / "scripts/fetch_model.py", "smollm2", folder], check=True)
    model = next(folder.glob("*.gguf"))
    calibration, text, rules = folder / "calibration.txt", folder / "text.txt", folder / "rules.toml"
    calibration.write_text("".join(path.read_text() for path in sorted(ROOT.glob("docs/*.md"))))
    text.write_text((ROOT / "README.md").read_text())

    def layerstore(*words):
        command = [binary, "--store", folder / "store", "--quiet", "--format", "json", *words]
        done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    if all(known["model"] != "as it is" for known in (layerstore("models") if (folder / "store").exists() else [])):
        layerstore("import", model, "--model", "as it is")
    print("| method | MB | cache of 1,000 tokens, MB | mean KL | same likeliest | tokens/s written |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in names:
        rows = "".join("[[rule]]\n" + "".join(f"{k} = {toml(v)}\n" for k, v in rule.items()) for rule in RULES[name])
        if rows:
            rules.write_text(rows)
            options = ("--rules", rules, "--calibration-text", calibration, "--calibration-tokens", 2048)
            layerstore("import", model, "--model", name, *options)
        against = layerstore("perplexity", name, "--text", text, "--against", "as it is")["against"]
        speed = layerstore("bench", name, "-p", 1000, "-n", 64, "-r", 1)
        stored = next(known for known in layerstore("models") if known["model"] == name)["stored_bytes"]
        row = [f"{stored / 1e6:.1f}", f"{speed['cache_bytes'] / 1e6:.1f}", f"{against['mean_kl']:.4f}"]
        row += [f"{100 * against['same_top']:.1f} %", f"{speed['generated_tokens_per_second'][0]:.0f}"]
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
