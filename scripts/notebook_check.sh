#!/usr/bin/env bash
# notebook_check.sh BINARIES PYTHON: makes small stores, runs the notebooks and the code of docs/notebooks.md on them, and reads all rules.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1 python=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
checkpoint=tests/fixtures/small.safetensors
layerstore() { "$bin/layerstore" --quiet --store "$work/layers" "$@" > /dev/null; }
layerstore import "$checkpoint" --model small-f32
for name in int4 keys; do
    layerstore import "$checkpoint" --model "small-$name" --rules "tests/fixtures/$name.toml" \
        --calibration tests/fixtures/small-calibration.safetensors
done
# The same layers in each backend, for the cell that compares them.
for backend in 'pq", subvectors = 12, codewords = 32' 'ivf_pq", clusters = 6, probes = 4, subvectors = 12, bits = 5' \
    'hnsw", expansion_search = 8, store_float_keys = true'; do
    printf '[[rule]]\nlayers = "blocks.*"\nmethod = "key_value"\nbackend = { type = "%s }\n' "$backend" > "$work/rules.toml"
    layerstore import "$checkpoint" --model "small-${backend%%\"*}" --rules "$work/rules.toml" \
        --calibration tests/fixtures/small-calibration.safetensors
done
layerstore snapshot create checked
LAYERSTORE_URI="$work/layers" "$python" scripts/run_notebook.py examples/notebooks/query_layers.ipynb
# The one on the package finds it in the checkout, as `make python` left it.
LAYERSTORE_URI="$work/layers" PYTHONPATH=$PWD/python "$python" scripts/run_notebook.py examples/notebooks/package.ipynb

# Rules in the documents and the examples are read, and name settings that there are.
awk -v out="$work/rules-" '/^```toml$/ { file = out (++n) ".toml"; next } /^```$/ { file = "" } file { print > file }' README.md docs/*.md
for rules in "$work"/rules-*.toml examples/rules/*.toml; do
    layerstore import "$checkpoint" --model rules --rules "$rules" \
        --calibration tests/fixtures/small-calibration.safetensors --dry-run
done

# Every method in every format, and what the command says of it.
page=$work/page
mkdir "$page"
layerstore() { "$bin/layerstore" --quiet --store "$page/layers" "$@"; }
import() {
    layerstore import "$checkpoint" --model "$@" > /dev/null
    layerstore export "$1" --output "$page/$1.safetensors" > /dev/null
}
import dense
layerstore snapshot create first > /dev/null
calibration=tests/fixtures/small-calibration.safetensors
import f32-keys --rules tests/fixtures/keys.toml --calibration "$calibration"
import uncalibrated-keys --rules tests/fixtures/formats/keys.toml
for rules in tests/fixtures/formats/*.toml; do
    import "$(basename "$rules" .toml)" --rules "$rules" --calibration "$calibration"
done
# What other programs have quantised, in all formats that are kept; the two that are not are refused.
for file in tests/fixtures/formats/gguf/*.gguf tests/fixtures/formats/quantized/*/; do
    case $file in *iq2_xxs* | *iq3_s*) continue ;; esac
    name=$(basename "$file" .gguf)
    layerstore import "$file" --model "$name" > /dev/null
    layerstore export "$name" --output "$page/$name.safetensors" > /dev/null
done
layerstore --format json models > "$page/models.json"
cp "$calibration" "$page/inputs.safetensors"
for block in blocks.0 blocks.1; do
    layerstore attend attention "$block" --q "$calibration:$block.mix" --output "$page/$block.npy" > /dev/null
done
"$python" scripts/page_check.py docs/notebooks.md "$page"
