#!/usr/bin/env python3
"""Imports a large sharded checkpoint, kills the import some times, and prints what it took.

The checkpoint is sparse: a page of each MiB holds random numbers and the rest are holes, so it takes little of the disk, and reading it
takes no time of it. Every layer differs from every other. Needs Python alone:

    python3 scripts/import_scale.py target/debug/layerstore --gib 2 --shards 4 --kills 3
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 1 << 20
PRINTED = ["--format", "json", "--quiet"]
WIDTH = 4096

INT4 = """
[[rule]]
layers = 'model\\.layers\\..*'
method = 'low_rank'
rank = 0
weight = { type = 'int4', group = 32 }
"""


def tensors(gib):
    """Names and shapes of bf16 tensors: an embedding of an eighth of all bytes, and layers of 4096 x 4096."""
    rows = max(WIDTH, int(gib * (1 << 30)) // 2 // WIDTH)
    embedding = max(1024, rows // 8)
    layers = max(1, (rows - embedding) // WIDTH)
    named = [("model.embed_tokens.weight", [embedding, WIDTH])]
    return named + [(f"model.layers.{i}.proj.weight", [WIDTH, WIDTH]) for i in range(layers)]


def make(folder, gib, shards):
    """Makes the checkpoint; returns its bytes and those of its largest tensor."""
    folder.mkdir(parents=True)
    named = tensors(gib)
    each = -(-len(named) // shards)
    weight_map, total, largest = {}, 0, 0
    for shard in range(shards):
        part = named[shard * each : (shard + 1) * each]
        if not part:
            continue
        header, at = {}, 0
        for name, shape in part:
            size = 2 * shape[0] * shape[1]
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at, largest = at + size, max(largest, size)
        total += at
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        numbers = random.Random(shard)
        with open(folder / file, "wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            start = out.tell()
            out.truncate(start + at)
            for name, _ in part:
                weight_map[name] = file
                first, last = header[name]["data_offsets"]
                for place in range(first, last, MIB):
                    out.seek(start + place)
                    # Small numbers of either sign.
                    page = (0x3C00 + numbers.randrange(0x200) | numbers.randrange(2) << 15 for _ in range(512))
                    out.write(struct.pack("<512H", *page))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total, largest


def read_and_hash(folder):
    """Seconds to read the files once, and to read and hash them."""
    import hashlib

    started = time.monotonic()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb", buffering=0) as source:
            while source.read(16 * MIB):
                pass
    read = time.monotonic() - started
    started = time.monotonic()
    for file in sorted(folder.glob("*.safetensors")):
        digest = hashlib.blake2b()
        with open(file, "rb", buffering=0) as source:
            while chunk := source.read(16 * MIB):
                digest.update(chunk)
    return read, time.monotonic() - started


def run(command, kill_after=None):
    """Runs a command; returns its exit status, seconds, and what the kernel counted: peak MiB, bytes read and written."""
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # A file: nobody reads a pipe meanwhile, and a long report would fill it.
    answer = tempfile.TemporaryFile()
    process = subprocess.Popen(command, stdout=answer, stderr=subprocess.DEVNULL)
    counted, peak = {}, 0
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/io").read_text().splitlines()
            counted = dict(line.split(": ") for line in lines) or counted
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    peak = int(line.split()[1])
        except (OSError, ValueError):
            pass
        if kill_after is not None and time.monotonic() - started > kill_after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    answer.seek(0)
    output = answer.read()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "status": process.returncode,
        "seconds": time.monotonic() - started,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mib": peak / 1024,
        "read": int(counted.get("rchar", 0)),
        "written": int(counted.get("wchar", 0)),
        "output": output,
    }


def main():
    """Parses the arguments, and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", help="the layerstore command")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rules", choices=["int4", "dense"], default="int4")
    parser.add_argument("--kills", type=int, default=0, help="times that an import is killed, and begun again")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", help="a folder for the checkpoint and the stores, which stay there")
    options = parser.parse_args()
    folder = Path(options.keep or tempfile.mkdtemp(prefix="layerstore-scale-"))
    try:
        measure(options, folder)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


def artifacts(binary, store):
    """The artifacts of the model's layers, by name."""
    command = [binary, *PRINTED, "--store", store, "layers", "m"]
    listed = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    rows = listed["layers"] if isinstance(listed, dict) else listed
    return {row["layer"]: row["artifact"] for row in rows}


def measure(options, folder):
    """Makes the checkpoint, imports it, and prints the figures."""
    checkpoint = folder / "checkpoint"
    total, largest = make(checkpoint, options.gib, options.shards)
    gib = total / (1 << 30)
    rules = folder / "rules.toml"
    rules.write_text(INT4 if options.rules == "int4" else "")
    read, hashed = read_and_hash(checkpoint)
    print(f"checkpoint: {gib:.2f} GiB in {options.shards} shards, the largest layer {largest / MIB:.0f} MiB, {options.rules}")
    print(f"reading alone: {read / gib:.2f} s a GiB; reading and hashing with BLAKE2b on one core: {hashed / gib:.2f} s a GiB")

    def command(store):
        rest = ["--rules", str(rules)] if options.rules == "int4" else []
        return [options.binary, *PRINTED, "--store", store, "import", str(checkpoint), "--model", "m", *rest]

    whole = str(folder / "whole")
    done = run(command(whole))
    if done["status"] != 0:
        sys.exit(f"the import ended with status {done['status']}")
    idle = 1 - done["cpu"] / done["seconds"] / (os.cpu_count() or 1)
    print(
        f"import: {done['seconds'] / gib:.2f} s a GiB, {done['cpu'] / gib:.2f} s of processors a GiB ({100 * idle:.0f} % idle), "
        f"peak {done['peak_mib']:.0f} MiB, read {done['read'] / total:.2f} times, wrote {done['written'] / (1 << 30):.2f} GiB"
    )
    again = run(command(whole))
    print(
        f"again, all there: {again['seconds'] / gib:.2f} s a GiB, peak {again['peak_mib']:.0f} MiB, read {again['read'] / total:.2f} times"
    )
    if not options.kills:
        return
    numbers = random.Random(options.seed)
    store, kills, lost = str(folder / "killed"), 0, 0.0
    while kills < options.kills:
        after = numbers.uniform(0.1, 0.9) * done["seconds"]
        if run(command(store), after)["status"] == -signal.SIGKILL:
            kills += 1
            lost += after
        else:
            break
    last = run(command(store))
    report = json.loads(last["output"])
    reused = sum(layer["reused"] for layer in report["layers"])
    same = artifacts(options.binary, store) == artifacts(options.binary, whole)
    print(
        f"killed {kills} times after {lost:.0f} s in all; the last run took {last['seconds']:.0f} s and found {reused} of "
        f"{len(report['layers'])} layers made; artifacts equal those of the undisturbed import: {same}"
    )
    if not same or last["status"] != 0:
        sys.exit(1)


if __name__ == "__main__":
    main()
