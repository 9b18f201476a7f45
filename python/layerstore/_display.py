"""What notebooks show of a store, a version and a layer."""

from __future__ import annotations

from html import escape


def size(count: int) -> str:
    """Returns bytes as a person reads them."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"


def _table(head, rows) -> str:
    cells = "".join(f"<th style='text-align:left'>{escape(str(name))}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def _models(models) -> str:
    rows = []
    for model in models:
        methods = ", ".join(f"{count} {name}" for name, count in model["methods"].items())
        ratio = model["dense_bytes"] / model["stored_bytes"] if model["stored_bytes"] else 0.0
        rows.append((model["model"], model["layers"], methods, size(model["stored_bytes"]), f"{ratio:.2f}×"))
    return _table(("model", "layers", "methods", "stored", "ratio"), rows)


def store(store) -> str:
    """Returns the models of the latest version as a table."""
    return f"<p><b>layerstore</b> at {escape(store.uri)}</p>{_models(store.models())}"


def snapshot(snapshot) -> str:
    """Returns the models of a version as a table."""
    return f"<p><b>layerstore</b>, version {snapshot.version}</p>{_models(snapshot.models())}"


def layer(layer) -> str:
    """Returns what is known of a layer as a table."""
    name = f"{layer.model}/{layer.name}" if layer.name else "a layer in memory"
    rows = [
        ("method", layer.method),
        ("inputs to outputs", f"{layer.in_features} to {layer.out_features}"),
        ("stored", size(layer.stored_bytes)),
    ]
    record = layer.record
    if record is not None and record["relative_error"] is not None:
        rows.append((f"relative error over {record['error_basis']}", f"{record['relative_error']:.4f}"))
    rows += sorted((key, value) for key, value in layer.config.items() if not isinstance(value, (list, dict)))
    return f"<p><b>{escape(name)}</b></p>{_table(('', ''), rows)}"
