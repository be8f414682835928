"""Seconds from a loaded model to the first step on folders whose index and caches are ready.

    OMP_NUM_THREADS=1 python benchmarks/second_start.py [SIZE ...] [--rounds 3]

Prints one JSON line. Each run is a process of its own that fine-tunes by configs/full_mini.yaml
into a new folder, on so many different images of 32 px with a caption each. The first one encodes
latents and captions (`first_start`), the others are second starts: medians of seconds, and of
seconds of the processor, until the data folder is read (`folder`), the model loaded (`models`),
latents, captions and train step ready (`caches`), the plan and the bill of materials made (`plan`,
`bill`), and the first step done (`first step`, with the held-out loss and the sheet of images that
come before it). `after models` is the sum of the last four, target 5 s for 100,000 images.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import numpy as np
from common import machine
from PIL import Image

ROOT = Path(__file__).parents[1]
SIDE_PX, NUM_IN_FOLDER = 32, 10_000
RECIPE = "latentdiff.training.text_to_image"
PHASES = {  # by module and name, the calls that end them
    "folder": (f"{RECIPE}.setup", "split_sources"),
    "models": (f"{RECIPE}.setup", "pretrained_components"),
    "caches": (f"{RECIPE}.train_t2i", "setup"),
    "plan": (f"{RECIPE}.train_t2i", "log_plan"),
    "bill": (f"{RECIPE}.train_t2i", "materials_of"),
}
AFTER_MODELS = ("caches", "plan", "bill", "first step")


def make_folder(root, num):
    """Write images of smooth random colors, each with a caption of its own."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True)
    with (root / "metadata.jsonl").open("w") as file:
        for i in range(num):
            path = root / f"part-{i // NUM_IN_FOLDER:03d}" / f"{i:07d}.png"
            path.parent.mkdir(exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((SIDE_PX, SIDE_PX)).save(path, compress_level=1)
            name = path.relative_to(root).as_posix()
            row = {"file_name": name, "text": f"a photo of thing number {i} on a table"}
            file.write(json.dumps(row) + "\n")


def probe(options):
    """Train; print the seconds of each phase, and those of the processor."""
    moments = {"start": (time.perf_counter(), time.process_time())}

    def note(phase):
        moments.setdefault(phase, (time.perf_counter(), time.process_time()))

    def noted(phase, call):
        def call_and_note(*args, **named):
            found = call(*args, **named)
            note(phase)
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
    train_t2i.train(load_config(ROOT / "configs" / "full_mini.yaml", options))
    rows = list(moments.values())
    for place, kind in enumerate(("seconds", "cpu_seconds")):
        parts = {
            phase: after[place] - before[place]
            for phase, before, after in zip(list(moments)[1:], rows, rows[1:], strict=False)
        }
        parts["after models"] = sum(parts[phase] for phase in AFTER_MODELS)
        print(json.dumps({kind: parts}))


def start(folder, run):
    """Train for one step in a process of its own; return the seconds of its phases by kind."""
    options = [
        f"--data.root={folder / 'data'}",
        f"--data.cache_dir={folder / 'cache'}",
        f"--data.resolution={SIDE_PX}",
        f"--output_dir={run}",
        "--train.max_steps=1",
    ]
    command = [sys.executable, __file__, "--probe", *(f" {option}" for option in options)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return {k: v for line in done.stdout.splitlines()[-2:] for k, v in json.loads(line).items()}


def measure(size, rounds):
    """Return the phases of the first start and the medians of the others on a folder of a size."""
    with tempfile.TemporaryDirectory(prefix="second-start-") as name:
        folder = Path(name)
        make_folder(folder / "data", size)
        first, *others = [start(folder, folder / f"run{k}") for k in range(1 + rounds)]

    def middle(rows):
        phases = rows[0]
        return {one: round(statistics.median(row[one] for row in rows), 3) for one in phases}

    kinds = ("seconds", "cpu_seconds")
    return {kind: middle([row[kind] for row in others]) for kind in kinds} | {
        "first_start": {kind: middle([first[kind]]) for kind in kinds}
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, default=[1_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--probe", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        probe([option.strip() for option in args.probe])
        return
    sizes = {str(size): measure(size, args.rounds) for size in args.sizes}
    figures = {"benchmark": "second_start", "images": sizes, "rounds": args.rounds}
    print(json.dumps(figures | machine()))


if __name__ == "__main__":
    main()
