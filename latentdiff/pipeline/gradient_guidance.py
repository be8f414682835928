"""Guidance by the gradient of any score: a classifier, CLIP, any log p(y | z0).

Dhariwal & Nichol 2021, Alg. 2, on the clean latents that a step predicts (Ho et al. 2022, Sec. 3.1,
call it reconstruction guidance). It works with every scheduler, since only the prediction moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.guidance import ScoreFunction, score_guidance
from latentdiff.models.build import schedule_of
from latentdiff.pipeline.schedulers import nearest_timesteps, predicted_z0


def apply_score_guidance(
    score_fn: ScoreFunction,
    predict: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    *,
    xt: Tensor,
    t: Tensor,
    scale: float,
    scheduler: Any,
) -> tuple[Tensor, Tensor | None]:
    """Move a prediction by scale times the gradient of score_fn with respect to xt.

    xt: (B, C, h, w) at unit-variance scale. predict: xt -> (output, cfg_delta). The gradient goes
    through score_fn, the predicted clean latents and `predict`, with its classifier-free guidance;
    a learned variance stays as it is. Raises ValueError for scores of another shape, scores that do
    not depend on z0, and a non-finite gradient.
    """
    x = xt.detach().requires_grad_()
    with torch.enable_grad():
        output, cfg_delta = predict(x)
        z0 = predicted_z0(scheduler, output, x, t)  # (B, C, h, w)
        gradient = _gradient(score_fn(z0, t), x)
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError(
            f"score_fn's gradient became NaN or Inf at t={float(t):g}; lower score_scale, or fix "
            "score_fn"
        )
    output, channels = output.detach(), xt.shape[1]
    moved = score_guidance(
        schedule_of(scheduler).to(xt.device),
        output[:, :channels],
        scale * gradient,
        nearest_timesteps(scheduler, t, count=len(xt)).to(xt.device),
        prediction_type=scheduler.config.prediction_type,
    )
    moved = torch.cat([moved.to(output.dtype), output[:, channels:]], dim=1)
    return moved, None if cfg_delta is None else cfg_delta.detach()


def _gradient(scores: object, x: Tensor) -> Tensor:
    """Return the gradient of each image's score with respect to its own xt."""
    expected = f"a tensor of shape ({len(x)},), one score an image"
    if not isinstance(scores, Tensor) or scores.shape != (len(x),):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"score_fn must return {expected}, got {got}")
    if not scores.requires_grad:
        raise ValueError(
            "the scores of score_fn do not depend on z0 by anything that torch can differentiate; "
            "leave out no_grad and detach"
        )
    (gradient,) = torch.autograd.grad(scores.sum(), x, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "the scores of score_fn do not depend on z0: it must score the latents it gets"
        )
    return gradient
