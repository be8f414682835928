"""How the training step's cost grows with the batch, the latents' size and the processes.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--rounds 3] [--processes '[1,2]']

The demo's U-Net, forward and backward in bf16, with fused operations and with diffusers' own;
prints one JSON line with images a second and the ratio for each. --processes measures whole runs of
configs/demo_scratch.yaml instead, with AdamW and with Muon, by the clock and with nothing else
running. For the data set's size see folder_index.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import machine, medians, ratio, take_turns

from latentdiff.cpu.fused_transformers import fuse_transformers
from latentdiff.data.shapes import write_shapes
from latentdiff.models.build import build_unet

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "demo_scratch.yaml"
RUN_STEPS, NUM_TRAIN, NUM_TEST = 80, 512, 64
OPTIMIZERS = ("adamw", "muon")
CASES = {"batch": [(4, 8), (16, 8), (32, 8), (64, 8)], "latent_size": [(16, 16), (4, 32)]}


def make_step(batch, latent_size, *, fused):
    """Return a forward and backward pass on random latents of latent_size x latent_size."""
    torch.manual_seed(0)
    unet = build_unet(
        sample_size=latent_size,
        in_channels=8,
        block_out_channels=(64, 128),
        attention_levels=(True, True),
        layers_per_block=1,
        head_dim=32,
        cross_attention_dim=128,
    ).train()
    if fused:
        fuse_transformers(unet)
    zt, text = torch.randn(batch, 8, latent_size, latent_size), torch.randn(batch, 20, 128)
    t = torch.randint(0, 1000, (batch,))

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(zt, t, text, return_dict=False)[0]
        output.float().square().mean().backward()
        unet.zero_grad()

    return step


def run_images_per_second(folder, *, processes, optimizer):
    """Return the median rate of a run's second half, as its log lines have it."""
    run = folder / f"{optimizer}-{processes}"
    settings = {
        "output_dir": run,
        "data.root": folder / "shapes",
        "data.cache_dir": folder / "cache",
        "train.max_steps": RUN_STEPS,
        "train.lr_warmup_steps": 5,
        "train.optimizer": optimizer,
        "train.log_every_steps": 10,
        "train.checkpoint_every_steps": RUN_STEPS,
        "train.keep_every_steps": 0,
        "eval.every_steps": 0,
        "preview.num_steps": 1,  # no part of the rate
        "preview.num_nearest": 0,
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command = [*launch, str(ROOT / "scripts/train_t2i.py"), "--config", str(CONFIG)]
    command += [f"--{name}={value}" for name, value in settings.items()]
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return statistics.median(rates[len(rates) // 2 :])


def process_rows(counts):
    """Return a row for each number of processes and optimiser."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        write_shapes(folder / "shapes", num_train=NUM_TRAIN, num_test=NUM_TEST, size_px=64)
        for optimizer in OPTIMIZERS:
            for processes in counts:
                rate = run_images_per_second(folder, processes=processes, optimizer=optimizer)
                rows.append(
                    {"processes": processes, "optimizer": optimizer, "images_per_second": rate}
                )
    return rows


def step_rows(rounds):
    """Return a row for each batch and size of latents."""
    rows = []
    for batch, latent_size in CASES["batch"] + CASES["latent_size"]:
        works = {
            "plain": make_step(batch, latent_size, fused=False),
            "fused": make_step(batch, latent_size, fused=True),
        }
        times = take_turns(works, rounds=rounds)
        seconds = medians(times)
        rows.append(
            {
                "batch": batch,
                "latent_size": latent_size,
                "ratio": ratio(times, "plain", "fused"),
                "images_per_second": {k: round(batch / s, 1) for k, s in seconds.items()},
            }
        )
    return rows


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=json.loads, help="numbers of processes, such as [1,2]")
    args = parser.parse_args()
    if args.processes:
        name, rows = "scaling_processes", process_rows(args.processes)
    else:
        name, rows = "scaling", step_rows(args.rounds)
    print(json.dumps({"benchmark": name, "rows": rows} | machine()))


if __name__ == "__main__":
    main()
