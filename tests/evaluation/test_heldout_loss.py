"""Held-out figures: fixed stratified triples, the same however many processes measure them."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.schedules import Schedule
from latentdiff.evaluation.metrics import heldout_loss
from latentdiff.evaluation.metrics.heldout_loss import (
    BATCH_SIZE,
    Triples,
    bucket_labels,
    rank_batches,
    stratified_timesteps,
    summarize_gap,
    summarize_losses,
    triple_losses,
)
from latentdiff.models.build import make_ddpm_scheduler, schedule_of
from latentdiff.models.conditioning import Conditioning

N, NUM_TIMESTEPS = 2 * BATCH_SIZE + 5, 1000


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return schedule_of(make_ddpm_scheduler(num_timesteps=NUM_TIMESTEPS))


@pytest.fixture(scope="module")
def triples() -> Triples:
    generator = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, N, 4, 8, 8, generator=generator)
    text = torch.arange(1.0, N + 1)[:, None, None].repeat(1, 3, 2)
    t = stratified_timesteps(N, NUM_TIMESTEPS)
    return Triples(z0, eps, t, Conditioning(text), null_text=Conditioning(torch.zeros(1, 3, 2)))


def denoise(zt: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """A model that errs with its caption."""
    text = conditioning.prompt_embeds
    assert text is not None
    return zt * torch.cos(t / 1000)[:, None, None, None] + text.mean((1, 2))[:, None, None, None]


def measure(schedule: Schedule, triples: Triples, shard: tuple[int, int]) -> dict[str, Tensor]:
    return triple_losses(
        denoise,
        schedule,
        triples,
        prediction_type="epsilon",
        device=torch.device("cpu"),
        shard=shard,
    )


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_shares_add_up_to_the_whole_bit_for_bit(
    schedule: Schedule, triples: Triples, num_processes: int
) -> None:
    whole = measure(schedule, triples, (0, 1))
    shares = [measure(schedule, triples, (rank, num_processes)) for rank in range(num_processes)]
    for name, losses in whole.items():
        assert losses.shape == (N,)
        assert (losses > 0).all()
        assert torch.equal(sum(share[name] for share in shares), losses)


@pytest.mark.parametrize(("num", "num_processes"), [(0, 2), (1, 2), (5, 2), (6, 3), (2, 5)])
def test_every_rank_gets_equally_many_batches_and_each_counts_once(
    num: int, num_processes: int
) -> None:
    dealt = [list(rank_batches(num, (rank, num_processes))) for rank in range(num_processes)]
    assert len({len(mine) for mine in dealt}) == 1
    assert sorted(k for mine in dealt for k, counts in mine if counts) == list(range(num))


def test_each_triple_is_measured_under_its_own_the_one_before_and_the_null_caption(
    schedule: Schedule, triples: Triples
) -> None:
    losses = measure(schedule, triples, (0, 1))
    mean, std = schedule.alphas_cumprod[triples.t].sqrt(), (1 - schedule.alphas_cumprod[triples.t])
    zt = mean.view(-1, 1, 1, 1) * triples.z0 + std.sqrt().view(-1, 1, 1, 1) * triples.eps
    for name, text in {
        "true": triples.text,
        "shuffled": triples.text.map(lambda x: x.roll(1, 0)),
        "null": triples.text.map(torch.zeros_like),
    }.items():
        error = denoise(zt.float(), triples.t, text) - triples.eps
        torch.testing.assert_close(losses[name], error.square().mean((1, 2, 3)))


def test_timesteps_cover_the_chain_evenly_and_so_does_any_first_part() -> None:
    t = stratified_timesteps(256, NUM_TIMESTEPS)
    assert torch.equal((t * 256 // NUM_TIMESTEPS).sort().values, torch.arange(256))
    first = (t[:16] * 4 // NUM_TIMESTEPS).bincount(minlength=4)
    assert first.min() >= 3


def test_summary_has_standard_errors_by_bucket_and_caption_use() -> None:
    t = torch.tensor([0, 249, 250, 999])
    true = torch.tensor([1.0, 3.0, 2.0, 2.0])
    losses = {"true": true, "null": true * 2, "shuffled": true}
    figures = summarize_losses(losses, t, num_timesteps=1000)
    assert figures["heldout_loss"] == 2
    assert figures["heldout_se"] == pytest.approx((2 / 3) ** 0.5 / 2)
    assert figures["caption_use"] == pytest.approx(0.5)
    assert figures["caption_match"] == 0
    assert figures["caption_use_se"] == pytest.approx((2 / 3) ** 0.5 / 2 / 4)
    assert figures["heldout_loss/t0-249"] == 2
    assert figures["heldout_se/t0-249"] == pytest.approx(1)
    assert figures["heldout_loss/t250-499"] == 2
    assert "heldout_se/t250-499" not in figures  # of one triple
    assert "heldout_loss/t500-749" not in figures
    assert figures["num_heldout"] == 4


def test_bucket_labels_name_the_timesteps_that_fall_into_them() -> None:
    assert bucket_labels(1000) == ["t0-249", "t250-499", "t500-749", "t750-999"]
    bucket = torch.arange(10) * 4 // 10
    for b, label in enumerate(bucket_labels(10)):
        low, high = (int(edge) for edge in label[1:].split("-"))
        assert (bucket == b).nonzero().flatten().tolist() == list(range(low, high + 1))


def test_one_caption_alone_gives_the_same_loss_as_with_the_others(
    schedule: Schedule, triples: Triples
) -> None:
    alone = triple_losses(
        denoise,
        schedule,
        triples,
        prediction_type="epsilon",
        device=torch.device("cpu"),
        captions=["true"],
    )
    assert alone.keys() == {"true"}
    torch.testing.assert_close(alone["true"], measure(schedule, triples, (0, 1))["true"])


def test_the_gap_is_paired_by_timestep() -> None:
    t = torch.tensor([900, 100, 500])
    none = Conditioning()
    sorted_triples = Triples(torch.zeros(3), torch.zeros(3), t, none, none)
    heldout = torch.tensor([9.0, 1.0, 5.0])[sorted_triples.order]
    figures = summarize_gap(heldout, torch.tensor([0.5, 4.0, 9.0]))
    assert figures["train_loss_fixed"] == pytest.approx(4.5)
    assert figures["heldout_gap"] == pytest.approx(0.5)
    assert figures["heldout_gap_se"] == pytest.approx((0.25 / 3) ** 0.5)


def test_triples_are_measured_inside_their_masks(schedule: Schedule, triples: Triples) -> None:
    mask = torch.zeros(N, 1, 8, 8)
    mask[:, :, :, :3] = 1
    masked = measure(schedule, replace(triples, mask=list(mask)), (0, 1))["true"]
    part = replace(triples, z0=triples.z0[..., :3], eps=triples.eps[..., :3])
    torch.testing.assert_close(masked, measure(schedule, part, (0, 1))["true"])


def test_condition_use_is_the_gain_over_none_and_over_another_images(
    schedule: Schedule, triples: Triples
) -> None:
    """A model that knows eps from its condition alone: the true one leaves no error."""
    sizes = [8] * 10 + [4] * (N - 10)  # of two buckets
    z0, eps = (
        [x[k, :, :side, :side] for k, side in enumerate(sizes)] for x in (triples.z0, triples.eps)
    )
    condition = [torch.cat([one, one[:1]]) for one in eps]  # (5, h, w)
    labels = torch.arange(N)
    given = replace(
        triples,
        z0=z0,
        eps=eps,
        text=replace(triples.text, class_labels=labels),
        condition=condition,
        null_condition=[torch.zeros_like(one) for one in condition],
    )
    seen: list[Tensor] = []

    def knows(zt: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.condition is not None
        assert conditioning.class_labels is not None
        seen.append(conditioning.class_labels)
        return conditioning.condition[:, :4]

    losses = triple_losses(
        knows, schedule, given, prediction_type="epsilon", device=torch.device("cpu")
    )
    assert list(losses) == ["true", "shuffled", "null", "other_condition", "no_condition"]
    assert (losses["true"] == 0).all()
    assert (losses["no_condition"] > 0.5).all()
    assert (losses["other_condition"] > 1).all()
    first = seen[0].view(5, -1)
    assert first[0].tolist() == list(range(8))
    assert first[3].tolist() == [9, *range(7)]  # the other's noise level, within one size
    figures = summarize_losses(losses, triples.t, num_timesteps=NUM_TIMESTEPS)
    assert figures["condition_use"] == pytest.approx(1)
    assert figures["condition_match"] == pytest.approx(1)
    assert 0 < figures["condition_use_se"] < 0.2
    plain = summarize_losses(
        measure(schedule, triples, (0, 1)), triples.t, num_timesteps=NUM_TIMESTEPS
    )
    assert not any(name.startswith("condition") for name in plain)


@pytest.mark.parametrize(("pixels", "at_once"), [(64 * 24, 24), (64 * 23, 8), (64 * 2, 2), (1, 1)])
def test_large_latents_are_measured_few_at_once_with_the_same_figures(
    schedule: Schedule,
    triples: Triples,
    monkeypatch: pytest.MonkeyPatch,
    pixels: int,
    at_once: int,
) -> None:
    expected, passes = measure(schedule, triples, (0, 1)), []

    def counting(zt: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        passes.append(len(zt))
        return denoise(zt, t, conditioning)

    monkeypatch.setattr(heldout_loss, "PIXELS_AT_ONCE", pixels)
    found = triple_losses(
        counting, schedule, triples, prediction_type="epsilon", device=torch.device("cpu")
    )
    assert max(passes) == at_once
    for name, losses in expected.items():
        torch.testing.assert_close(found[name], losses)
