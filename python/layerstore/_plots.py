"""Plots with matplotlib, which is not needed otherwise."""

from __future__ import annotations

import numpy as np


def _axes(ax):
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'layerstore[plots]'") from error
    return pyplot.subplots()[1]


def spectrum(layer, ax=None):
    """Draws the singular values of a layer's correction, or the scales of its keys, largest first."""
    values = layer.spectrum()
    if not len(values):
        raise ValueError(f"found a {layer.method} layer without a correction and without keys, expected one with either")
    ax = _axes(ax)
    ax.plot(np.arange(1, len(values) + 1), values)
    ax.set_yscale("log")
    ax.set_xlabel("component")
    ax.set_ylabel("scale of the key" if layer.method == "key_value" else "singular value")
    ax.set_title(layer.name or repr(layer))
    return ax


def errors(layers, model, ax=None):
    """Draws the relative errors of a model's layers, those that have one."""
    found = [(layer["layer"], layer["relative_error"], layer["method"]) for layer in layers]
    found = [entry for entry in found if entry[1]]
    if not found:
        raise ValueError(f"no layer of model '{model}' has a relative error above 0: all are stored as they were")
    ax = _axes(ax)
    for method in sorted({entry[2] for entry in found}):
        places = [place for place, entry in enumerate(found) if entry[2] == method]
        ax.plot(places, [found[place][1] for place in places], ".", label=method)
    ax.set_xlabel("layer, by name")
    ax.set_ylabel("relative error")
    ax.set_title(model)
    ax.legend()
    return ax
