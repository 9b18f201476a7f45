#!/usr/bin/env bash
# demo.sh BINARIES PYTHON: a language model into a store, as it is and compressed, and what each of the two says.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1 python=$2
out=demo
store=$out/models
mkdir -p "$out"
rm -rf "$store"
layerstore() { "$bin/layerstore" --store "$store" "$@"; }
step() { printf '\n== %s\n' "$*"; }

if ! "$python" scripts/fetch_model.py smollm2 "$out/smollm2"; then
    step "SmolLM2 is out of reach: all-MiniLM-L6-v2 serves instead"
    exec scripts/demo_minilm.sh "$bin" "$python"
fi
model=$out/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
prompt="Once upon a time, in a village by the sea,"

step "import SmolLM2-135M-Instruct ($(du -h --apparent-size "$model" | cut -f1) of GGUF) as it is, its 4-bit codes kept"
layerstore --quiet import "$model" --model smollm2 --message "the file as it is" | tail -n 1

step "import it in 3 bits (examples/rules/smollm2-3bit.toml), calibrated by reading this project's documents"
cat docs/design.md docs/rules.md > "$out/text.txt"
layerstore --quiet import "$model" --model smollm2-3bit --rules examples/rules/smollm2-3bit.toml \
    --calibration-text "$out/text.txt" --calibration-tokens 512 --message "3 bits" | tail -n 1
layerstore snapshot create demo

for name in smollm2 smollm2-3bit; do
    step "generate with $name, every layer run from the store at snapshot 'demo'"
    layerstore --at demo generate "$name" --prompt "$prompt" --max-tokens 64 --activations int8
done

step "how far the 3 bits are from the 4, on a text that neither was calibrated with"
head -c 4000 README.md > "$out/other.txt"
layerstore --at demo --quiet perplexity smollm2-3bit --against smollm2 --text "$out/other.txt"

step "what the store holds"
layerstore models
layerstore log
