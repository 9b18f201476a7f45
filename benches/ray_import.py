#!/usr/bin/env python3
"""An import by one worker of Ray and by two, each of one thread.

    PYTHONPATH=python python benches/ray_import.py [LAYERS]

The layers are matrices of 1024 x 1024, quantised and corrected with rank 64. Needs Ray and safetensors. What Ray takes to start workers
counts, as it does for everybody; its own processes run before.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
from safetensors.numpy import save_file

import layerstore.ray as lr

ROUNDS = 3
RULES = "[[rule]]\nlayers = '.*'\nmethod = 'low_rank'\nrank = 64\nweight = { type = 'int4', group = 64 }\n"


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 24
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "model.safetensors")
        random = np.random.default_rng(0)
        save_file({f"layer.{i}.weight": random.standard_normal((1024, 1024)).astype("f4") for i in range(layers)}, checkpoint)
        times: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(ROUNDS + 1):
            for workers in (1, 2):
                store = Path(folder, f"store-{turn}-{workers}")
                began = time.perf_counter()
                lr.import_model(checkpoint, "m", store=store, rules=RULES, workers=workers, batch_bytes=4 << 20)
                # The first round finds Ray's processes cold.
                if turn > 0:
                    times[workers].append(time.perf_counter() - began)
        one, two = (statistics.median(times[workers]) for workers in (1, 2))
        print(f"{layers} layers: one worker {one:.1f} s, two {two:.1f} s: {one / two:.2f} times as fast")
    ray.shutdown()


if __name__ == "__main__":
    main()
