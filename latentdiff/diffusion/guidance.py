"""Formulas of guidance: towards a prompt, or up the gradient of any score.

Applied to a U-Net by pipeline/cfg_denoiser.py.

Classifier-free guidance (Ho & Salimans 2022), also by an image to edit (Brooks et al. 2023), its
rescaling (Lin et al. 2024), its interval (Kynkäänniemi et al. 2024), and guidance by the
gradient of any score (Dhariwal & Nichol 2021).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from latentdiff.diffusion.ddpm import Model, split_variance
from latentdiff.diffusion.prediction import check_objective, parametrization, predict_x0
from latentdiff.diffusion.schedules import Schedule, extract

ScoreFunction = Callable[[Tensor, Tensor], Tensor]  # x (B, ...), t -> scores (B,)


def classifier_free(uncond: Tensor, cond: Tensor, scale: float | Tensor) -> Tensor:
    """Return uncond + scale * (cond - uncond) (Ho & Salimans 2022, Eq. 6, scale = 1 + w).

    Holds for epsilon, v and x0 alike. Give it the prediction only: variance channels are not
    extrapolated.
    """
    return uncond + scale * (cond - uncond)


def instruct_pix2pix(
    neither: Tensor, image: Tensor, both: Tensor, scale: float, image_scale: float
) -> Tensor:
    """Guide by an instruction and by the image to edit (Brooks et al. 2023, Eq. 3).

    neither, image, both: predictions without text and image, with the image alone, with both. An
    image_scale of 1 is classifier-free guidance.
    """
    return neither + scale * (both - image) + image_scale * (image - neither)


def rescale(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Pull a guided prediction's std back to the conditional one's (Lin et al. 2024, Eq. 16).

    guided, cond: (B, ...). phi in [0, 1]: 0 changes nothing, 1 matches the standard deviation, the
    paper uses 0.7.
    """
    std = guided.flatten(1).std(1).clamp(min=torch.finfo(guided.dtype).tiny)
    factor = 1 + phi * (cond.flatten(1).std(1) / std - 1)
    return guided * factor.view(-1, *[1] * (guided.ndim - 1))


def is_guided(
    timestep: int, *, start: float = 0.0, end: float = 1.0, num_timesteps: int = 1000
) -> bool:
    """Return whether guidance acts at a timestep (Kynkäänniemi et al. 2024).

    start, end: the part of sampling it acts in, counted from pure noise: 0 is timestep T - 1 and 1
    is timestep 0.
    """
    progress = (num_timesteps - 1 - timestep) / max(num_timesteps - 1, 1)
    return start <= progress <= end


# --- Guidance by gradient ---


def score_guidance(
    schedule: Schedule, output: Tensor, gradient: Tensor, t: Tensor, *, prediction_type: str
) -> Tensor:
    """Move a prediction by a gradient of log p(y | xt): eps' = eps - sigma_t gradient.

    Dhariwal & Nichol 2021, Alg. 2; in x0 and v it is the same move, sigma^2 / signal and -sigma /
    signal times the gradient. Pure noise, where signal is 0, does not depend on y: no move.
    output, gradient: (B, ...).
    """
    noise = extract(schedule.sqrt_one_minus_alphas_cumprod, t, like=output)
    signal = extract(schedule.sqrt_alphas_cumprod, t, like=output)
    inverse = torch.where(signal > 0, 1 / signal, 0.0)
    return output + parametrization(prediction_type).score_factor(noise, inverse) * gradient


def with_score_guidance(
    schedule: Schedule,
    model: Model,
    score: ScoreFunction,
    *,
    scale: float,
    prediction_type: str,
    variance_type: str = "fixed_small",
    through_x0: bool = True,
) -> Model:
    """Wrap a model so that any sampler ascends a score: a classifier, CLIP, any log p(y | x).

    score: (x, t) -> (B,), larger is better, differentiable in x. through_x0: x is the predicted x0
    and the gradient goes back through the model; otherwise x is xt, for scores trained on noisy
    samples. The model must take timesteps 0 .. T-1 of this schedule. Comes on top of
    classifier-free guidance; variance channels are left alone.
    """
    check_objective(schedule, prediction_type)

    def guided(xt: Tensor, t: Tensor) -> Tensor:
        x = xt.detach().requires_grad_()
        with torch.set_grad_enabled(through_x0):
            output = model(x, t)
            prediction, _ = split_variance(output, x, variance_type=variance_type)
            x0 = predict_x0(schedule, prediction, x, t, prediction_type=prediction_type)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(score(x0 if through_x0 else x, t).sum(), x)
        moved = score_guidance(
            schedule, prediction.detach(), scale * gradient, t, prediction_type=prediction_type
        )
        return torch.cat([moved, output[:, x.shape[1] :].detach().to(moved.dtype)], 1)

    return guided
