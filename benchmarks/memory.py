"""Measure the peak memory of training by configuration, next to the estimate ahead of it.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [demo] [emoji] [17m]

Each configuration trains two steps in a process of its own, on shapes it writes. `added_gb` is the
peak of the process while it trains, less its memory once libraries were imported and the data
encoded, so it compares with `estimate_gb`: weights, gradients, optimiser, EMA, activations.
Linux only; prints one JSON line. For the size of Stable Diffusion 1.5 see sd15_size.py.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"
UNET_17M = {
    "data.resolution": 128,
    "model.unet.block_out_channels": "[128,192,192]",
    "model.unet.attention_levels": "[true,true,true]",
    "model.text.width": 256,
    "model.text.num_layers": 4,
    "train.batch_size": 16,
}
CASES = {"demo": ("demo_scratch", {}), "emoji": ("emoji", {}), "17m": ("demo_scratch", UNET_17M)}
NUM_IMAGES = 64


def rss_bytes(line):
    """Return the process's VmRSS (now) or VmHWM (at most, since the last reset)."""
    value = Path("/proc/self/status").read_text().split(f"{line}:")[1]
    return int(value.split()[0]) * 1024


def probe(name):
    """Train two steps of a configuration; print its figures."""
    import gc

    from latentdiff.config.io import load_config
    from latentdiff.data.shapes import write_shapes
    from latentdiff.training.distributed import start_accelerator
    from latentdiff.training.inputs.encode import cache_latents
    from latentdiff.training.inputs.sources import read_data
    from latentdiff.training.text_to_image.components import load_vae_of
    from latentdiff.training.text_to_image.memory import estimate_memory
    from latentdiff.training.text_to_image.setup import setup

    kind, changes = CASES[name]
    with tempfile.TemporaryDirectory(prefix="memory-") as path:
        folder = Path(path)
        size_px = changes.get("data.resolution", 64)
        write_shapes(folder / "shapes", num_train=NUM_IMAGES, num_test=8, size_px=size_px)
        settings = changes | {
            "data.root": folder / "shapes",
            "data.cache_dir": folder / "cache",
            "output_dir": folder / "run",
            "data.num_workers": 0,
            "model.vae": "latentdiff-mini",
            "train.max_steps": 2,
            "preview.num_nearest": 0,
        }
        config = load_config(
            CONFIGS / f"{kind}.yaml", [f"--{key}={value}" for key, value in settings.items()]
        )
        accelerator = start_accelerator(config)
        vae = load_vae_of(config)
        for data in read_data(config.data):
            cache_latents(data, vae, config.data, accelerator=accelerator)
        del vae
        gc.collect()
        before = rss_bytes("VmRSS")
        run = setup(config, folder / "run", accelerator)
        estimate = estimate_memory(run)
        batches = run.train_data.batches(
            run.layout,
            first_step=0,
            last_step=config.train.max_steps,
            accelerator=accelerator,
            seed=config.train.seed,
        )
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        for step in range(2):
            count = run.train_data.order.count(step)
            run.train_step.step(
                batches, step=step, count=count, accumulation=run.layout.accumulation
            )
        peak = rss_bytes("VmHWM")
        run.log.close()
    parts = {key: round((size or 0) / 1e9, 3) for key, size in dataclasses.asdict(estimate).items()}
    figures = {
        "batch_size": config.train.batch_size,
        "resolution": config.data.resolution,
        "trained_millions": round(
            sum(p.numel() for p in run.train_step.parameters.values()) / 1e6, 1
        ),
        "estimate_gb": round(estimate.on_device / 1e9, 3),
        "added_gb": round((peak - before) / 1e9, 3),
        "peak_gb": round(peak / 1e9, 3),
        "estimate_by_part_gb": parts,
    }
    print(json.dumps(figures))


def main():
    """Measure each in its own process and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[], help=f"of {', '.join(CASES)}")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        probe(args.probe)
        return
    if unknown := set(args.names) - set(CASES):
        parser.error(f"no configuration {sorted(unknown)[0]}, expected of {', '.join(CASES)}")
    from common import machine

    rows = {}
    for name in args.names or CASES:
        command = [sys.executable, __file__, "--probe", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows[name] = json.loads(output.splitlines()[-1])
    print(json.dumps({"benchmark": "memory", "configurations": rows} | machine()))


if __name__ == "__main__":
    main()
