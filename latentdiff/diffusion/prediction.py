"""The network's output: the x0, eps and v that it stands for, under each prediction type.

The network may predict the noise (Ho et al. 2020, Sec. 3.2), the velocity (Salimans & Ho 2022,
App. D), the data, or, on the straight path of rectified flow, its direction (Liu et al. 2023).
PREDICTION_TYPES holds every formula that differs between them, so the rest of the code asks for x0
or eps and needs not know the type.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.diffusion.schedules import Schedule, extract

Formula = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of output, xt, signal and noise


def velocity(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Return v = signal * eps - noise * x0 (Salimans & Ho 2022, App. D). x0, eps: (B, ...)."""
    signal = extract(schedule.sqrt_alphas_cumprod, t, like=x0)
    noise = extract(schedule.sqrt_one_minus_alphas_cumprod, t, like=x0)
    return signal * eps - noise * x0


@dataclass(frozen=True)
class Parametrization:
    """The meaning of an output, where xt = signal * x0 + noise * eps; a tensor a formula."""

    to_x0: Formula
    to_eps: Formula
    to_velocity: Formula
    target: Callable[[Schedule, Tensor, Tensor, Tensor], Tensor]  # of schedule, x0, eps and t
    eps_error: Callable[[Tensor, Tensor], Tensor]
    """squared error of eps that one of the output stands for, of alphas_cumprod and SNR"""
    score_factor: Callable[[Tensor, Tensor], Tensor]
    """factor of grad log p(y | xt) that guides the output, of noise and 1 / signal"""


PREDICTION_TYPES = {
    "epsilon": Parametrization(
        to_x0=lambda output, xt, signal, noise: (xt - noise * output) / signal,
        to_eps=lambda output, xt, signal, noise: output.to(signal.dtype),
        to_velocity=lambda output, xt, signal, noise: (output - noise * xt) / signal,
        target=lambda schedule, x0, eps, t: eps,
        eps_error=lambda alphas_cumprod, snr: torch.ones_like(snr),
        score_factor=lambda noise, inverse: -noise,
    ),
    "v_prediction": Parametrization(
        to_x0=lambda output, xt, signal, noise: signal * xt - noise * output,
        to_eps=lambda output, xt, signal, noise: noise * xt + signal * output,
        to_velocity=lambda output, xt, signal, noise: output,
        target=velocity,
        eps_error=lambda alphas_cumprod, snr: alphas_cumprod,  # SNR / (SNR + 1)
        score_factor=lambda noise, inverse: -noise * inverse,
    ),
    "sample": Parametrization(
        to_x0=lambda output, xt, signal, noise: output.to(signal.dtype),
        to_eps=lambda output, xt, signal, noise: (xt - signal * output) / noise,
        to_velocity=lambda output, xt, signal, noise: (signal * xt - output) / noise,
        target=lambda schedule, x0, eps, t: x0,
        eps_error=lambda alphas_cumprod, snr: snr,
        score_factor=lambda noise, inverse: noise.square() * inverse,
    ),
    "flow_prediction": Parametrization(  # eps - x0, where signal + noise = 1
        to_x0=lambda output, xt, signal, noise: xt - noise * output,
        to_eps=lambda output, xt, signal, noise: xt + signal * output,
        to_velocity=lambda output, xt, signal, noise: (
            (signal * (xt + signal * output) - noise * (xt - noise * output))
            / (signal.square() + noise.square()).sqrt()
        ),
        target=lambda schedule, x0, eps, t: eps - x0,
        eps_error=lambda alphas_cumprod, snr: snr / (1 + snr.sqrt()).square(),  # signal^2
        score_factor=lambda noise, inverse: -noise * inverse,
    ),
}


DDPM_TYPES = tuple(name for name in PREDICTION_TYPES if name != "flow_prediction")


def parametrization(prediction_type: str) -> Parametrization:
    """Return the formulas of a prediction type. Raises ValueError for an unknown name."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"unknown prediction_type {prediction_type!r}:"
            f" choose one of {', '.join(PREDICTION_TYPES)}"
        )
    return PREDICTION_TYPES[prediction_type]


def predict_x0(
    schedule: Schedule, output: Tensor, xt: Tensor, t: Tensor, *, prediction_type: str
) -> Tensor:
    """Return the x0 that a model's output stands for (Eq. 15). output, xt: (B, ...); t: (B,).

    prediction_type "epsilon" has no answer where alphas_cumprod is 0: see `check_objective`.
    """
    signal = extract(schedule.sqrt_alphas_cumprod, t, like=xt)
    noise = extract(schedule.sqrt_one_minus_alphas_cumprod, t, like=xt)
    return parametrization(prediction_type).to_x0(output, xt, signal, noise)


def predict_eps(
    schedule: Schedule, output: Tensor, xt: Tensor, t: Tensor, *, prediction_type: str
) -> Tensor:
    """Return the noise that a model's output stands for. output, xt: (B, ...); t: (B,)."""
    signal = extract(schedule.sqrt_alphas_cumprod, t, like=xt)
    noise = extract(schedule.sqrt_one_minus_alphas_cumprod, t, like=xt)
    return parametrization(prediction_type).to_eps(output, xt, signal, noise)


def target(
    schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor, *, prediction_type: str
) -> Tensor:
    """Return the output that is right for xt made of x0 and eps. x0, eps: (B, ...); t: (B,)."""
    return parametrization(prediction_type).target(schedule, x0, eps, t)


def check_objective(schedule: Schedule, prediction_type: str) -> None:
    """Raise ValueError where a schedule and a prediction type cannot work together.

    Call it once, before any work: it waits for the device. With zero terminal SNR the last xt holds
    no x0, and its noise does not determine x0 (Lin et al. 2024, Sec. 3.2).
    """
    parametrization(prediction_type)
    if schedule.is_flow != (prediction_type == "flow_prediction"):
        path = "the straight path of rectified flow" if schedule.is_flow else "a DDPM chain"
        raise ValueError(
            f"prediction_type {prediction_type!r} cannot be used on {path}: 'flow_prediction' goes"
            " with a scheduler of use_flow_sigmas=true, every other one with betas"
        )
    if prediction_type == "epsilon" and bool((schedule.alphas_cumprod == 0).any()):
        raise ValueError(
            "prediction_type 'epsilon' cannot be used with a zero-terminal-SNR schedule: its last"
            " step is pure noise, from which predicted noise gives no image. Use prediction_type"
            " 'v_prediction' (or 'sample'), or turn zero terminal SNR off."
        )
