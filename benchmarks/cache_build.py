"""Images a second into the latent cache, against those of the VAE alone on the same batches.

    python benchmarks/cache_build.py FOLDER [VAE] [--resolution 256] [--num 128] [--rounds 3]

Prints one JSON line. Builds into an empty cache and runs of the VAE alone take turns; `ratio` is
the median over rounds of build over VAE. A build hashes, decodes, cuts, encodes and writes; `parts`
has the seconds of each alone, for the same images. Without VAE the bundled one is used. Run it
with nothing else running.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from latentdiff.data.cache.decode_ahead import CropPlan, decode_ahead
from latentdiff.data.cache.latent_cache import LatentCache
from latentdiff.data.cache.latent_encoding import encode_moments
from latentdiff.data.cache.shard_file import as_keys, key_of
from latentdiff.data.cache.tensor_store import StoreWriter
from latentdiff.data.folder.content_hash import image_hashes
from latentdiff.data.folder.folder import read_folder
from latentdiff.models.components import load_vae
from latentdiff.models.latents import LatentCodec
from latentdiff.models.model_path import BUNDLED


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("vae", nargs="?", default=str(BUNDLED["latentdiff-vae"]))
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--num", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codec = LatentCodec(load_vae(args.vae).to(device))
    folder = read_folder(args.folder)
    folder = folder.select(np.linspace(0, len(folder) - 1, args.num).astype(int))
    plan = CropPlan(np.full((len(folder), 2), args.resolution, np.int32))
    scratch = Path(tempfile.mkdtemp(prefix="cache-build-"))

    def decoded() -> list[torch.Tensor]:
        items = (plan.item(i, u=0.5, flip=False) for i in range(len(folder)))
        batches = decode_ahead(
            folder, items, digests=None, batch_size=args.batch_size, num_threads=8
        )
        return [pixels for _, pixels in batches]

    batches = decoded()

    def encode() -> list[torch.Tensor]:
        return [encode_moments(codec, pixels, dtype=torch.float32).cpu() for pixels in batches]

    def build(number: int) -> None:
        LatentCache.build(
            folder,
            codec,
            cache_dir=scratch / str(number),
            plan=plan,
            batch_size=args.batch_size,
            progress=False,
        )

    def write() -> None:
        writer = StoreWriter(scratch / "written")
        for number, rows in enumerate(moments):
            writer.add(as_keys(key_of(bytes([number]), bytes([k])) for k in range(len(rows))), rows)
        writer.flush()

    try:
        moments = encode()  # the first call sets things up
        alone, whole = [], []
        for number in range(args.rounds):
            alone.append(timed(encode))
            whole.append(timed(lambda number=number: build(number)))
        parts = {
            "hash": timed(lambda: image_hashes(folder)),
            "decode_and_cut": timed(decoded),
            "write": timed(write),
        }
    finally:
        shutil.rmtree(scratch)
    result = {
        "benchmark": "cache_build",
        "ratio": statistics.median(a / b for a, b in zip(alone, whole, strict=True)),
        "build_images_per_second": len(folder) / statistics.median(whole),
        "vae_images_per_second": len(folder) / statistics.median(alone),
        "parts": {name: round(seconds, 3) for name, seconds in parts.items()},
        "settings": {**vars(args), "folder": Path(args.folder).name, "vae": Path(args.vae).name},
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
