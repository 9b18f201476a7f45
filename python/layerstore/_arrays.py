"""Arrays as the native module takes them: without copies where that can be."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

# Dtypes by safetensors' names, and what NumPy reads their bytes as.
_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def _torch_bytes(tensor):
    """The bytes of a PyTorch tensor, as an array that shares its memory, and the name of its dtype."""
    import torch

    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    name = str(tensor.dtype).removeprefix("torch.")
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8), name


def _is_torch(value) -> bool:
    return type(value).__module__.split(".")[0] == "torch" and hasattr(value, "detach")


def as_numpy(value) -> np.ndarray:
    """Returns an array of NumPy over the same memory, where that can be: by DLPack or the buffer protocol."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach"):
        value = value.detach()
        if getattr(getattr(value, "device", None), "type", "cpu") != "cpu":
            value = value.cpu()
        if str(value.dtype) == "torch.bfloat16":
            value = value.float()
        return value.numpy()
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError):
            pass
    return np.asarray(value)


def as_f32(value) -> np.ndarray:
    """Returns numbers as float32."""
    array = as_numpy(value)
    if array.dtype.kind == "c" or array.dtype.kind not in "fiub" and array.dtype.name not in _NAMES:
        raise TypeError(f"found an array of {array.dtype}, expected numbers")
    return np.asarray(array, dtype=np.float32)


def as_u32(value) -> np.ndarray:
    """Returns indices as uint32."""
    array = as_numpy(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"found indices of {array.dtype}, expected integers")
    if array.size and (array.min() < 0 or array.max() > 0xFFFF_FFFF):
        raise IndexError(f"found the indices {array.min()} to {array.max()}, expected 0 to 4294967295")
    return np.ascontiguousarray(array, dtype=np.uint32)


def no_rows() -> np.ndarray:
    """Returns a matrix of no rows."""
    return np.zeros((0, 0), np.float32)


def state_dict(model) -> list | None:
    """Returns the tensors of a dictionary, or of a module's, as (name, dtype, shape, bytes); ``None`` for anything else."""
    if hasattr(model, "state_dict") and callable(model.state_dict):
        model = model.state_dict()
    if not hasattr(model, "items") or isinstance(model, (str, bytes, os.PathLike)):
        return None
    found = []
    for name, tensor in model.items():
        if not _is_torch(tensor) and not hasattr(tensor, "__array__") and not hasattr(tensor, "__dlpack__"):
            raise TypeError(f"tensor '{name}': found {type(tensor).__name__}, expected an array or a tensor")
        if _is_torch(tensor) and (tensor.is_sparse or tensor.is_conj() or tensor.device.type == "meta"):
            raise TypeError(f"tensor '{name}': found a {tensor.layout} tensor on {tensor.device}, expected a plain one with numbers")
        if _is_torch(tensor):
            data, dtype = _torch_bytes(tensor)
            shape = list(tensor.shape)
        else:
            array = as_numpy(tensor)
            shape, dtype = list(array.shape), array.dtype.name
            if not array.dtype.isnative:
                array = array.astype(array.dtype.newbyteorder("="))
            data = np.ascontiguousarray(array).reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)
        if dtype not in _NAMES:
            raise TypeError(f"tensor '{name}': found dtype {dtype}, expected one of {', '.join(_NAMES)}")
        found.append((str(name), _NAMES[dtype], shape, data))
    return found


def content(value) -> bytes:
    """Returns the content of a file: bytes, a path to read, or a text."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, os.PathLike):
        return Path(value).read_bytes()
    if isinstance(value, dict):
        import json

        return json.dumps(value).encode()
    if isinstance(value, str):
        return Path(value).read_bytes() if "\n" not in value and os.path.isfile(value) else value.encode()
    raise TypeError(f"content of a file: found {type(value).__name__}, expected bytes, a text, a path or a dictionary")


def temporary_folder() -> tempfile.TemporaryDirectory:
    """Makes a folder that goes with the returned object."""
    return tempfile.TemporaryDirectory(prefix="layerstore-")


def write_activations(layers, folder) -> str:
    """Writes inputs by layer as a safetensors file in a folder, and returns its path."""
    import json
    import struct

    header, data, place = {}, [], 0
    for name, value in layers.items():
        array = np.ascontiguousarray(as_f32(value))
        array = array.reshape(-1, array.shape[-1])
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [place, place + array.nbytes]}
        place += array.nbytes
        data.append(array)
    path = os.path.join(folder, "activations.safetensors")
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in data:
            file.write(memoryview(array).cast("B") if array.size else b"")
    return path
