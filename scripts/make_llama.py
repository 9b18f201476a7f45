#!/usr/bin/env python3
"""Makes a GGUF file of Llama's architecture with made-up weights, for measuring speed and memory.

    python scripts/make_llama.py TOKENIZER.gguf OUT.gguf [--type Q4_0] [--hidden 2048] [--blocks 16]

The tokenizer is that of another GGUF file, such as the SmolLM2 of scripts/fetch_model.py. Needs the gguf package. Weights are
random codes with scales that keep features within what f32 holds: what the model says means nothing.
"""

import argparse
import sys
from pathlib import Path

import numpy as np


def quantized(rng, rows, columns, kind):
    """Random blocks of 32 weights, of about the spread that a trained layer has."""
    blocks = rows * columns // 32
    scale = np.full((blocks, 1), 0.02 / 4.6 / np.sqrt(columns / 2048), "<f2").view(np.uint8)
    if kind == "Q8_0":
        codes = rng.integers(-64, 64, (blocks, 32), np.int8).view(np.uint8)
        scale = np.full((blocks, 1), 0.02 / 37, "<f2").view(np.uint8)
        return np.hstack([scale, codes]).reshape(rows, -1)
    codes = rng.integers(0, 256, (blocks, 16), np.uint8)
    if kind == "Q4_0":
        return np.hstack([scale, codes]).reshape(rows, -1)
    minimum = (scale.view("<f2").astype("<f4") * -7.5).astype("<f2").view(np.uint8)
    return np.hstack([scale, minimum, codes]).reshape(rows, -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", choices=["Q4_0", "Q4_1", "Q8_0"], default="Q4_0")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--feed-forward", type=int, default=8192)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    args = parser.parse_args()
    import gguf

    writer = gguf.GGUFWriter(args.output, "llama")
    reader = gguf.GGUFReader(args.tokenizer)
    for name, field in reader.fields.items():
        if name.startswith("tokenizer.") and name != "tokenizer.chat_template":
            kind = field.types[0]
            inside = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inside)
    vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
    head_dim = args.hidden // args.heads
    writer.add_context_length(8192)
    writer.add_embedding_length(args.hidden)
    writer.add_block_count(args.blocks)
    writer.add_feed_forward_length(args.feed_forward)
    writer.add_head_count(args.heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocabulary)
    rng = np.random.default_rng(0)

    def matrix(name, rows, columns, kind=args.type):
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, quantized(rng, rows, columns, kind), raw_dtype=raw)

    def norm(name):
        writer.add_tensor(name, np.ones(args.hidden, np.float32))

    matrix("token_embd.weight", vocabulary, args.hidden, "Q8_0")
    norm("output_norm.weight")
    for block in range(args.blocks):
        of = f"blk.{block}."
        norm(of + "attn_norm.weight")
        norm(of + "ffn_norm.weight")
        matrix(of + "attn_q.weight", args.hidden, args.hidden)
        matrix(of + "attn_k.weight", args.kv_heads * head_dim, args.hidden)
        matrix(of + "attn_v.weight", args.kv_heads * head_dim, args.hidden)
        matrix(of + "attn_output.weight", args.hidden, args.hidden)
        matrix(of + "ffn_gate.weight", args.feed_forward, args.hidden)
        matrix(of + "ffn_up.weight", args.feed_forward, args.hidden)
        matrix(of + "ffn_down.weight", args.hidden, args.feed_forward)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
