"""The random numbers of a call: each picture has its own generator and can be made again alone.

Generators live on the CPU, so that one seed gives one picture on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from latentdiff.pipeline import checks

Generators: TypeAlias = torch.Generator | list[torch.Generator]


def generators_for(
    seed: object, generator: Generators | None, *, num_images: int
) -> tuple[list[int] | None, Generators]:
    """Return one seed and one CPU generator a picture, or the caller's own generators and no seeds.

    Raises ValueError as `checks.seeds` says.
    """
    seeds = checks.seeds(seed, generator, num_images=num_images)
    if seeds is None:
        assert generator is not None
        return None, list(generator) if isinstance(generator, tuple) else generator
    return seeds, [torch.Generator("cpu").manual_seed(one) for one in seeds]


def gaussian(shape: Sequence[int], generator: Generators, *, device: torch.device) -> Tensor:
    """Draw standard normal float32 noise (B, C, h, w), picture k from generator k alone.

    One generator (no list) draws the whole batch in turn, as diffusers does.
    """
    noise: Tensor = randn_tensor(
        tuple(shape), generator=generator, device=device, dtype=torch.float32
    )
    return noise
