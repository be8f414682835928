"""Ways to train in less memory: bf16 weights, updates within the backward pass, a bf16 base.

What a config alone shows to be wrong is refused in config/train.py; here is what depends on the
processes and on the size of a micro-batch, and what each mode costs, for the plan.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from latentdiff.config.train import TrainConfig
from latentdiff.models.components import Components
from latentdiff.training.inputs.batches import BatchLayout


def check_memory_modes(settings: TrainConfig, accelerator: Accelerator) -> None:
    """Raise ValueError where several processes, or FSDP, cannot train in the config's modes."""
    if settings.fused_backward_pass and accelerator.num_processes > 1:
        raise ValueError(
            "train.fused_backward_pass=true updates weights before processes have exchanged their "
            f"gradients, and there are {accelerator.num_processes}: start one process, or leave it "
            "out"
        )
    modes = {
        "train.full_bf16=true": settings.full_bf16,
        "train.fused_backward_pass=true": settings.fused_backward_pass,
        "train.frozen_dtype=bf16": settings.frozen_dtype == "bf16",
    }
    if accelerator.distributed_type == DistributedType.FSDP and any(modes.values()):
        mode = next(name for name, is_on in modes.items() if is_on)
        raise ValueError(
            f"{mode} saves the memory of whole weights in one process, and FSDP shards them over "
            "several: leave one of the two out"
        )


def check_layout(settings: TrainConfig, layout: BatchLayout) -> None:
    """Raise ValueError where a step's images do not fit at once, and the mode asks for it."""
    if settings.fused_backward_pass and layout.accumulation > 1:
        raise ValueError(
            f"train.batch_size={settings.batch_size} is estimated not to fit this GPU at once, and "
            "train.fused_backward_pass=true accumulates no gradients: set train.batch_size="
            f"{layout.micro_batch_size}"
        )


def cast_weights(model: nn.Module, settings: TrainConfig) -> None:
    """Put weights into bf16 where the config asks for it; others that are trained, into float32."""
    trained = torch.bfloat16 if settings.full_bf16 else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(trained)
        elif settings.frozen_dtype == "bf16":
            parameter.data = parameter.data.to(torch.bfloat16)


@contextmanager
def idle_parts_on(device: torch.device, components: Components) -> Iterator[None]:
    """Have the parts that wait on the host while cached data trains on the device in the block."""
    parts: list[Any] = [components.vae, components.text_encoder, components.text_encoder_2]
    idle = [part for part in parts if part is not None and part.device.type != device.type]
    try:
        for part in idle:  # one that does not fit leaves none of them there
            part.to(device)
        yield
    finally:
        for part in idle:
            part.to(torch.device("cpu"))


def mode_notes(settings: TrainConfig) -> list[str]:
    """Return what the memory modes that are on give up, one sentence each."""
    notes = []
    if settings.fused_backward_pass:
        notes.append(
            "fused_backward_pass: a step whose loss is not finite is skipped whole, as ever; a "
            "gradient that is not finite is taken as 0 there, and the rest of its step is done"
        )
    if settings.full_bf16:
        notes.append(
            "full_bf16: weights have 8 bits of precision, rounded up or down at random; masters in "
            "float32 (full_bf16=false) give better models"
        )
    if settings.frozen_dtype == "bf16":
        notes.append("frozen_dtype=bf16: the base is rounded to bf16, adapters stay float32")
    return notes
