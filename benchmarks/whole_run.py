"""Seconds of a whole training run against a peer's own script, on the same folder and model.

    OMP_NUM_THREADS=1 python benchmarks/whole_run.py [--script PATH] [--steps 200] [--rounds 1]

PATH: diffusers' examples/text_to_image/train_text_to_image.py, of the version that is installed
(it needs `datasets`); without it the peer is skipped, and the line says so. A 17 M U-Net at 128 px,
batch 16, bf16, EMA, on shapes that are written here. Both runs are processes of their own, from
start to exported model, our cache built anew each time; they take turns. `seconds` are the
clock's, `cpu_seconds` those of all the processes of a run. Prints one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from common import machine, ratio
from diffusers import StableDiffusionPipeline
from train_throughput import make_model

from latentdiff.data.shapes import write_shapes

SKIPPED = "pass --script PATH of diffusers' examples/text_to_image/train_text_to_image.py"
PX = 128


def write_world(folder, *, num_train):
    """Write the model and the images."""
    parts = make_model()
    StableDiffusionPipeline(
        unet=parts.unet,
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "model")
    write_shapes(folder / "shapes", num_train=num_train, num_test=16, size_px=PX)


def our_command(folder, out, args):
    """Return the command of our run."""
    settings = {
        "model.pretrained": folder / "model",
        "data.root": folder / "shapes",
        "data.cache_dir": out / "cache",
        "data.resolution": PX,
        "output_dir": out / "run",
        "train.max_steps": args.steps,
        "train.batch_size": args.batch_size,
        "train.learning_rate": 1e-4,
        "train.lr_warmup_steps": 0,
        "train.checkpoint_every_steps": args.steps,
        "train.report_to": "none",
        "preview.every_steps": 0,
        "preview.num_steps": 1,
        "preview.num_nearest": 0,
        "eval.every_steps": 0,
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "latentdiff", "train", *options]


def peer_command(folder, out, args):
    """Return the command of diffusers' script."""
    settings = {
        "pretrained_model_name_or_path": folder / "model",
        "train_data_dir": folder / "shapes" / "train",
        "resolution": PX,
        "train_batch_size": args.batch_size,
        "max_train_steps": args.steps,
        "learning_rate": 1e-4,
        "lr_warmup_steps": 0,
        "mixed_precision": "bf16",
        "checkpointing_steps": args.steps,
        "cache_dir": out / "cache",
        "output_dir": out / "peer",
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, str(args.script), *options, "--use_ema", "--center_crop"]


def timed(command, log):
    """Run a command; return its seconds, the clock's and its processes'. SystemExit: it failed."""
    started, before = time.perf_counter(), os.times()
    with open(log, "w", encoding="utf-8") as output:
        status = subprocess.call(command, stdout=output, stderr=subprocess.STDOUT)
    if status:
        end = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{' '.join(command)}\nended with status {status}:\n{end}")
    after = os.times()
    used = after.children_user + after.children_system
    return (
        time.perf_counter() - started,
        used - before.children_user - before.children_system,
    )


def main():
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", type=Path, help="the peer's; without it only ours is timed")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--num_train", type=int, default=1000)
    args = parser.parse_args()
    if args.script is not None and not args.script.is_file():
        parser.error(f"--script={args.script} is no file: {SKIPPED}")
    commands = {"latentdiff": our_command} | ({"peer": peer_command} if args.script else {})
    clock, cpu = defaultdict(list), defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="whole-run-") as name:
        folder = Path(name)
        write_world(folder, num_train=args.num_train)
        for number in range(args.rounds):
            for who, command in commands.items():
                out = folder / f"{who}-{number}"
                out.mkdir()
                seconds = timed(command(folder, out, args), out / "log")
                clock[who].append(seconds[0])
                cpu[who].append(seconds[1])
    has_peer = "peer" in commands
    figures = {
        "benchmark": "whole_run",
        "ratio": ratio(clock, "peer", "latentdiff") if has_peer else None,
        "ratio_cpu": ratio(cpu, "peer", "latentdiff") if has_peer else None,
        "skipped": None if has_peer else SKIPPED,
        "seconds": {who: round(statistics.median(x), 1) for who, x in clock.items()},
        "cpu_seconds": {who: round(statistics.median(x), 1) for who, x in cpu.items()},
        "settings": {"steps": args.steps, "batch_size": args.batch_size, "rounds": args.rounds},
    }
    print(json.dumps(figures | machine()))


if __name__ == "__main__":
    main()
