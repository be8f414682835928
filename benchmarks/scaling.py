"""How the training step's cost grows with the batch and with the latents' size.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--rounds 3]

The demo's U-Net, forward and backward in bf16, in large steps and in diffusers' own; prints one
JSON line with images a second and the ratio for each. For the data set's size see folder_index.py.
"""

import argparse
import json

import torch
from common import machine, medians, ratio, take_turns

from latentdiff.build import build_unet
from latentdiff.fused import fuse_transformers

PLACES = {"batch": [(4, 8), (16, 8), (32, 8), (64, 8)], "cells": [(16, 16), (4, 32)]}


def make_step(batch, cells, *, fused):
    """Return a forward and backward pass on random latents of cells x cells."""
    torch.manual_seed(0)
    unet = build_unet(
        sample_size=cells,
        in_channels=8,
        block_out_channels=(64, 128),
        attention_levels=(True, True),
        layers_per_block=1,
        head_dim=32,
        cross_attention_dim=128,
    ).train()
    if fused:
        fuse_transformers(unet)
    zt, text = torch.randn(batch, 8, cells, cells), torch.randn(batch, 20, 128)
    t = torch.randint(0, 1000, (batch,))

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(zt, t, text, return_dict=False)[0]
        output.float().square().mean().backward()
        unet.zero_grad()

    return step


def main():
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for batch, cells in PLACES["batch"] + PLACES["cells"]:
        works = {
            "plain": make_step(batch, cells, fused=False),
            "large_steps": make_step(batch, cells, fused=True),
        }
        times = take_turns(works, rounds=args.rounds)
        seconds = medians(times)
        rows.append(
            {
                "batch": batch,
                "cells": cells,
                "ratio": ratio(times, "plain", "large_steps"),
                "images_per_second": {k: round(batch / s, 1) for k, s in seconds.items()},
            }
        )
    print(json.dumps({"benchmark": "scaling", "rows": rows} | machine()))


if __name__ == "__main__":
    main()
