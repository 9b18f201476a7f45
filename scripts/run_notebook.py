#!/usr/bin/env python3
"""Runs a notebook from top to bottom and fails if a cell does. The file itself is left as it is.

Needs examples/notebooks/requirements.txt.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def fail(message):
    print(COLOURS.sub("", message), file=sys.stderr)
    return 1


def main():
    parser = argparse.ArgumentParser(description="Run a notebook; exit 1 if a cell fails.")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--timeout", type=int, default=600, help="seconds that one cell may take (default: 600)")
    arguments = parser.parse_args()

    uri = os.environ.get("LAYERSTORE_URI")
    if uri and "://" not in uri:
        # The notebook runs in its own folder.
        os.environ["LAYERSTORE_URI"] = os.path.abspath(uri)

    try:
        notebook = nbformat.read(arguments.notebook, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        return fail(f"{arguments.notebook} cannot be read as a notebook: {error}")

    started = []
    client = NotebookClient(
        notebook,
        timeout=arguments.timeout,
        kernel_name="python3",
        # Not the warning that it talks over TCP: that is the loopback interface, and messages are signed.
        extra_arguments=["--log-level=ERROR"],
        on_cell_execute=lambda cell, cell_index: started.append(cell),
        resources={"metadata": {"path": str(arguments.notebook.resolve().parent)}},
    )
    start = time.monotonic()
    try:
        client.execute()
    except CellExecutionError as error:
        # It says which cell, and carries the traceback.
        return fail(f"{arguments.notebook}: {error}")
    except (CellTimeoutError, DeadKernelError) as error:
        reason = str(error).strip().splitlines()[0]
        return fail("\n\n".join([f"{arguments.notebook}: {reason}", *(cell.source for cell in started[-1:])]))
    print(f"{arguments.notebook}: {len(started)} cells ran in {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
