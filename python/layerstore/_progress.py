"""Progress of long work: a bar of tqdm where it is installed, else a line on standard error."""

from __future__ import annotations

import sys


class _Lines:
    def __call__(self, event) -> None:
        if event["event"] == "finished":
            sys.stderr.write("\n" if event["total"] else "")
        elif event["total"]:
            name = event["layer"][-40:]
            sys.stderr.write(f"\r{event['done']:>5} of {event['total']} layers  {name:<40}")
        sys.stderr.flush()


class _Bar:
    def __init__(self, tqdm) -> None:
        self._tqdm, self._bar = tqdm, None

    def __call__(self, event) -> None:
        if self._bar is None:
            self._bar = self._tqdm(total=event["total"], unit="layer")
        if event["event"] == "finished":
            self._bar.close()
            return
        self._bar.set_postfix_str(event["layer"][-40:], refresh=False)
        self._bar.update(event["done"] - self._bar.n)


def bar():
    """Returns a callable that shows progress."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _Lines()
    return _Bar(tqdm)
