"""Any diffusers scheduler, driven alike."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from latentdiff.pipeline import checks
from latentdiff.pipeline.noise import Generators


def set_timesteps(
    scheduler: Any,
    num_inference_steps: object,
    *,
    strength: float | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Set a scheduler's chain of num_inference_steps and return its timesteps, noisiest first.

    A strength, of a picture that is given, keeps that last part of the chain. Schedulers of second
    order return more timesteps than steps. Raises ValueError for a number outside 1..the number of
    training timesteps, one that the scheduler cannot do, or a strength that leaves no step.
    """
    most = scheduler.config.num_train_timesteps
    steps = checks.count("num_inference_steps", num_inference_steps, most=most)
    kept = steps if strength is None else int(steps * strength)
    if kept < 1:
        raise ValueError(
            f"strength={strength:g} of num_inference_steps={steps} leaves no step; raise one"
        )
    try:
        scheduler.set_timesteps(steps, device=device)
    except ValueError as error:
        name = type(scheduler).__name__
        raise ValueError(f"num_inference_steps={steps} does not fit {name}: {error}") from error
    skipped = (steps - kept) * getattr(scheduler, "order", 1)
    if strength is not None and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    timesteps: Tensor = scheduler.timesteps[skipped:]
    return timesteps


def check_variance(scheduler: Any, *, out_channels: int, channels: int) -> None:
    """Raise ValueError where a U-Net learned its variance and the scheduler cannot use it."""
    learns = str(scheduler.config.get("variance_type")).startswith("learned")
    if out_channels != channels and not learns:
        raise ValueError(
            f"scheduler {type(scheduler).__name__} has no use for this U-Net's learned variance "
            f"({out_channels} output channels for latents of {channels}); take a DDPMScheduler "
            'with variance_type="learned_range"'
        )


def step_options(scheduler: Any, *, eta: object, generator: Generators) -> dict[str, Any]:
    """Return those of eta and generator that the scheduler's step reads, and the tuple form."""
    options = {"eta": checks.number("eta", eta, least=0.0, most=1.0), "generator": generator}
    known = inspect.signature(scheduler.step).parameters
    read = {name: value for name, value in options.items() if name in known}
    return read | {"return_dict": False}
