"""A token mixer and a transformer block without matrix products."""

from __future__ import annotations

import keras

from ._checks import divides, positive, registered
from ._dense import RMSNorm
from ._glu import SwiGLUMML
from ._gru import GRUMML


@registered
class AttentionMML(keras.layers.Layer):
    """Mixes tokens by a ``GRUMML``, ``(batch, tokens, features)`` to ``(batch, tokens, out_dim)``: what takes the place of attention."""

    def __init__(self, num_heads, out_dim, fully_mml=True, **kwargs):
        positive("the number of heads", num_heads)
        divides(positive("output dimension", out_dim), num_heads)
        super().__init__(**kwargs)
        self.num_heads, self.out_dim, self.fully_mml = num_heads, out_dim, fully_mml
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self._internal_layer = GRUMML(out_dim, fully_mml=fully_mml, num_heads=num_heads, return_sequences=True)

    def build(self, input_shape):
        self._internal_layer.build(input_shape)
        self.built = True

    def call(self, inputs):
        return self._internal_layer(inputs)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.out_dim)

    def get_config(self):
        return super().get_config() | {
            "num_heads": self.num_heads,
            "out_dim": self.out_dim,
            "fully_mml": self.fully_mml,
        }


@registered
class TransformerBlockMML(keras.layers.Layer):
    """Token mixing and a gated unit, each added to its input and normed; ``rate`` is that of dropout in training."""

    def __init__(self, embedding_dim, ffn_dim, num_heads, fully_mml=True, rate=0.1, **kwargs):
        positive("embedding_dim", embedding_dim), positive("ffn_dim", ffn_dim), positive("num_heads", num_heads)
        super().__init__(**kwargs)
        self.embedding_dim, self.ffn_dim, self.num_heads = embedding_dim, ffn_dim, num_heads
        self.fully_mml, self.rate = fully_mml, rate
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self._attention_layer = AttentionMML(num_heads, embedding_dim, fully_mml=fully_mml)
        self._attention_dropout = keras.layers.Dropout(rate)
        self._attention_norm = RMSNorm()
        self._ffn_layer = SwiGLUMML(embedding_dim, intermediate_size=ffn_dim)
        self._ffn_dropout = keras.layers.Dropout(rate)
        self._ffn_norm = RMSNorm()

    def build(self, input_shape):
        mixed = (*input_shape[:-1], self.embedding_dim)
        self._attention_layer.build(input_shape)
        self._attention_norm.build(mixed)
        self._ffn_layer.build(mixed)
        self._ffn_norm.build(mixed)
        self.built = True

    def call(self, inputs, training=None):
        mixed = self._attention_dropout(self._attention_layer(inputs), training=training)
        mixed = self._attention_norm(inputs + mixed)
        gated = self._ffn_dropout(self._ffn_layer(mixed), training=training)
        return self._ffn_norm(mixed + gated)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.embedding_dim)

    def get_config(self):
        names = ("embedding_dim", "ffn_dim", "num_heads", "fully_mml", "rate")
        return super().get_config() | {name: getattr(self, name) for name in names}
