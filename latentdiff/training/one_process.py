"""Accelerate for the recipes that train in one process: the VAE's and CLIP's."""

from accelerate import Accelerator

from latentdiff.allocator import keep_freed_memory

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def one_process(precision: str) -> Accelerator:
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
        keep_freed_memory()
    return accelerator
