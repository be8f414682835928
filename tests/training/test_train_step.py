"""Which timesteps a step takes, and what makes up for taking them unevenly."""

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.timesteps import (
    LossSecondMomentSampler,
    SamplingOptions,
    TimestepSampler,
    build_timestep_sampler,
)
from latentdiff.models.build import make_ddpm_scheduler, schedule_of
from latentdiff.models.conditioning import Conditioning
from latentdiff.training.inputs.batches import SMALL_BYTES, collate
from latentdiff.training.text_to_image.objective import Objective

NUM_TIMESTEPS = 8
N = 80_000


def objective(sampler: TimestepSampler) -> Objective:
    return Objective(
        schedule_of(make_ddpm_scheduler(num_timesteps=NUM_TIMESTEPS)),
        prediction_type="epsilon",
        null_text=Conditioning(torch.zeros(1, 2, 3)),
        sample_timesteps=sampler,
    )


@pytest.mark.parametrize("count", [4, 8])  # 4: an epoch's last batch, half as large
def test_every_batch_is_stratified_over_the_whole_chain(count: int) -> None:
    u, place = torch.rand(count, dtype=torch.float64), torch.randperm(count)
    sampler = build_timestep_sampler("stratified", SamplingOptions(NUM_TIMESTEPS))
    t, importance_weight = sampler(u, place, count)
    assert torch.equal(t * count // NUM_TIMESTEPS, place)
    assert torch.equal(importance_weight, torch.ones(count))


def err_with_time(zt: Tensor, t: Tensor, text: Conditioning) -> Tensor:
    """A model whose loss depends on the timestep: the error is its root."""
    return torch.zeros_like(zt) + (t + 1.0).sqrt()[:, None, None, None]


def test_importance_keeps_the_mean_loss_that_of_uniform_timesteps() -> None:
    sampler = LossSecondMomentSampler(NUM_TIMESTEPS, history=2, uniform_share=0.1)
    steps = torch.arange(NUM_TIMESTEPS).repeat(2)
    sampler.update(steps, (steps + 1.0) ** 2)
    batch = {
        "z0": torch.zeros(N, 1, 1, 1),
        "eps": torch.zeros(N, 1, 1, 1),
        "u": (torch.arange(N, dtype=torch.float64) + 0.5) / N,
        "stratum": torch.arange(N),
        "prompt_embeds": torch.zeros(N, 2, 3),
        "dropped": torch.zeros(N, dtype=torch.bool),
    }
    losses = objective(sampler).losses(err_with_time, batch, count=N)
    seen = losses.t.bincount(minlength=NUM_TIMESTEPS) / N
    assert seen[-1] > 2 * seen[0]
    uniform_mean = (NUM_TIMESTEPS + 1) / 2  # of t + 1
    assert float((losses.loss * losses.importance_weight).mean()) == pytest.approx(
        uniform_mean, rel=1e-3
    )
    assert float(losses.loss.mean()) > 1.2 * uniform_mean


def test_small_parts_of_a_batch_travel_in_the_message() -> None:
    large = torch.zeros(SMALL_BYTES // 4 + 1)
    batch = collate([{"z0": large, "u": torch.tensor(0.5, dtype=torch.float64)}] * 2)
    assert isinstance(batch["z0"], Tensor)
    assert torch.equal(torch.as_tensor(batch["u"]), torch.full((2,), 0.5, dtype=torch.float64))
    assert not isinstance(batch["u"], Tensor)
