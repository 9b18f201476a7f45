"""Whole models of PyTorch: their layers replaced by stored ones, their inputs counted, the models put into a store."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from .._native import Calibration, Layer, Snapshot, Store
from ..errors import NotFoundError
from ._modules import Embedding, Linear


def replace_linears(
    model: nn.Module,
    snapshot: Snapshot | Store,
    name: str,
    *,
    prefix: str = "",
    only: Callable[[str], bool] | None = None,
    include_dense: bool = False,
) -> list[str]:
    """Puts stored layers in the place of the ``nn.Linear`` and ``nn.Embedding`` modules of a model, and returns their names.

    The layer of a module is the one of its name in the stored model, behind ``prefix``. Modules that the store has no layer for, and
    with ``include_dense=False`` those whose layer is dense, stay as they are. ``only`` is asked for each name.
    """
    snapshot = snapshot.latest() if isinstance(snapshot, Store) else snapshot
    layers = snapshot.handles(name)
    found: dict[str, tuple[nn.Module, Layer]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        # Exactly these: what derives from them does more than they do.
        if type(module) not in (nn.Linear, nn.Embedding) or not path or (only is not None and not only(path)):
            continue
        layer = layers.get(prefix + path)
        if layer is None or (layer.method == "dense" and not include_dense):
            continue
        _check(prefix + path, name, layer, module)
        found[path] = module, layer
    # All fit: now they are replaced, a module that is there twice by one.
    made: dict[int, nn.Module] = {}
    for path, (module, layer) in found.items():
        if id(module) not in made:
            made[id(module)] = (Linear if type(module) is nn.Linear else Embedding)(layer).train(module.training)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    replaced = list(found)
    if not replaced:
        known = ", ".join(list(layers)[:5])
        raise NotFoundError(f"model '{name}' has no compressed layer for a module of this one; its layers: {known} …")
    return replaced


def _check(path: str, name: str, layer: Layer, module: nn.Module) -> None:
    """Refuses a layer that does not do what the module does."""
    where, wanted = f"layer '{path}' of model '{name}'", tuple(module.weight.shape)
    if layer.shape != wanted:
        raise ValueError(f"{where}: found {layer.shape}, expected {wanted}")
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise ValueError(f"{where}: found an embedding with max_norm, expected one without: stored rows stay as they are")
        return
    tensors = [tensor["tensor"] for tensor in layer.record["source"]["tensors"]]
    has_bias = any(tensor.endswith("bias") for tensor in tensors[1:])
    if has_bias != (module.bias is not None):
        found, expected = ("a bias" if has else "no bias" for has in (has_bias, module.bias is not None))
        raise ValueError(f"{where}: found {found}, expected {expected}")


def collect_statistics(
    model: nn.Module,
    data: Iterable,
    *,
    tokenizer=None,
    only: Callable[[str], bool] | None = None,
    sample: int | None = None,
    seed: int = 0,
) -> dict[str, Calibration]:
    """Runs a model on data, and returns the statistics of the inputs of its linear layers, by name: ``Store.import_model`` takes them.

    ``data`` are batches: tensors, tuples of arguments, dictionaries of them, or texts, for which ``tokenizer`` is called. Layers that
    are given the same tensor share statistics. Memory does not grow with the number of batches.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if only is not None:
        linears = {name: module for name, module in linears.items() if only(name)}
    if not linears:
        raise ValueError("found no nn.Linear in the model, expected one at least")
    leaders: dict[str, str] = {}
    statistics: dict[str, Calibration] = {}
    # The inputs of this pass, held so that none of them is another in the same place, and who was given them.
    seen: list[tuple[torch.Tensor, int, list[str]]] = []

    def listen(name: str):
        def hook(module, arguments, keywords):
            x = arguments[0] if arguments else keywords["input"]
            names = next((names for held, version, names in seen if held is x and version == x._version), None)
            if names is None:
                names = []
                seen.append((x, x._version, names))
            names.append(name)
            leader = leaders.setdefault(name, leaders.get(names[0], name))
            if leader == name:
                if name not in statistics:
                    statistics[name] = Calibration(module.in_features, seed=seed, sample=sample)
                statistics[name].update(x.detach())
            elif leader not in names:
                raise ValueError(f"layer '{name}' had the inputs of '{leader}' in one batch, and others in another")

        return hook

    hooks = [module.register_forward_pre_hook(listen(name), with_kwargs=True) for name, module in linears.items()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in data:
                seen.clear()
                _run(model, batch, tokenizer)
    finally:
        seen.clear()
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    if not leaders:
        raise ValueError("found no batches, or none that reaches a linear layer, expected one at least")
    return {name: statistics[leader] for name, leader in leaders.items()}


def _run(model: nn.Module, batch, tokenizer) -> None:
    if isinstance(batch, str):
        if tokenizer is None:
            raise ValueError("found a text, expected tokenizer=… beside it, or tensors")
        batch = tokenizer(batch, return_tensors="pt")
    if isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)


def import_module(
    store: Store,
    model: nn.Module,
    name: str,
    *,
    rules=None,
    statistics: Mapping[str, Calibration] | None = None,
    tokenizer=None,
    **options,
) -> dict:
    """Puts a live module into a store: its tensors, read in place, compressed by ``rules`` with ``statistics``.

    A model of transformers brings its configuration along, and with ``tokenizer`` its tokenizer, so that it runs from the store as a
    whole. The other options, and what is returned, are ``Store.import_model``'s.
    """
    if isinstance(model, nn.Linear):
        raise ValueError("found a linear layer by itself, expected a module that holds it under a name: nn.Sequential(layer)")
    files = {}
    config = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        settings = json.loads(config.to_json_string(use_diff=False))
        settings["architectures"] = settings.get("architectures") or [type(model).__name__]
        files["config.json"] = json.dumps(settings).encode()
    if tokenizer is not None:
        files |= _tokenizer_files(tokenizer)
    calibration = None if statistics is None else dict(statistics)
    return store.import_model(model.state_dict(), name, rules=rules, calibration=calibration, files=files, **options)


def _tokenizer_files(tokenizer) -> dict[str, bytes]:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def commit(store: Store, model: nn.Module, name: str, *, prefix: str = "", message: str | None = None) -> int:
    """Saves the layers of all ``Linear`` and ``Embedding`` modules of a model as a new version of stored model ``name``; returns the
    version's number. Layers that the model does not have yet are added. Those that are being trained are saved as their weights make them now.
    """
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear) and module.weight is not None:
            layers[prefix + path] = module._slot.follow(module.weight, module.bias, module._slot.recompress)
        elif isinstance(module, (Linear, Embedding)):
            layers[prefix + path] = module.layer
    if not layers:
        raise ValueError("found no module over a stored layer, expected one at least")
    return store.save_layers(name, layers, message=message)
