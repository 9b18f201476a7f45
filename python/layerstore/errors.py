"""The exceptions of layerstore: one class for each thing that a caller can do about an error."""

from __future__ import annotations


class LayerstoreError(Exception):
    """Anything that layerstore refuses or that goes wrong in it. The message names what was found and what was expected."""


class NotFoundError(LayerstoreError, KeyError):
    """There is nothing of the name asked for: correct it. Also a ``KeyError``."""

    # A KeyError shows its argument quoted.
    __str__ = Exception.__str__


class InvalidInputError(LayerstoreError, ValueError):
    """What was given (a file, a shape, a setting, a number) is wrong: correct it. Also a ``ValueError``."""


class ConflictError(LayerstoreError):
    """The name is taken, or another process is in the way: choose another, or try again."""


class IncompatibleError(LayerstoreError):
    """The store or file is of a version or method that this one does not know."""


class CorruptError(LayerstoreError):
    """Stored bytes are not what was written: repair the store, or restore it from a copy."""


class StorageError(LayerstoreError, OSError):
    """The storage refused: permissions, space, network. Nothing that was committed is lost. Also an ``OSError``."""
