"""Measure a training step's overhead over the bare loop that it stands for, on the same model.

    OMP_NUM_THREADS=1 python benchmarks/train_step_overhead.py [--steps 20] [--batch_size 16]
        [--small]

Steps of both loops take turns in one process. The full loop: training data with keyed random
numbers, update of finite gradients only, EMA, log and checkpoints as in a training run, held-out
loss and samples off. The bare loop: one batch that lies on the device, forward, loss, backward,
clip, fused AdamW. Rare work counts in shares: a log line over `train.log_every_steps`, a
checkpoint, as if no part of it ran in parallel, over `train.checkpoint_every_steps`. Prints one
JSON line: `overhead` is the full loop's step over the bare one of the same turn, less 1, the median
of all turns, and its quartiles; `parts` split it up, as shares of a bare step; `rest` is all other
work (copies to the device, sums for the log, caption dropout) and the noise of the measurement.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from latentdiff.cli.command import quieten_libraries
from latentdiff.config.io import load_config
from latentdiff.data.shapes import write_shapes
from latentdiff.diffusion.ddpm import q_sample
from latentdiff.models.conditioning import Conditioning
from latentdiff.training.distributed import start_accelerator
from latentdiff.training.inputs import dataset as dataset_module
from latentdiff.training.inputs.randomness import SampleKey
from latentdiff.training.metrics_log import MetricsLog
from latentdiff.training.recipe import LoopSettings
from latentdiff.training.resume import CheckpointWriter
from latentdiff.training.text_to_image import train_step as train_step_module
from latentdiff.training.text_to_image.model import TextToImage
from latentdiff.training.text_to_image.setup import setup
from latentdiff.training.text_to_image.train_t2i import TextToImageRecipe

WARM_UP = 3


def settings(folder, *, small, batch_size, workers):
    """Return the settings of a run: a 17 M U-Net at 16 x 16 latents, or a toy."""
    unet = {
        "block_out_channels": [32, 64] if small else [128, 192, 192],
        "attention_levels": [True, True] if small else [True, True, True],
        "layers_per_block": 1,
        "head_dim": 32,
    }
    return {
        "output_dir": str(folder / "run"),
        "data": {
            "root": str(folder / "data"),
            "cache_dir": str(folder / "cache"),
            "resolution": 128,
            "num_workers": workers,
        },
        "model": {
            "vae": "latentdiff-vae",
            "unet": unet,
            "text": {"width": 128, "num_layers": 1, "vocab_size": 640, "max_tokens": 32},
        },
        "train": {"batch_size": batch_size, "max_steps": 100_000, "channels_last": True},
    }


class Clock:
    """Seconds by part; `watch` times every call of a function. of_cpu: CPU time, not wall time."""

    def __init__(self, device, *, of_cpu):
        self.device, self.seconds = device, defaultdict(float)
        self.read = time.process_time if of_cpu else time.perf_counter

    def now(self):
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return self.read()

    def watch(self, owner, name, part):
        work = getattr(owner, name)

        def watched(*args, **kwargs):
            started = self.read()
            result = work(*args, **kwargs)
            self.seconds[part] += self.read() - started
            return result

        setattr(owner, name, watched)


class FullLoop:
    """The steps of a training run."""

    def __init__(self, run, clock):
        self.run, self.clock, self.done = run, clock, 0
        self.recipe = TextToImageRecipe(run)
        self.batches = self.recipe.batches(0)
        self.log_file = MetricsLog(run.folder, is_main=True, first_step=0)
        settings = LoopSettings.of(run.config.train)
        self.checkpoints = CheckpointWriter(run.folder, settings, run.config, run.accelerator)
        clock.watch(self, "next_batch", "train_data")
        clock.watch(run.train_step.ema, "update", "ema")
        clock.watch(train_step_module, "clip_gradients", "clip_and_check")
        clock.watch(train_step_module, "step_if_finite", "clip_and_check")
        clock.watch(dataset_module, "standard_normal", "random_numbers")
        clock.watch(SampleKey, "generator", "random_numbers")

    def next_batch(self):
        return next(self.batches)

    def step(self):
        self.recipe.step(iter(self.next_batch, None), self.done)
        self.done += 1

    def log(self):
        self.log_file.write(self.done, self.recipe.figures(self.done))

    def checkpoint(self):
        self.checkpoints.save(self.recipe, self.done)
        self.checkpoints.wait()


class BareLoop:
    """The simplest loop: one batch, forward, loss, backward, clip, step.

    It updates the training run's own weights: copies elsewhere in memory can be 5 % slower or
    faster.
    """

    def __init__(self, run, clock, batch):
        self.model = run.train_step.model
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.schedule, self.device = run.train_step.objective.schedule, run.accelerator.device
        self.batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        self.t = (self.batch["u"] * self.schedule.num_timesteps).long()
        clock.watch(self, "update", "bare_update")

    def step(self):
        z0, eps, text = self.batch["z0"], self.batch["eps"], Conditioning.of(self.batch)
        with torch.autocast(self.device.type, torch.bfloat16):
            zt = q_sample(self.schedule, z0, self.t, eps)
            output = TextToImage.forward(self.model, zt, self.t, text)  # past Accelerate's wrapper
        F.mse_loss(output.float(), eps).backward()
        self.update()
        self.optimizer.zero_grad(set_to_none=True)

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


def seconds(clock, work):
    """Return the seconds of a call, with those of the device."""
    started = clock.now()
    work()
    return clock.now() - started


def measure(full, bare, clock, *, steps):
    """Take turns; return the seconds of each step of both loops, and of the full loop's parts."""
    times = defaultdict(list)
    for number in range(WARM_UP + steps):
        clock.seconds.clear()
        # The second loop finds the memory of the first in the caches, so the order alternates.
        loops = [("full", full), ("bare", bare)][:: 1 if number % 2 else -1]
        turn = {name: seconds(clock, loop.step) for name, loop in loops} | clock.seconds
        if number >= WARM_UP:
            for name, value in turn.items():
                times[name].append(value)
    return times


def report(run, full, bare, clock, *, steps):
    """Measure and put the figures together."""
    times = measure(full, bare, clock, steps=steps)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["full"], times["bare"], strict=True)]  # of one turn
    train = run.config.train
    log = seconds(clock, full.log) / train.log_every_steps
    checkpoint = seconds(clock, full.checkpoint) / train.checkpoint_every_steps
    bare_step = medians["bare"]
    rare_work = (log + checkpoint) / bare_step
    overhead = statistics.median(ratios) - 1 + rare_work
    parts = {
        "ema": medians["ema"],
        "random_numbers": medians.get("random_numbers", 0.0),
        "train_data": medians["train_data"] - medians.get("random_numbers", 0.0),
        "clip_and_check": medians["clip_and_check"] - medians["bare_update"],
        "log": log,
        "checkpoint": checkpoint,
    }
    shares = {name: value / bare_step for name, value in parts.items()}
    shares["rest"] = overhead - sum(shares.values())
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "benchmark": "train_step_overhead",
        "overhead": round(overhead, 4),
        "overhead_quartiles": [round(q - 1 + rare_work, 4) for q in quartiles[::2]],
        "parts": {name: round(share, 4) for name, share in shares.items()},
        "step_s": round(medians["full"], 4),
        "bare_step_s": round(bare_step, 4),
        "steps": steps,
        "unet_millions": round(sum(p.numel() for p in run.components.unet.parameters()) / 1e6, 2),
        "batch_size": train.batch_size,
        "device": str(run.accelerator.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.platform(),
        "load": os.getloadavg()[0],
    }


def main():
    """Make a run, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of each loop, after warm-up")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a toy U-Net, for a quick look")
    parser.add_argument("--cpu_time", action="store_true", help="where other jobs run too")
    args = parser.parse_args()
    quieten_libraries()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="train-step-overhead-") as name:
        folder = Path(name)
        write_shapes(folder / "data", num_train=4 * args.batch_size, num_test=1, size_px=128)
        given = settings(folder, small=args.small, batch_size=args.batch_size, workers=args.workers)
        (folder / "config.json").write_text(json.dumps(given))
        config = load_config(folder / "config.json")
        run = setup(config, folder / "run", start_accelerator(config))
        clock = Clock(run.accelerator.device, of_cpu=args.cpu_time)
        full = FullLoop(run, clock)
        bare = BareLoop(run, clock, full.next_batch())
        figures = report(run, full, bare, clock, steps=args.steps)
        print(json.dumps(figures | {"clock": "cpu" if args.cpu_time else "wall"}))
        full.log_file.close()


if __name__ == "__main__":
    main()
