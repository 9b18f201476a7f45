"""Imports by many processes, on one machine or several: Ray runs the workers, the store holds what they make.

>>> from layerstore.ray import import_model
>>> report = import_model("model/", "mine", store="/shared/layers", rules="rules.toml")  # doctest: +SKIP

Artifacts are named by what they hold: work that is done twice, by a worker that died or by one that was slow, does no harm. One process commits
the model, at the end, as one version.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

try:
    import ray
except ImportError as _error:
    raise ImportError("layerstore.ray needs Ray: pip install 'layerstore[ray]'") from _error

from . import _native
from ._progress import bar
from .errors import InvalidInputError, LayerstoreError

__all__ = ["import_model"]

# What a worker is given at once, where no more is said: enough that reading and starting do not count.
_BATCH_BYTES = 256 << 20


def import_model(
    path: str | os.PathLike[str],
    name: str,
    *,
    store: str | os.PathLike[str],
    rules: Any = None,
    statistics: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    resources: Mapping[str, Any] | None = None,
    retries: int = 3,
    batch_bytes: int | None = None,
    message: str | None = None,
    storage_options: Mapping[str, str] | None = None,
    progress: bool | Callable[[dict[str, Any]], None] = False,
) -> dict[str, Any]:
    """Puts the model at ``path`` into a store as model ``name``, its layers compressed by Ray's workers. The result is that of
    ``Store.import_model``, artifact by artifact.

    ``path``, ``store`` and ``statistics`` have to be the same files for every node. ``resources`` are what each worker takes, as Ray's actors have
    them: ``{"num_cpus": 4}``, ``{"resources": {"big": 1}}``; a worker computes with as many threads as it has processors. ``workers`` are as many
    as the cluster has room for, where it is not said. A worker that dies is started again, and its layers are given out again, ``retries``
    times. Where no node of the cluster has such resources, a ``RuntimeWarning`` says so, and one that joins is waited for. ``storage_options`` are those of ``layerstore.open``, for every worker; without them the environment of its node says how a
    store on S3 is reached. ``progress=True`` shows a bar; a callable is told each step, with the worker's process.

    Ctrl-C, and an error of any worker, ends all; nothing is committed then, and what was made is found by the next import. Raises what
    ``Store.import_model`` raises, and ``LayerstoreError`` for layers whose workers died again and again.
    """
    for what, value, least in (("workers", workers, 1), ("retries", retries, 0), ("batch_bytes", batch_bytes, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InvalidInputError(f"{what}: found {value!r}, expected a whole number, {least} or more")
    path, uri = os.fspath(path), os.fspath(store)
    if "://" not in uri:
        uri = str(Path(uri).expanduser().absolute())
    if uri.startswith("memory:"):
        raise InvalidInputError(f"store: found '{uri}', expected one that other processes see")
    if "://" not in path:
        path = str(Path(path).expanduser().absolute())
    taken = {"num_cpus": 1, **(resources or {})}
    work = {"rules": _absolute(rules), "calibration": _absolute(statistics)}
    tell = bar() if progress is True else progress or (lambda event: None)
    options = dict(storage_options or {}) or None
    opened = _native.create(uri, storage_options=options)
    with opened.lease():
        plan = opened.plan(path, check_values=False, **work)
        # A file that is changed meanwhile would have the workers follow other rules.
        work["rules"] = _text(work["rules"])
        layers = sorted(plan["layers"], key=lambda layer: -layer["dense_bytes"])
        batches = list(_batches(layers, batch_bytes or _BATCH_BYTES))
        count = min(workers or _room(taken), len(batches))
        if count > 0:
            _require(taken)
        made: dict[str, dict[str, Any]] = {}
        written = 0
        if count > 0:
            bytes_total = sum(layer["dense_bytes"] for layer in layers)
            tell({"event": "started", "layer": "", "done": 0, "total": len(layers), "bytes_done": 0, "bytes_total": bytes_total})
            for done in _run((uri, options, path, work), batches, count, taken, retries):
                written += done["written_bytes"]
                for layer in done["layers"]:
                    made[layer["layer"]] = layer
                    event = {"event": "skipped" if layer["reused"] else "done", "layer": layer["layer"], "worker": done["worker"]}
                    sizes = {"bytes_done": sum(layer["dense_bytes"] for layer in made.values()), "bytes_total": bytes_total}
                    tell({**event, "done": len(made), "total": len(layers), **sizes})
        # What no worker made, this makes.
        report = opened.import_model(path, name, message=message, **work)
    tell({"event": "finished", "layer": "", "done": len(layers), "total": len(layers), "bytes_done": 0, "bytes_total": 0})
    return {**_merged(report, made), "written_bytes": report["written_bytes"] + written}


def _absolute(given: Any) -> Any:
    """A path for processes in other folders; anything else as it is."""
    return str(Path(given).expanduser().absolute()) if _is_path(given) else given


def _is_path(given: Any) -> bool:
    return isinstance(given, os.PathLike) or (isinstance(given, str) and "\n" not in given and "[[" not in given)


def _text(rules: Any) -> Any:
    """What a file of rules says; anything else as it is."""
    # Behind a line's end it is taken for no path.
    return Path(rules).read_text(encoding="utf-8") + "\n" if _is_path(rules) else rules


def _require(taken: Mapping[str, Any]) -> None:
    """Warns where no node has what a worker takes."""
    if not ray.is_initialized():
        ray.init()
    named = {"CPU": taken["num_cpus"], "GPU": taken.get("num_gpus"), "memory": taken.get("memory"), **(taken.get("resources") or {})}
    wanted = {what: count for what, count in named.items() if count}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(what, 0) >= count for what, count in wanted.items()) for node in nodes):
        told = ", ".join(f"{what} {count}" for what, count in wanted.items())
        warnings.warn(f"no node of the cluster has what a worker takes ({told}): one that joins it is waited for", RuntimeWarning, stacklevel=3)


def _room(taken: Mapping[str, Any]) -> int:
    """Workers that the cluster has processors for."""
    if not ray.is_initialized():
        ray.init()
    return max(1, int(ray.cluster_resources().get("CPU", 1) / max(taken["num_cpus"], 1)))


def _batches(layers: Sequence[Mapping[str, Any]], most: int) -> Iterator[list[str]]:
    """Names of layers, the largest first, by as many as have so many bytes together, or one."""
    batch: list[str] = []
    size = 0
    for layer in layers:
        if batch and size + layer["dense_bytes"] > most:
            yield batch
            batch, size = [], 0
        batch.append(layer["layer"])
        size += layer["dense_bytes"]
    if batch:
        yield batch


class _Worker:
    """Compresses layers into the store, in a process of Ray's."""

    def __init__(self, uri: str, storage_options: dict[str, str] | None, path: str, work: Mapping[str, Any]) -> None:
        self.store, self.path, self.work = _native.open(uri, storage_options=storage_options), path, work

    def compress(self, layers: list[str]) -> dict[str, Any]:
        report: dict[str, Any] = self.store.compress_layers(self.path, layers, **self.work)
        return {**report, "worker": os.getpid()}


def _run(
    arguments: tuple[str, dict[str, str] | None, str, Mapping[str, Any]],
    batches: list[list[str]],
    count: int,
    taken: Mapping[str, Any],
    retries: int,
) -> Iterator[dict[str, Any]]:
    """Gives batches to workers, and yields what each became as it is done."""
    threads = str(max(1, int(taken["num_cpus"])))
    options = {"max_restarts": retries, "max_task_retries": retries, "runtime_env": {"env_vars": {"RAYON_NUM_THREADS": threads}}}
    worker = ray.remote(_Worker).options(**options, **taken)
    idle = [worker.remote(*arguments) for _ in range(count)]
    all_workers, waiting, running = list(idle), list(reversed(batches)), {}
    try:
        while waiting or running:
            while idle and waiting:
                actor, batch = idle.pop(), waiting.pop()
                running[actor.compress.remote(batch)] = (actor, batch)
            # Not for ever, so that Ctrl-C comes through.
            ready, _ = ray.wait(list(running), num_returns=1, timeout=0.5)
            for reference in ready:
                actor, batch = running.pop(reference)
                idle.append(actor)
                yield _result(reference, batch, retries)
    finally:
        for actor in all_workers:
            ray.kill(actor)


def _result(reference: Any, batch: list[str], retries: int) -> dict[str, Any]:
    try:
        done: dict[str, Any] = ray.get(reference)
        return done
    except ray.exceptions.RayTaskError as error:
        # As it was raised there, with what came before it.
        raise (error.cause if isinstance(error.cause, Exception) else error) from error
    except ray.exceptions.RayActorError as error:
        layers = f"'{batch[0]}'" + (f" and {len(batch) - 1} more" if len(batch) > 1 else "")
        raise LayerstoreError(f"layer {layers}: its worker died {retries + 1} times, expected it to be done: {error}") from error


def _merged(report: dict[str, Any], made: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The report of the import that committed, with what the workers measured of the layers that they made."""
    layers = []
    for layer in report["layers"]:
        own = made.get(layer["layer"])
        same = own is not None and own["artifact"] == layer["artifact"]
        layers.append({**layer, **own} if same else layer)
    return {**report, "layers": layers}
