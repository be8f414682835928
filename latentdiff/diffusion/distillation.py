"""Distillation of a sampler's steps: one student step for two of the teacher's, or for all.

Progressive distillation (Salimans & Ho 2022, Alg. 2) trains a student whose one DDIM step lands
where two steps of its teacher do; guided distillation (Meng et al. 2023) first gives it the guided
prediction of a scale that it reads as an input; a consistency model (Y. Song et al. 2023; latent
and guided: Luo et al. 2023) maps every point of a trajectory to its end. Timesteps are those of a
Schedule; -1 stands for the clean sample, where the signal is 1 and the noise 0.
"""

import torch
from torch import Tensor

from latentdiff.diffusion.prediction import predict_eps, predict_x0, target
from latentdiff.diffusion.schedules import Schedule, extract

CLEAN = -1  # the timestep after the last: x0
SIGMA_DATA = 0.5  # of the boundary condition, as in diffusers' LCMScheduler
TIMESTEP_SCALING = 10.0
SOLVER_STEPS = 50  # of the grid of a latent consistency model


def trailing_timesteps(num_steps: int, num_timesteps: int) -> Tensor:
    """Return the timesteps of a sampler of num_steps steps, noisiest first, (num_steps,) int64.

    "Trailing" spacing (Lin et al. 2024, Table 2), which begins at T - 1; the grid of 2 N steps
    holds that of N. ValueError unless 1 <= num_steps <= num_timesteps.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps={num_steps}, expected 1 to {num_timesteps}")
    whole = torch.arange(num_steps, 0, -1, dtype=torch.float64) * (num_timesteps / num_steps)
    return whole.round().long() - 1


def signal_and_noise(schedule: Schedule, t: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of x0 and of eps at t, (B, 1, ...) each; 1 and 0 where t is CLEAN."""
    at = t.clamp(min=0)
    is_clean = (t == CLEAN).view(-1, *[1] * (like.ndim - 1))
    signal = extract(schedule.sqrt_alphas_cumprod, at, like=like)
    noise = extract(schedule.sqrt_one_minus_alphas_cumprod, at, like=like)
    return torch.where(is_clean, 1.0, signal), torch.where(is_clean, 0.0, noise)


def ddim_step(
    schedule: Schedule,
    output: Tensor,
    xt: Tensor,
    t: Tensor,
    t_next: Tensor,
    *,
    prediction_type: str,
) -> Tensor:
    """Return x at t_next by a DDIM step without noise (J. Song et al. 2021, Eq. 12).

    output: a model's at (xt, t); output, xt: (B, ...); t, t_next: (B,), t_next may be CLEAN.
    """
    x0 = predict_x0(schedule, output, xt, t, prediction_type=prediction_type)
    eps = predict_eps(schedule, output, xt, t, prediction_type=prediction_type)
    signal, noise = signal_and_noise(schedule, t_next, like=xt)
    return signal * x0 + noise * eps


def one_step_output(
    schedule: Schedule,
    xt: Tensor,
    x_next: Tensor,
    t: Tensor,
    t_next: Tensor,
    *,
    prediction_type: str,
) -> Tensor:
    """Return the output at (xt, t) whose one `ddim_step` to t_next is x_next: the student's target.

    Salimans & Ho 2022, App. G; also where xt is pure noise. xt, x_next: (B, ...); t, t_next: (B,).
    """
    signal, noise = signal_and_noise(schedule, t, like=xt)
    signal_next, noise_next = signal_and_noise(schedule, t_next, like=xt)
    ratio = noise_next / noise
    x0 = (x_next - ratio * xt) / (signal_next - ratio * signal)
    eps = (xt - signal * x0) / noise
    return target(schedule, x0, eps, t, prediction_type=prediction_type)


def velocity_weights(schedule: Schedule, t: Tensor, *, prediction_type: str) -> Tensor:
    """Return the weight that makes a squared error that of the velocity, (B,) float32.

    In x0 it is SNR + 1 (Salimans & Ho 2022, Eq. 10): 1 for v_prediction, 1 / alpha_t^2 for epsilon,
    1 / sigma_t^2 for sample. t: (B,) in [0, T).
    """
    if prediction_type == "v_prediction":
        return torch.ones(len(t), device=t.device)
    is_epsilon = prediction_type == "epsilon"
    scale = schedule.sqrt_alphas_cumprod if is_epsilon else schedule.sqrt_one_minus_alphas_cumprod
    return scale[t].float() ** -2


def guidance_weights(scale: Tensor, *, lowest: float, highest: float) -> Tensor:
    """Return weights 1 / scale^2 of squared errors, of mean 1 for uniform scales, (B,) float32.

    What guidance adds to a prediction grows with the scale, so that errors at the highest scales
    would drown the others. scale: (B,) in [lowest, highest], 1 and more.
    """
    return lowest * highest / scale.float() ** 2


def consistency_scalings(t: Tensor, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return c_skip and c_out, (B, 1, ...) each, of a latent consistency model.

    Its x0 is c_skip xt + c_out predict_x0 (Luo et al. 2023, App. B), so that it is xt itself at
    t = 0, where c_skip is 1 and c_out 0. t: (B,).
    """
    scaled = (t.to(like.dtype) * TIMESTEP_SCALING).view(-1, *[1] * (like.ndim - 1))
    total = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / total.sqrt()


def consistent_x0(
    schedule: Schedule, output: Tensor, xt: Tensor, t: Tensor, *, prediction_type: str
) -> Tensor:
    """Return the clean sample that a consistency model predicts, (B, ...): xt itself at t = 0.

    output: the model's at (xt, t), read as a prediction of prediction_type (Luo et al. 2023).
    xt: (B, ...); t: (B,).
    """
    skip, out = consistency_scalings(t, like=xt)
    x0 = predict_x0(schedule, output, xt, t, prediction_type=prediction_type)
    return skip * xt + out * x0
