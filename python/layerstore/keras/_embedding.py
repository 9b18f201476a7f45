"""Embeddings of tokens and of patches of images."""

from __future__ import annotations

import keras
from keras import ops

from ._checks import positive, registered
from ._dense import DenseMML


@registered
class TokenEmbedding(keras.layers.Layer):
    """Rows of a table by token, ``(batch, tokens)`` to ``(batch, tokens, embedding_dim)``, with those of positions added where asked for."""

    def __init__(self, max_len, vocab_size, embedding_dim, with_positions=False, **kwargs):
        super().__init__(**kwargs)
        self.max_len, self.vocab_size = positive("max_len", max_len), positive("vocab_size", vocab_size)
        self.embedding_dim, self.with_positions = positive("embedding_dim", embedding_dim), with_positions
        self.input_spec = keras.layers.InputSpec(ndim=2)
        self._token_embedding = keras.layers.Embedding(vocab_size, embedding_dim)
        self._pos_embedding = keras.layers.Embedding(max_len, embedding_dim) if with_positions else None

    def build(self, input_shape):
        self._token_embedding.build(input_shape)
        if self._pos_embedding is not None:
            self._pos_embedding.build(input_shape)
        self.built = True

    def call(self, inputs):
        tokens = self._token_embedding(inputs)
        if self._pos_embedding is None:
            return tokens
        return tokens + self._pos_embedding(ops.arange(0, ops.shape(inputs)[-1]))

    def compute_output_shape(self, input_shape):
        return (*input_shape, self.embedding_dim)

    def get_config(self):
        return super().get_config() | {
            "max_len": self.max_len,
            "vocab_size": self.vocab_size,
            "embedding_dim": self.embedding_dim,
            "with_positions": self.with_positions,
        }


@registered
class PatchEmbedding(keras.layers.Layer):
    """A projection of patches, ``(batch, patches, features)`` to ``(batch, patches, embedding_dim)``, ternary or not."""

    def __init__(self, num_patches, embedding_dim, use_mml=True, with_positions=False, **kwargs):
        super().__init__(**kwargs)
        self.num_patches = positive("num_patches", num_patches)
        self.embedding_dim = positive("embedding_dim", embedding_dim)
        self.use_mml, self.with_positions = use_mml, with_positions
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self._projection = DenseMML(embedding_dim) if use_mml else keras.layers.Dense(embedding_dim)
        self._pos_embedding = keras.layers.Embedding(num_patches, embedding_dim) if with_positions else None

    def build(self, input_shape):
        self._projection.build(input_shape)
        if self._pos_embedding is not None:
            self._pos_embedding.build(input_shape)
        self.built = True

    def call(self, inputs):
        projected = self._projection(inputs)
        if self._pos_embedding is None:
            return projected
        return projected + self._pos_embedding(ops.expand_dims(ops.arange(0, self.num_patches), 0))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.embedding_dim)

    def get_config(self):
        return super().get_config() | {
            "num_patches": self.num_patches,
            "embedding_dim": self.embedding_dim,
            "use_mml": self.use_mml,
            "with_positions": self.with_positions,
        }


@registered
class Patches(keras.layers.Layer):
    """Squares of images, ``(batch, height, width, channels)`` to ``(batch, patches, patch_size² · channels)``; what is left over is cut off."""

    def __init__(self, patch_size, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = positive("patch_size", patch_size)
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def call(self, inputs):
        size = self.patch_size
        _, height, width, channels = inputs.shape
        down, across = height // size, width // size
        cut = inputs[:, : down * size, : across * size]
        cut = ops.reshape(cut, (-1, down, size, across, size, channels))
        return ops.reshape(ops.transpose(cut, (0, 1, 3, 2, 4, 5)), (-1, down * across, size * size * channels))

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        return batch, (height // self.patch_size) * (width // self.patch_size), self.patch_size**2 * channels

    def get_config(self):
        return super().get_config() | {"patch_size": self.patch_size}
