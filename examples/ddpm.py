"""DDPM in the plane: the paper's loss and its sampler, and nothing else.

python examples/ddpm.py

Trains a small network by L_simple (Ho et al. 2020, Alg. 1 and Eq. 14) on points of a swiss roll and
samples it by the ancestral chain (Alg. 2). Prints the share of samples on the roll: of a density,
which is known, above that of all but 1 % of the data.
"""

import json

import torch
from jsonargparse import auto_cli
from torch import Tensor

from latentdiff.diffusion.ddpm import p_sample_loop, simple_loss
from latentdiff.diffusion.schedules import Schedule, make_betas
from latentdiff.diffusion.timesteps import uniform_timesteps
from latentdiff.evaluation.swiss_roll import SwissRoll, TinyDenoiser


def train(roll: SwissRoll, schedule: Schedule, *, num_steps: int, seed: int) -> TinyDenoiser:
    """Train a network that predicts noise."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = TinyDenoiser(num_timesteps=schedule.num_timesteps)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    for _ in range(num_steps):
        x0 = roll.sample(512, generator=generator)  # (B, 2)
        eps = torch.randn(x0.shape, generator=generator)
        t = uniform_timesteps(torch.rand(len(x0), generator=generator), schedule.num_timesteps)
        loss = simple_loss(schedule, lambda xt, t: predict_noise(network, xt, t), x0, t, eps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return network.eval()


def predict_noise(network: TinyDenoiser, xt: Tensor, t: Tensor) -> Tensor:
    """Return the noise in xt (B, 2); the network's other two outputs are for a learned variance."""
    return network(xt, t)[:, :2]


def main(
    num_steps: int = 6000, num_timesteps: int = 100, num_points: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Train, sample and compare.

    Args:
        num_steps: optimiser steps of 512 points.
        num_timesteps: length of the chain, T.
        num_points: number of samples.
        seed: of all random numbers.
    """
    roll = SwissRoll()
    schedule = Schedule.from_betas(make_betas("cosine", num_timesteps))
    network = train(roll, schedule, num_steps=num_steps, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    noise = torch.randn(num_points, 2, generator=generator)
    samples = p_sample_loop(
        schedule,
        lambda xt, t: predict_noise(network, xt, t),
        noise,
        generator=generator,
        prediction_type="epsilon",
        clip_x0=2.5,  # the roll lies within
    )
    lowest = roll.log_prob(roll.sample(num_points, generator=generator)).quantile(0.01)
    return {
        "share_of_data_on_the_roll": 0.99,
        "share_of_samples_on_the_roll": float((roll.log_prob(samples) > lowest).double().mean()),
        "share_of_noise_on_the_roll": float((roll.log_prob(noise) > lowest).double().mean()),
    }


if __name__ == "__main__":
    print(json.dumps(auto_cli(main), indent=1))
