"""Two noise schedules in numbers: a learned one, and Stable Diffusion's with zero terminal SNR.

python examples/noise_schedules.py

A learned schedule (Kingma et al. 2021) puts its steps where a model's error is large, so that few
timesteps estimate the bound's sum over the chain well: the sum and the standard error of its
estimate are printed for a straight and for the learned schedule.
Zero terminal SNR (Lin et al. 2024): Stable Diffusion's schedule leaves a little of the data in the
last xt, mostly an image's brightness, so that samples from pure noise are all of medium brightness;
its standard deviation is printed for both. Training has it as diffusion.zero_terminal_snr.
"""

import json

import torch
from jsonargparse import auto_cli
from torch import Tensor

from latentdiff.diffusion.bound import TimestepPlan, estimate, evaluate_bound
from latentdiff.diffusion.ddpm import Model, p_sample_loop
from latentdiff.diffusion.prediction import parametrization
from latentdiff.diffusion.schedules import (
    Schedule,
    alphas_cumprod_from_log_snr,
    log_snr,
    make_betas,
    rescale_zero_terminal_snr,
)
from latentdiff.diffusion.theory.continuous_time import angle_of_log_snr, timestep_at
from latentdiff.diffusion.theory.learned_schedule import (
    MonotoneLogSNR,
    discretise,
    learn_log_snr,
)
from latentdiff.evaluation.swiss_roll import PREDICTION, SwissRoll, train_denoiser


def squared_eps_error(
    schedule: Schedule,
    model: Model,
    roll: SwissRoll,
    log_snr: Tensor,
    *,
    generator: torch.Generator,
) -> Tensor:
    """Return |eps - predicted eps|^2 of a fresh point at each logSNR, (B,) -> (B,)."""
    x0 = roll.sample(len(log_snr), generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    alphas_cumprod = alphas_cumprod_from_log_snr(log_snr).float()[:, None]
    signal, noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    xt = signal * x0 + noise * eps
    output = model(xt, timestep_at(schedule, angle_of_log_snr(log_snr)))
    predicted = parametrization(PREDICTION).to_eps(output, xt, signal, noise)
    return (eps - predicted).square().sum(1)


def transition_errors(*, num_steps: int, num_points: int, seed: int) -> dict[str, float]:
    """Return sum L_{t-1} and the error of its estimate by 2 timesteps, straight and learned.

    L_0 and L_T, the rest of the bound, are those of the two ends, which both schedules share.
    """
    roll = SwissRoll()
    trained_on = Schedule.from_betas(make_betas("cosine", 100))
    denoiser = train_denoiser(roll, trained_on, num_steps=num_steps, seed=seed)

    def model(xt: Tensor, t: Tensor) -> Tensor:
        return denoiser(xt, t)[:, :2]  # the other two outputs are a learned variance

    ends = log_snr(trained_on.alphas_cumprod)
    start, end = float(ends[0]), float(ends[-5])
    generator = torch.Generator().manual_seed(seed)
    learned = learn_log_snr(
        lambda lam: squared_eps_error(trained_on, model, roll, lam, generator=generator),
        start=start,
        end=end,
        generator=generator,
    )
    x0 = roll.sample(num_points, generator=generator)
    figures = {}
    for name, path in (("straight", MonotoneLogSNR(start=start, end=end)), ("learned", learned)):
        samples = evaluate_bound(
            discretise(path, 100, trained_on=trained_on),
            model,
            x0,
            generator=torch.Generator().manual_seed(seed),
            prediction_type=PREDICTION,
            variance_type="fixed_large",
            plan=TimestepPlan.uniform(100, num_draws=2),
        )
        found = estimate(samples.transitions())
        figures |= {
            f"transition_bits_{name}": found.mean,
            f"standard_error_{name}": found.se_noise,
        }
    return figures


def brightness_std(*, num_images: int, seed: int, num_pixels: int = 1024) -> dict[str, float]:
    """Return the standard deviation of the brightness of samples, where it is 1 in the data.

    An image is num_pixels of one value, N(0, 1) over images, so that the best model is known.
    """
    betas = make_betas("scaled_linear", 1000)
    figures = {}
    for name, chain in (("stable_diffusion", betas), ("zero", rescale_zero_terminal_snr(betas))):
        schedule = Schedule.from_betas(chain)

        def expected_x0(xt: Tensor, t: Tensor, schedule: Schedule = schedule) -> Tensor:
            alphas_cumprod = schedule.alphas_cumprod[t][:, None].float()
            precision = num_pixels * alphas_cumprod + (1 - alphas_cumprod)
            brightness = alphas_cumprod.sqrt() * xt.sum(1, keepdim=True) / precision
            return brightness.expand_as(xt)

        generator = torch.Generator().manual_seed(seed)
        samples = p_sample_loop(
            schedule,
            expected_x0,
            torch.randn(num_images, num_pixels, generator=generator),
            generator=generator,
            prediction_type="sample",
        )
        figures[f"terminal_snr_{name}"] = float(log_snr(schedule.alphas_cumprod[-1]).exp())
        figures[f"brightness_std_{name}"] = float(samples.mean(1).std())
    return figures


def main(
    num_steps: int = 3000, num_points: int = 2000, num_images: int = 300, seed: int = 0
) -> dict[str, float]:
    """Learn a schedule and compare; sample brightness with and without zero terminal SNR.

    Args:
        num_steps: optimiser steps of 512 points.
        num_points: points of each bound.
        num_images: samples whose brightness is measured.
        seed: of all random numbers.
    """
    figures = transition_errors(num_steps=num_steps, num_points=num_points, seed=seed)
    return figures | brightness_std(num_images=num_images, seed=seed)


if __name__ == "__main__":
    print(json.dumps(auto_cli(main), indent=1))
