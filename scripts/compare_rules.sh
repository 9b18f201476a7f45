#!/usr/bin/env bash
# compare_rules.sh BINARIES RULES.toml ...: the demo's model under each of these rules, side by side.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
shift
demo=demo
if [ ! -f "$demo/calibration.safetensors" ]; then
    echo "$demo/calibration.safetensors is not there: \`make demo\` fetches the model and captures it" >&2
    exit 1
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
layerstore() { "$bin/layerstore" --store "$folder/layers" --quiet "$@"; }

layerstore import "$demo/minilm/model.safetensors" --model f32 | tail -n 1
models=(--model f32)
for rules in "$@"; do
    name=$(basename "$rules" .toml)
    layerstore import "$demo/minilm/model.safetensors" --model "$name" --rules "$rules" \
        --calibration "$demo/calibration.safetensors" | tail -n 1
    models+=(--model "$name")
done
"$bin/examples/minilm_embeddings" --store "$folder/layers" --tokenizer "$demo/minilm/tokenizer.json" "${models[@]}"
