#!/usr/bin/env python3
"""Times of attention over 1K to 256K tokens: by codes (VQAttentionQK), HyperAttention, and PyTorch's exact one.

    PYTHONPATH=python python benches/vq_attention.py [--heads N] [--most TOKENS]

One sequence of heads of length 128, codebooks of 128 codes; codes are found within the time. Exact attention beyond 16,384 tokens is not run:
its time, with a ~, grows with the square.
"""

import argparse
import time

import torch

import layerstore
import layerstore.torch as lt


def seconds(work):
    work()
    found = []
    for _ in range(3):
        since = time.perf_counter()
        work()
        found.append(time.perf_counter() - since)
    return min(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--most", type=int, default=262_144)
    args = parser.parse_args()
    torch.manual_seed(0)
    heads, dim = args.heads, 128
    width = heads * dim
    settings = {"n_head": heads, "d_model": width, "d_k": dim, "d_v": dim, "block_len": 128}

    def layer(mechanism, causal):
        more = {"n_code": 128} if mechanism == "vq_qk" else {}
        samples = (torch.randn(2048, width), torch.randn(2048, width)) if more else ()
        made = layerstore.vq_attention({**settings, **more, "mechanism": mechanism, "causal": causal}, *samples)
        return (lt.VQAttention if more else lt.HyperAttention)(made)

    attentions = [layer("vq_qk", True), layer("vq_qk", False), layer("hyper", True), layer("hyper", False)]
    print("| tokens | VQ, causal | VQ | HyperAttention, causal | HyperAttention | exact, causal (torch) |")
    print("|---|---|---|---|---|---|")
    tokens, last = 1024, 0.0
    while tokens <= args.most:
        q, k, v = (torch.randn(1, heads, tokens, dim) for _ in range(3))
        with torch.no_grad():
            times = [seconds(lambda attention=attention: attention(q, k, v)) for attention in attentions]
            if tokens <= 16_384:
                last = seconds(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
            else:
                last *= 4
        cells = [f"{1e3 * one:.1f} ms" for one in times] + [f"{'' if tokens <= 16_384 else '~'}{1e3 * last:.1f} ms"]
        print(f"| {tokens:,} | " + " | ".join(cells) + " |", flush=True)
        tokens *= 2


if __name__ == "__main__":
    main()
