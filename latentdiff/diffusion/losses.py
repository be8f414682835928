"""The training objective: losses by sample.

Nothing here waits for the device. Targets are in prediction.py, weights over t in
loss_weighting.py, changes to the noise in noise.py.
"""

import torch
from torch import Tensor

from latentdiff.diffusion.bound import bound_term
from latentdiff.diffusion.ddpm import split_variance
from latentdiff.diffusion.prediction import target
from latentdiff.diffusion.schedules import Schedule


def per_sample_loss(
    output: Tensor,
    target: Tensor,
    *,
    huber_delta: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the mean squared error of each sample, (B, ...) -> (B,) float32.

    huber_delta: use the pseudo-Huber loss 2 d (sqrt(e^2 + d^2) - d) instead: e^2 for small errors,
    2 d |e| for large. mask: (B, 1, ...) in [0, 1]: weights of the average; a sample whose mask is 0
    everywhere has loss 0.
    """
    error = output.float() - target.float()
    if huber_delta is None:
        loss = error.square()
    else:
        loss = 2 * huber_delta * ((error.square() + huber_delta**2).sqrt() - huber_delta)
    if mask is None:
        return loss.flatten(1).mean(1)
    kept = mask.float().expand_as(loss).flatten(1)
    return (loss.flatten(1) * kept).sum(1) / kept.sum(1).clamp(min=1e-6)


def variance_loss(
    schedule: Schedule,
    output: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    *,
    prediction_type: str,
    levels: int | None = None,
) -> Tensor:
    """Return T times each sample's term of the bound, which trains the variance channels alone.

    output: (B, 2C, ...), "learned_range"; x0, xt: (B, C, ...). The gradient stops at the mean
    (Nichol & Dhariwal 2021, Sec. 3.1). (B,) float32, bits per dimension; for levels see
    `bound.bound_term`.
    """
    prediction, range_output = split_variance(output, xt, variance_type="learned_range")
    assert range_output is not None
    term = bound_term(
        schedule,
        torch.cat([prediction.detach(), range_output], 1),
        x0,
        xt,
        t,
        prediction_type=prediction_type,
        variance_type="learned_range",
        levels=levels,
    )
    return schedule.num_timesteps * term.bits.float()


def hybrid_loss(
    schedule: Schedule,
    output: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    *,
    eps: Tensor,
    prediction_type: str,
    vlb_weight: float = 0.001,
    levels: int | None = None,
) -> Tensor:
    """Return L_hybrid = L_simple + vlb_weight L_vlb of each sample (Nichol & Dhariwal 2021, Eq.
    16).

    eps: the noise in xt; other arguments as in `variance_loss`. Weights of L_simple by SNR: add
    `variance_loss` to the weighted loss instead.
    """
    prediction, _ = split_variance(output, xt, variance_type="learned_range")
    truth = target(schedule, x0, eps, t, prediction_type=prediction_type)
    vlb = variance_loss(schedule, output, x0, xt, t, prediction_type=prediction_type, levels=levels)
    return per_sample_loss(prediction, truth) + vlb_weight * vlb
