"""Seconds from a loaded model to the first step on folders whose index and caches are ready.

    OMP_NUM_THREADS=1 python benchmarks/second_start.py [SIZE ...] [--rounds 3]

Prints one JSON line. Each run is a process of its own that fine-tunes by configs/full_mini.yaml
into a new folder, on so many different images of 32 px with a caption each. The first run fills the
caches, with zeros in place of what VAE and text encoder would compute, as a second start takes as
long. Of the others: medians of seconds, and of seconds of the processor, until the data folder is
read (`folder`), the model loaded (`models`), latents, captions and train step ready (`caches`), the
plan and the bill of materials made (`plan`, `bill`), and the first step done (`first step`, with
the held-out loss and the sheet of images that come before it). `after models` is the sum of the
last four, target 5 s for 100,000 images. --keep FOLDER keeps images and caches for another call.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from common import machine, write_numbered
from PIL import Image

ROOT = Path(__file__).parents[1]
SIDE_PX = 32
RECIPE = "latentdiff.training.text_to_image"
PHASES = {  # by module and name, the calls that end them
    "folder": (f"{RECIPE}.setup", "split_sources"),
    "models": (f"{RECIPE}.setup", "pretrained_components"),
    "caches": (f"{RECIPE}.train_t2i", "setup"),
    "plan": (f"{RECIPE}.train_t2i", "log_plan"),
    "bill": (f"{RECIPE}.train_t2i", "materials_of"),
}
AFTER_MODELS = ("caches", "plan", "bill", "first step")


class _EndedError(Exception):
    """The first step is done; what follows is not measured."""


def make_folder(root, num):
    """Write images of smooth random colors, each with a caption of its own."""
    rng = np.random.default_rng(0)

    def save(path, i):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((SIDE_PX, SIDE_PX)).save(path, compress_level=1)

    write_numbered(root, num, ending="png", save=save)


def fill_caches_with_zeros():
    """Put zeros in place of what the VAE and the text encoder compute for the caches."""
    from latentdiff.data.cache import latent_cache, prompt_cache
    from latentdiff.models.conditioning import Conditioning

    class Zeros:
        def __init__(self, encoders):
            self.width = encoders.text_encoder.config.hidden_size
            self.length = encoders.tokenizer.model_max_length

        def encode_captions(self, captions):
            return Conditioning(torch.zeros(len(captions), self.length, self.width))

    def moments(codec, pixels, *, dtype):
        num, height, width, _ = pixels.shape
        size = height // codec.factor, width // codec.factor
        return torch.zeros(num, 2, codec.channels, *size, dtype=dtype)

    encode = prompt_cache._encode
    prompt_cache._encode = lambda captions, keys, encoders, **named: encode(
        captions, keys, Zeros(encoders), **named
    )
    latent_cache.encode_moments = moments


def probe(options):
    """Train; print the seconds of each phase, and those of the processor."""
    moments = {"start": (time.perf_counter(), time.process_time())}

    def note(phase):
        moments.setdefault(phase, (time.perf_counter(), time.process_time()))

    def noted(phase, call):
        def call_and_note(*args, **named):
            found = call(*args, **named)
            note(phase)
            if phase == "first step":
                raise _EndedError
            return found

        return call_and_note

    from latentdiff.config.io import load_config
    from latentdiff.training.text_to_image import train_t2i
    from latentdiff.training.text_to_image.train_step import TrainStep

    note("imports")
    for phase, (place, name) in PHASES.items():
        module = import_module(place)
        setattr(module, name, noted(phase, getattr(module, name)))
    TrainStep.step = noted("first step", TrainStep.step)
    with contextlib.suppress(_EndedError):
        train_t2i.train(load_config(ROOT / "configs" / "full_mini.yaml", options))
    rows = list(moments.values())
    for place, kind in enumerate(("seconds", "cpu_seconds")):
        parts = {
            phase: after[place] - before[place]
            for phase, before, after in zip(list(moments)[1:], rows, rows[1:], strict=False)
        }
        parts["after models"] = sum(parts[phase] for phase in AFTER_MODELS)
        print(json.dumps({kind: parts}))


def start(folder, run, *, kind="--probe"):
    """Train for one step in a process of its own; return the seconds of its phases by kind.

    kind: "--probe", or "--fill", which puts zeros into the caches.
    """
    options = [
        f"--data.root={folder / 'data'}",
        f"--data.cache_dir={folder / 'cache'}",
        f"--data.resolution={SIDE_PX}",
        f"--output_dir={run}",
        "--train.max_steps=1",
    ]
    command = [sys.executable, __file__, kind, *(f" {option}" for option in options)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {k: v for line in done.stdout.splitlines()[-2:] for k, v in json.loads(line).items()}


def measure(folder, *, size, rounds):
    """Return the medians of the phases of second starts on a folder of a size, by kind."""
    if not (folder / "data").is_dir():
        make_folder(folder / "data", size)
    start(folder, folder / "run", kind="--fill")
    rows = []
    for number in range(rounds):
        rows.append(start(folder, folder / f"run{number}"))
        shutil.rmtree(folder / f"run{number}", ignore_errors=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    return {
        kind: {
            phase: round(statistics.median(row[kind][phase] for row in rows), 3)
            for phase in rows[0][kind]
        }
        for kind in rows[0]
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, default=[1_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep")
    parser.add_argument("--probe", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--fill", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if options := args.probe or args.fill:
        if args.fill:
            fill_caches_with_zeros()
        probe([option.strip() for option in options])
        return
    images = {}
    with tempfile.TemporaryDirectory(prefix="second-start-") as name:
        for size in args.sizes:
            folder = Path(args.keep or name) / str(size)
            images[str(size)] = measure(folder, size=size, rounds=args.rounds)
    figures = {"benchmark": "second_start", "images": images, "rounds": args.rounds}
    print(json.dumps(figures | machine()))


if __name__ == "__main__":
    main()
