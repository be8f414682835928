"""Continuous time in the plane: the likelihood of the probability flow, and predictor-corrector.

python examples/continuous_time.py

Trains a small network on a swiss roll and compares two bounds on its -log p(x0): the variational
bound of the chain (Ho et al. 2020, Eq. 5) and the likelihood of the probability-flow ODE (Y. Song
et al. 2021, Eq. 39). Each is printed for both fixed variances: they decide every term of the
former, and of the latter only L_0, which it shares with the former. Then samples a chain of few
steps with and without Langevin corrections (Alg. 1 and 5): a correction moves points along the
score and adds noise, at one noise level, so that too narrow a distribution widens.
"""

import json

import torch
from jsonargparse import auto_cli
from torch import Tensor

from latentdiff.diffusion.bound import estimate, evaluate_bound
from latentdiff.diffusion.ddpm import Model
from latentdiff.diffusion.schedules import Schedule, make_betas, respace, space_timesteps
from latentdiff.diffusion.theory.continuous_time import (
    flow_bits,
    predictor_corrector,
    probability_flow,
)
from latentdiff.evaluation.swiss_roll import PREDICTION, SwissRoll, train_denoiser


def bits_per_dim(schedule: Schedule, model: Model, x0: Tensor, *, seed: int) -> dict[str, float]:
    """Return both bounds on the mean of -log p(x0) over points x0 (N, 2), by variance."""

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    figures = {}
    for variance_type in ("fixed_small", "fixed_large"):
        bound = evaluate_bound(
            schedule,
            model,
            x0,
            generator=generator(),
            prediction_type=PREDICTION,
            variance_type=variance_type,
            repeats=1,
        )
        flow = flow_bits(
            schedule,
            model,
            x0,
            generator=generator(),
            prediction_type=PREDICTION,
            variance_type=variance_type,
            repeats=1,
        )
        figures[f"variational_bound_{variance_type}"] = estimate(bound.total()).mean
        figures[f"probability_flow_{variance_type}"] = estimate(flow.double()).mean
    return figures


def sample(
    schedule: Schedule, model: Model, noise: Tensor, *, snr: float, seed: int
) -> dict[str, Tensor]:
    """Return points (N, 2) by sampler, from the same noise (N, 2)."""
    samples = {
        f"{num}_corrections": predictor_corrector(
            schedule,
            model,
            noise,
            generator=torch.Generator().manual_seed(seed),
            prediction_type=PREDICTION,
            num_corrections=num,
            snr=snr,
        )
        for num in (0, 1)
    }
    flow = probability_flow(schedule, model, noise, prediction_type=PREDICTION, num_steps=5)
    return samples | {"probability_flow": flow}


def main(
    num_steps: int = 3000,
    chain: str = "20",
    snr: float = 0.02,
    num_points: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Train, bound and sample.

    Args:
        num_steps: optimiser steps of 512 points.
        chain: steps of the short chain, such as "20" or "ddim20".
        snr: length of a correction's drift over its noise; a short chain narrows the data, and
            corrections widen it again. Small here, as in a plane a gradient may be near 0.
        num_points: points of each bound and of each sampler.
        seed: of all random numbers.
    """
    roll = SwissRoll()
    schedule = Schedule.from_betas(make_betas("cosine", 100))
    denoiser = train_denoiser(roll, schedule, num_steps=num_steps, seed=seed)

    def model(xt: Tensor, t: Tensor) -> Tensor:
        return denoiser(xt, t)[:, :2]  # the other two outputs are a learned variance

    generator = torch.Generator().manual_seed(seed + 1)
    x0 = roll.sample(num_points, generator=generator)
    figures = {"entropy": roll.entropy_bits()} | bits_per_dim(schedule, model, x0, seed=seed)
    lowest = roll.log_prob(x0).quantile(0.01)
    noise = torch.randn(num_points, 2, generator=generator)
    short = respace(schedule, space_timesteps(chain, schedule.num_timesteps))
    for name, points in sample(short, model, noise, snr=snr, seed=seed).items():
        figures[f"on_the_roll_{name}"] = float((roll.log_prob(points) > lowest).double().mean())
        figures[f"variance_{name}"] = float(points.double().var(0).mean())
    figures["variance_data"] = float(x0.var(0).mean())
    return figures


if __name__ == "__main__":
    print(json.dumps(auto_cli(main), indent=1))
