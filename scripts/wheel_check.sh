#!/usr/bin/env bash
# wheel_check.sh FOLDER PYTHON: installs the newest wheel of FOLDER in an environment of its own, and runs the first lines of
# python/README.md there.
set -euo pipefail
cd "$(dirname "$0")/.."
wheel=$(ls -t "$1"/layerstore-*.whl | head -n 1)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$2" -m venv "$work/environment"
"$work/environment/bin/python" -m pip install --quiet --disable-pip-version-check "$wheel"
awk '/^```python$/ { inside = 1; next } /^```$/ { if (inside) exit } inside' python/README.md > "$work/lines.py"
# Without Rust, and without the checkout, on the path.
(cd "$work" && env -i PATH=/usr/bin:/bin "$work/environment/bin/python" lines.py)
printf '%s: %s\n' "$wheel" "$(du -h --apparent-size "$wheel" | cut -f1)"
