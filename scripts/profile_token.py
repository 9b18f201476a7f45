#!/usr/bin/env python3
"""profile_token.py BINARY STORE MODEL [--activations int8]: where the time of a written token goes, by Linux's perf.

Samples `layerstore bench MODEL -p 1 -n 256` on all threads, and groups the functions that they were in. Shares are of all samples:
a thread that waits for the other counts as waiting.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

GROUPS = [
    ("products with packed weights", r"kernels::(avx2|avx512|portable|tile|packed|products|simd|fused)|quant::"),
    ("inputs laid out and rounded", r"kernels::(inputs|activations|layout)"),
    ("attention: scores and sums over the cache", r"kernels::rows|attention|softmax|kv_cache|from_f32"),
    ("waiting for the other threads", r"linalg::threads|sched_yield|futex|schedule|spin"),
    ("norms, rotary positions, gates", r"norm|rotary|activation::|exp"),
    ("opening the store", r"lance|arrow|tokio|object_store|datafusion|blake3|serde|clap|memmove|alloc|free"),
]


def main():
    if len(sys.argv) < 4:
        raise SystemExit(__doc__)
    binary, store, model, *more = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "perf.data"
        bench = [binary, "--store", store, "--quiet", "bench", model, "-p", "1", "-n", "256", "-r", "4", *more]
        subprocess.run(["perf", "record", "-q", "-F", "1999", "-o", data, "--", *bench], check=True)
        command = ["perf", "report", "-q", "-i", data, "--stdio", "--no-children", "-F", "overhead,symbol"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    shares, rest = dict.fromkeys([name for name, _ in GROUPS], 0.0), 0.0
    for line in report.splitlines():
        found = re.match(r"\s*([\d.]+)%\s+\[.\]\s+(.*)", line) or re.match(r"\s*([\d.]+)%\s+\[k\]\s+(.*)", line)
        if not found:
            continue
        share, symbol = float(found[1]), found[2]
        name = next((name for name, pattern in GROUPS if re.search(pattern, symbol)), None)
        if name is None:
            rest += share
        else:
            shares[name] += share
    for name, share in [*shares.items(), ("the rest", rest)]:
        print(f"{share:5.1f} %  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
