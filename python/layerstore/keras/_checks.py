"""Checks of arguments, and the name that layers are registered under."""

from __future__ import annotations

import keras
import numpy as np

# Keras-MatMulLess's own, so that files of either are opened by the other.
registered = keras.saving.register_keras_serializable(package="keras_mml")


def positive(name: str, value: int) -> int:
    """Returns a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value <= 0:
        raise ValueError(f"Received an invalid value for {name}, expected a positive integer, got {value!r}.")
    return int(value)


def divides(units: int, heads: int) -> None:
    """Checks that heads have the same number of units each."""
    if units % heads != 0:
        raise ValueError(
            f"Output dimension must be divisible by number of heads. Got {units}, but wanted to use {heads} heads."
        )
