"""Guidance by the gradient of any score: a classifier, CLIP, any log p(y | z0).

Dhariwal & Nichol 2021, Alg. 2, on the clean latents that a step predicts (Ho et al. 2022, Sec. 3.1,
call it reconstruction guidance). Every sampler takes it, since only the prediction moves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.guidance import score_guidance
from latentdiff.models.build import schedule_of
from latentdiff.pipeline.callbacks import nearest_steps, predicted_z0
from latentdiff.pipeline.denoiser import Guide, Prediction


def score_step(
    guide: Guide,
    predict: Callable[[Tensor], Prediction],
    xt: Tensor,
    t: Tensor,
    *,
    scale: float,
    scheduler: Any,
) -> Prediction:
    """Move a prediction by scale times the gradient of the guide's score with respect to xt.

    xt: (B, C, h, w) at unit-variance scale. The gradient goes through the guide, the predicted
    clean latents and `predict`, with its classifier-free guidance; a learned variance stays as it
    is. Raises ValueError for scores of another shape, that do not depend on z0, or with a gradient
    that is no number.
    """
    x = xt.detach().requires_grad_()
    with torch.enable_grad():
        prediction = predict(x)
        z0 = predicted_z0(scheduler, prediction.output, x, t)  # (B, C, h, w)
        gradient = _gradient(guide(z0, t), x)
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError(
            f"the guide's gradient became NaN or Inf at t={float(t):g}; lower guide_scale, or mend "
            "the guide"
        )
    output, channels = prediction.output.detach(), xt.shape[1]
    moved = score_guidance(
        schedule_of(scheduler).to(xt.device),
        output[:, :channels],
        scale * gradient,
        nearest_steps(scheduler, t, count=len(xt)).to(xt.device),
        prediction_type=scheduler.config.prediction_type,
    )
    kept = prediction.difference
    return replace(
        prediction,
        output=torch.cat([moved.to(output.dtype), output[:, channels:]], dim=1),
        difference=None if kept is None else kept.detach(),
    )


def _gradient(scores: object, x: Tensor) -> Tensor:
    """Return the gradient of each image's score with respect to its own xt."""
    expected = f"a tensor of shape ({len(x)},), one score an image"
    if not isinstance(scores, Tensor) or scores.shape != (len(x),):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"guide must return {expected}, got {got}")
    if not scores.requires_grad:
        raise ValueError(
            "the guide's scores do not depend on z0 by anything that torch can differentiate; "
            "leave out no_grad and detach"
        )
    (gradient,) = torch.autograd.grad(scores.sum(), x, allow_unused=True)
    if gradient is None:
        raise ValueError(
            "the guide's scores do not depend on z0: it must score the latents it gets"
        )
    return gradient
