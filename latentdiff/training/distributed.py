"""A training started as a command of its own, in as many processes as a small model gains from.

Accelerate for the recipes that train in one process: the VAE's and CLIP's.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from latentdiff.device import tune_malloc


def launch(script: Path | str, arguments: Sequence[str]) -> int:
    """Run scripts/train_t2i.py with arguments; return its exit status.

    In a process for each half of a CPU's cores, at most two, or in one on a GPU: so small a model
    gains more from two processes than from two threads.
    """
    import torch

    num_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    num_processes = 1 if torch.accelerator.is_available() else min(2, num_cores)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc_per_node", str(num_processes), str(script), *arguments]
    threads = {"OMP_NUM_THREADS": str(max(1, num_cores // num_processes))}
    return subprocess.run(command, env=os.environ | threads, check=False).returncode


MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def single_process_accelerator(precision: str) -> Accelerator:
    """Start Accelerate; ValueError where several processes were launched: they would train copies.

    Its autocast is wanted; gradients are scaled by optim.ScaledUpdate.
    """
    accelerator = Accelerator(mixed_precision=MIXED[precision])
    if accelerator.num_processes > 1:
        raise ValueError(
            f"{accelerator.num_processes} processes were launched, and this recipe trains in one: "
            "start it with python"
        )
    if accelerator.device.type == "cpu":
        tune_malloc()
    return accelerator
