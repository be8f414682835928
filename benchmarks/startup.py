"""Seconds until something happens: the import, each script's --help, the first step, an image.

    OMP_NUM_THREADS=1 python benchmarks/startup.py [--rounds 3]

Each is a new process; prints one JSON line with medians. The first round is not counted: it reads
the libraries from the disk, and encodes what training reads from a cache. `train` is a run of
configs/demo_scratch.yaml on --num_train shapes: seconds from the process's start until training
begins to import (`python`), until models and caches are ready (`models`), from then until the
first step is done (`first step`, target 5 s), and of one more step. `image` is sample.py with
that model, 25 steps, from start to end of the process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, medians, take_turns

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "demo")
PROMPT = "a large red circle on a white background"


def run(*arguments):
    """Run Python with arguments; return its output."""
    done = subprocess.run(
        [sys.executable, *arguments], check=False, capture_output=True, cwd=ROOT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stderr}")
    return done.stdout


def options_of(folder, num_train):
    """Write the shapes; return the options of two steps on them."""
    from latentdiff.data.shapes import write_shapes

    write_shapes(folder / "shapes", num_train=num_train, num_test=32)
    return [
        f"--data.root={folder / 'shapes'}",
        f"--data.cache_dir={folder / 'cache'}",
        "--model.vae=latentdiff-mini",
        "--train.max_steps=2",
        "--preview.prompts=[a red circle]",
        "--eval.num_heldout=32",
    ]


def probe(options, started):
    """Train; print the seconds of each phase. started: the time of the process's start."""
    moments = {"python": time.time()}
    from latentdiff.config.io import load_config
    from latentdiff.training.text_to_image import train_t2i as text_to_image
    from latentdiff.training.text_to_image.train_step import TrainStep

    prepare, step = text_to_image.setup, TrainStep.step

    def setup_and_note(*args, **kwargs):
        found = prepare(*args, **kwargs)
        moments["models"] = time.time()
        return found

    def step_and_note(*args, **kwargs):
        done = step(*args, **kwargs)
        moments["second step" if "first step" in moments else "first step"] = time.time()
        return done

    text_to_image.setup, TrainStep.step = setup_and_note, step_and_note
    text_to_image.train(load_config(ROOT / "configs" / "demo_scratch.yaml", options))
    times = [started, *moments.values()]
    print(json.dumps({name: b - a for name, a, b in zip(moments, times, times[1:], strict=False)}))


def main():
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_train", type=int, default=2000)
    parser.add_argument("--probe", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe:
        probe([option.strip() for option in args.probe[1:]], float(args.probe[0]))
        return
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        options, seen = options_of(Path(name), args.num_train), []
        sheet = ["--out", f"{name}/sheet.png", "--steps", "25"]

        def train():
            given = [*options, f"--output_dir={name}/run{len(seen)}"]
            printed = run(__file__, "--probe", str(time.time()), *(f" {x}" for x in given))
            seen.append(json.loads(printed.splitlines()[-1]))

        works = {"import": lambda: run("-c", "import latentdiff"), "python": lambda: run("-c", "")}
        for script in SCRIPTS:
            works[f"{script} --help"] = lambda script=script: run(f"scripts/{script}.py", "--help")
        works["train"] = train
        works["image"] = lambda: run("scripts/sample.py", f"{name}/run0/pipeline", PROMPT, *sheet)
        seconds = medians(take_turns(works, rounds=args.rounds))
    parts = {name: statistics.median(row[name] for row in seen[1:]) for name in seen[0]}
    figures = {
        "benchmark": "startup",
        "seconds": seconds,
        "train": {name: round(value, 3) for name, value in parts.items()},
        "train_with_an_empty_cache": {name: round(x, 3) for name, x in seen[0].items()},
        "settings": {"rounds": args.rounds, "num_train": args.num_train},
    }
    print(json.dumps(figures | machine()))


if __name__ == "__main__":
    main()
