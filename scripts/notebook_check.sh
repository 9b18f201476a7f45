#!/usr/bin/env bash
# notebook_check.sh BINARIES PYTHON: makes a small store and runs the notebook on it.
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
