#!/usr/bin/env python3
"""peers.py AXL|KERAS_MML FOLDER: runs another system's own tests against this package, with only their import lines changed.

FOLDER is a copy of the system's repository, which is not part of this one. Needs PYTHONPATH=python, the frameworks, and what the tests import
themselves (einops). What fails is listed by pytest; exit status as pytest's.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

# The tests of each, in its repository.
SYSTEMS = {"AXL": ["test_axl.py", "test_utils.py"], "KERAS_MML": ["tests/layers"]}


def adapted(system, text):
    """Changes import lines alone."""
    if system == "AXL":
        text = re.sub(r"^(\s*from )axl(\.layer_improved)?\b", r"\1layerstore.axl", text, flags=re.M)
        text = re.sub(r"^(\s*from )utils( import)", r"\1layerstore.axl.utils\2", text, flags=re.M)
        return re.sub(r"^(\s*import )axl\b", r"\1layerstore.axl as axl", text, flags=re.M)
    text = re.sub(r"^(\s*from )keras_mml\.layers[\w.]*( import)", r"\1layerstore.keras\2", text, flags=re.M)
    return re.sub(r"^(\s*import )keras_mml\.layers\b", r"\1layerstore.keras", text, flags=re.M)


def main():
    if len(sys.argv) != 3 or sys.argv[1] not in SYSTEMS:
        raise SystemExit(__doc__)
    system, folder = sys.argv[1], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as work:
        for name in SYSTEMS[system]:
            for path in [folder / name] if (folder / name).is_file() else sorted((folder / name).rglob("*.py")):
                target = Path(work) / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(adapted(system, path.read_text()))
        raise SystemExit(subprocess.run([sys.executable, "-m", "pytest", "-q", "--tb=line", work]).returncode)


if __name__ == "__main__":
    main()
