"""Images a second through a VAE, by dtype and layout.

    OMP_NUM_THREADS=1 python benchmarks/vae.py [VAE] [--resolution 128] [--batch_size 8]

Prints one JSON line; ratios are to float32 in the contiguous layout, in turns. Without VAE the
small one that ships.
"""

import argparse
import json

import torch
from common import machine, medians, ratio, take_turns

from latentdiff.models.components import load_vae
from latentdiff.models.latents import LatentCodec
from latentdiff.models.model_path import BUNDLED

KINDS = {
    "float32": (torch.float32, torch.contiguous_format),
    "float32_channels_last": (torch.float32, torch.channels_last),
    "bf16": (torch.bfloat16, torch.contiguous_format),
    "bf16_channels_last": (torch.bfloat16, torch.channels_last),
}


@torch.no_grad()
def main():
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vae", nargs="?", default=str(BUNDLED["latentdiff-vae"]))
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    pixels = torch.rand(args.batch_size, 3, args.resolution, args.resolution) * 2 - 1
    works = {}
    for name, (dtype, layout) in KINDS.items():
        codec = LatentCodec(load_vae(args.vae, torch_dtype=dtype).to(memory_format=layout))
        z = codec.moments(pixels)[0]
        works[f"encode {name}"] = lambda codec=codec: codec.moments(pixels)
        works[f"decode {name}"] = lambda codec=codec, z=z: codec.decode(z)
    times = take_turns(works, rounds=args.rounds)
    ratios = {name: ratio(times, f"{name.split()[0]} float32", name) for name in times}
    seconds = medians(times)
    figures = {
        "benchmark": "vae",
        "ratios": ratios,
        "images_per_second": {name: round(args.batch_size / s, 2) for name, s in seconds.items()},
        "settings": {**vars(args), "vae": args.vae.split("/")[-1]},
    }
    print(json.dumps(figures | machine()))


if __name__ == "__main__":
    main()
