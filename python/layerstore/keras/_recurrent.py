"""Recurrent layers that are made of their cell's arguments."""

from __future__ import annotations

import keras


class Recurrent(keras.layers.RNN):
    """A recurrent layer over a cell of ``cell_class``; its configuration is the cell's and that of ``keras.layers.RNN``."""

    cell_class: type
    cell_arguments: tuple[str, ...]

    def __init__(self, *arguments, **keywords):
        given = dict(zip(self.cell_arguments, arguments, strict=False))
        if len(arguments) > len(self.cell_arguments):
            raise TypeError(f"{type(self).__name__}: found {len(arguments)} arguments, expected {len(self.cell_arguments)} at most")
        given |= {name: keywords.pop(name) for name in self.cell_arguments if name in keywords}
        super().__init__(self.cell_class(**given), **keywords)
        self.input_spec = keras.layers.InputSpec(ndim=3)

    def __getattr__(self, name):
        # The cell's arguments are the layer's as well.
        if name in type(self).cell_arguments:
            return getattr(self.cell, name)
        # On PyTorch, a layer of Keras is a module, which finds its parts so.
        found = getattr(super(), "__getattr__", None)
        if found is None:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return found(name)

    def call(self, sequences, initial_state=None, mask=None, training=False):
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        return super().call(sequences, initial_state=initial_state, mask=mask, training=training)

    def get_config(self):
        config, cell = super().get_config(), self.cell.get_config()
        config.pop("cell", None)
        return config | {name: cell[name] for name in self.cell_arguments}

    @classmethod
    def from_config(cls, config):
        return cls(**config)
