#!/usr/bin/env bash
# demo_minilm.sh BINARIES PYTHON: a text encoder into a store, compressed in several ways, and sentences through it.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1 python=$2
out=demo
store=$out/layers
mkdir -p "$out"
rm -rf "$store"
layerstore() { "$bin/layerstore" --store "$store" "$@"; }
step() { printf '\n== %s\n' "$*"; }

if ! "$python" scripts/fetch_model.py minilm "$out/minilm"; then
    step "all-MiniLM-L6-v2 is out of reach: the small synthetic checkpoint of an example serves instead"
    exec "$bin/examples/import_with_rules"
fi
checkpoint=$out/minilm/model.safetensors
embed() { "$bin/examples/minilm_embeddings" --store "$store" --tokenizer "$out/minilm/tokenizer.json" "$@"; }

step "import all-MiniLM-L6-v2 as it is"
layerstore --quiet import "$checkpoint" --model minilm-f32 --message "the checkpoint as it is" | tail -n 1

step "capture calibration inputs: this project's documents, through the model from the store"
cp examples/minilm_embeddings/calibration.txt "$out/calibration.txt"
embed --model minilm-f32 --sentences "$out/calibration.txt" --capture "$out/calibration.safetensors" > /dev/null

for name in correction 4bit keys; do
    step "import it under examples/rules/minilm-$name.toml"
    layerstore --quiet import "$checkpoint" --model "minilm-$name" --rules "examples/rules/minilm-$name.toml" \
        --calibration "$out/calibration.safetensors" --message "rules: minilm-$name" | tail -n 1
done
layerstore snapshot create demo

step "what the store holds"
layerstore models
layerstore log

step "sentences through each model, every layer run from the store at snapshot 'demo'"
embed --at demo --model minilm-f32 --model minilm-correction --model minilm-4bit --model minilm-keys
