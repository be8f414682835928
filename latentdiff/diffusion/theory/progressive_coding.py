"""Progressive decoding and interpolation by the reverse chain (Ho et al. 2020, Sec. 4.3, 4.4).

Rate and distortion along the chain are in bound.py (`per_timestep`).
"""

import torch
from torch import Tensor

from latentdiff.diffusion.ddpm import Generators, Model, p_sample_steps, q_sample
from latentdiff.diffusion.schedules import Schedule


def progressive_x0(
    schedule: Schedule,
    model: Model,
    xt: Tensor,
    *,
    generator: Generators,
    prediction_type: str,
    shown: list[int],
    variance_type: str = "fixed_small",
    clip_x0: float | None = None,
) -> Tensor:
    """Return the x0 predicted at some steps of one reverse chain, (len(shown), B, ...).

    xt: (B, ...) pure noise; shown: timesteps in [0, T), returned from noisy to clean.
    """
    steps = p_sample_steps(
        schedule,
        model,
        xt,
        generator=generator,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_x0=clip_x0,
    )
    return torch.stack([step.x0 for step in steps if step.t in shown])


def interpolate(
    schedule: Schedule,
    model: Model,
    x0: tuple[Tensor, Tensor],
    *,
    eps: Tensor,
    depth: int,
    share: float | Tensor,
    generator: Generators,
    prediction_type: str,
    variance_type: str = "fixed_small",
    clip_x0: float | None = None,
) -> Tensor:
    """Mix two images at noise level `depth` and decode the mixture (Ho et al. 2020, Fig. 8).

    x0: two of (B, ...); depth: a timestep in [0, T), deeper is freer; share in [0, 1] of the second
    image, one number or (B, 1, ...); eps: (B, ...) one noise for both, so that the mixture
    keeps its noise level.
    """
    first, second = x0
    t = torch.full((len(first),), depth, device=first.device)
    noisy = [q_sample(schedule, image, t, eps) for image in (first, second)]
    xt = noisy[0] + share * (noisy[1] - noisy[0])
    for step in p_sample_steps(
        schedule,
        model,
        xt,
        generator=generator,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_x0=clip_x0,
        start=depth,
    ):
        xt = step.sample
    return xt
