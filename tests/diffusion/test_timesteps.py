"""Timestep samplings: coverage, importance weights, determinism."""

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.timesteps import (
    LossSecondMomentSampler,
    logit_normal_timesteps,
    stratify,
    uniform_timesteps,
)

GRID = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


def test_uniform_covers_every_step_equally() -> None:
    t = uniform_timesteps(GRID, 1000)
    assert torch.equal(t.bincount(minlength=1000), torch.full((1000,), 100))
    almost_one = torch.tensor([1 - 2**-24], dtype=torch.float32)
    assert int(uniform_timesteps(almost_one, 1000)) == 999


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.5)])
def test_logit_normal_has_a_normal_logit(mean: float, std: float) -> None:
    t = logit_normal_timesteps(GRID, 1_000_000, mean=mean, std=std)
    logit = torch.logit((t + 0.5) / 1_000_000)
    assert float(logit.mean()) == pytest.approx(mean, abs=1e-3)
    assert float(logit.std()) == pytest.approx(std, abs=1e-3)
    lowest, highest = logit_normal_timesteps(torch.tensor([0.0, 1 - 2**-24]), 1000).tolist()
    assert lowest == 0
    assert 900 < highest < 1000


def test_stratified_draws_fill_every_stratum_once() -> None:
    u = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    place = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    stratified = stratify(u, place, num_strata=64)
    assert torch.equal((stratified * 64).long(), place)


def _trained(num_timesteps: int = 8, history: int = 3) -> tuple[LossSecondMomentSampler, Tensor]:
    """A sampler that has seen loss t + 1 at every t, and the probabilities this must give."""
    sampler = LossSecondMomentSampler(num_timesteps, history=history, uniform_share=0.2)
    t = torch.arange(num_timesteps).repeat(history)
    sampler.update(t, t + 1.0)
    size = torch.arange(1.0, num_timesteps + 1)
    return sampler, 0.8 * size / size.sum() + 0.2 / num_timesteps


def test_probabilities_are_in_proportion_to_the_root_mean_square_loss() -> None:
    sampler, expected = _trained()
    torch.testing.assert_close(sampler.probabilities(), expected)
    mixed = LossSecondMomentSampler(2, history=2, uniform_share=1e-6)
    mixed.update(torch.tensor([0, 0, 1, 1]), torch.tensor([3.0, 4.0, 0.0, 5.0]))
    ratio = mixed.probabilities()[0] / mixed.probabilities()[1]
    assert float(ratio) == pytest.approx((12.5 / 12.5) ** 0.5, rel=1e-4)


def test_uniform_until_every_step_has_its_history() -> None:
    sampler = LossSecondMomentSampler(3, history=2)
    uniform = torch.full((3,), 1 / 3)
    sampler.update(torch.tensor([0, 1, 2, 0, 1]), torch.tensor([9.0, 1, 1, 9, 1]))
    torch.testing.assert_close(sampler.probabilities(), uniform)
    sampler.update(torch.tensor([2]), torch.tensor([1.0]))
    assert float(sampler.probabilities()[0]) > 0.7


def test_losses_of_nothing_but_zero_stay_uniform() -> None:
    sampler = LossSecondMomentSampler(4, history=1)
    sampler.update(torch.arange(4), torch.zeros(4))
    torch.testing.assert_close(sampler.probabilities(), torch.full((4,), 0.25))


def test_draws_follow_the_probabilities() -> None:
    sampler, expected = _trained()
    t, weights = sampler.sample(GRID)
    torch.testing.assert_close(
        t.bincount(minlength=8) / len(t), expected, rtol=0, atol=2 / len(GRID)
    )
    torch.testing.assert_close(weights, 1 / (8 * expected[t]))


def test_gradient_estimate_is_unbiased() -> None:
    """The weighted gradient's mean over the samples is the plain mean over all timesteps."""
    sampler, _ = _trained()
    targets = torch.arange(8, dtype=torch.float64).square()

    def gradient(t: Tensor, weights: Tensor) -> float:
        w = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
        (weights * (w - targets[t]).square()).mean().backward()
        assert w.grad is not None
        return float(w.grad)

    t, weights = sampler.sample(GRID)
    every = gradient(torch.arange(8), torch.ones(8))
    assert gradient(t, weights.double()) == pytest.approx(every, rel=1e-3)
    assert abs(gradient(t, torch.ones(len(t))) / every - 1) > 0.1  # what weights are for


def test_a_masked_batch_changes_nothing_though_losses_be_nan() -> None:
    sampler, _ = _trained()
    before = sampler.state_dict()
    bad = torch.tensor([0, 5, 5]), torch.tensor([float("nan"), 1.0, float("inf")])
    sampler.update(*bad, torch.tensor(False))
    assert all(torch.equal(sampler.state_dict()[name], before[name]) for name in before)
    sampler.update(torch.tensor([0]), torch.tensor([7.0]), torch.tensor(True))
    assert not torch.equal(sampler.state_dict()["losses"], before["losses"])


def test_draws_follow_probabilities_thinner_than_float32_tells() -> None:
    """With float32 edges the last of these steps would be sampled 40 times as often, or never."""
    sampler = LossSecondMomentSampler(1000, history=1, uniform_share=1e-6)
    losses = torch.zeros(1000)
    losses[0] = 1.0
    sampler.update(torch.arange(1000), losses)
    p = float(sampler.probabilities()[999])
    u = 1 - torch.linspace(0, 2 * p, 2001, dtype=torch.float64)[1:]
    assert float((sampler.sample(u)[0] == 999).double().mean()) == pytest.approx(0.5, abs=0.02)


def _one_by_one(t: Tensor, losses: Tensor, num_timesteps: int, history: int) -> list[list[float]]:
    seen: list[list[float]] = [[] for _ in range(num_timesteps)]
    for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
        seen[step] = (seen[step] + [loss])[-history:]
    return [sorted(s) for s in seen]


def test_a_batch_with_repeats_is_remembered_as_if_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    sampler = LossSecondMomentSampler(4, history=3)
    t = torch.randint(0, 4, (200,), generator=generator)
    losses = torch.rand(200, generator=generator)
    for batch in range(0, 200, 20):
        sampler.update(t[batch : batch + 20], losses[batch : batch + 20])
    remembered = [sorted(row) for row in sampler.state_dict()["losses"].tolist()]
    assert remembered == _one_by_one(t, losses, 4, 3)
    assert torch.equal(sampler.state_dict()["counts"], t.bincount(minlength=4))


def test_state_comes_back_and_wrong_state_is_refused() -> None:
    sampler, expected = _trained()
    copy = LossSecondMomentSampler(8, history=3, uniform_share=0.2)
    copy.load_state_dict(sampler.state_dict())
    torch.testing.assert_close(copy.probabilities(), expected)
    more = torch.tensor([0, 0, 5]), torch.tensor([9.0, 8.0, 7.0])
    sampler.update(*more)
    copy.update(*more)
    assert torch.equal(copy.probabilities(), sampler.probabilities())
    with pytest.raises(ValueError, match="num_timesteps or history"):
        LossSecondMomentSampler(9, history=3).load_state_dict(sampler.state_dict())
    with pytest.raises(ValueError, match="did not sample timesteps by their losses"):
        LossSecondMomentSampler(8).load_state_dict({})
    with pytest.raises(ValueError, match="uniform_share"):
        LossSecondMomentSampler(9, uniform_share=0.0)


def test_sampler_never_waits_for_the_device() -> None:
    """On the meta device there are no values: looking at one, as a wait would, is an error."""
    sampler = LossSecondMomentSampler(10, device="meta")
    u = torch.empty(4, device="meta")
    t, weights = sampler.sample(u)
    sampler.update(t, u)
    assert t.device.type == weights.device.type == "meta"
