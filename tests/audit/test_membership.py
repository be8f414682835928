"""Membership inference: closed forms, the level of its interval, and what the base takes out."""

import pytest
import torch

from latentdiff.audit.membership import (
    auc_interval,
    membership,
    membership_scores,
    most_exposed,
)


def test_auc_is_the_share_of_pairs_in_which_the_member_scores_more() -> None:
    found = membership(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([0.0, 2.0]))
    assert found.auc.estimate == pytest.approx((2 + 1 + 1.5) / 6)
    assert found.true_positives.estimate == pytest.approx(1 / 3)  # above both others


def test_interval_has_a_width_where_all_are_told_apart() -> None:
    found = auc_interval(1.0, 48, 48, level=0.95)
    assert (found.estimate, found.high) == (1.0, 1.0)
    assert 0.95 < found.low < 0.97
    assert auc_interval(0.0, 48, 48, level=0.95).high == pytest.approx(1 - found.low)


def test_images_never_shown_score_one_half_within_the_interval_in_95_percent_of_audits() -> None:
    generator = torch.Generator().manual_seed(0)
    audits = [
        membership(torch.randn(40, generator=generator), torch.randn(60, generator=generator))
        for _ in range(200)
    ]
    share = sum(one.auc.contains(0.5) for one in audits) / len(audits)
    assert 0.92 <= share <= 0.98
    false_alarms = sum(one.p_value < 0.05 for one in audits) / len(audits)
    assert false_alarms <= 0.08


def test_losses_of_the_base_take_out_how_difficult_an_image_is() -> None:
    generator = torch.Generator().manual_seed(0)
    base = 1 + torch.rand(40, 1, generator=generator).expand(40, 4)
    gain = torch.tensor([0.1] * 20 + [0.0] * 20)[:, None]
    plain, paired = (
        membership(scores[:20], scores[20:])
        for scores in (membership_scores(base - gain), membership_scores(base - gain, base=base))
    )
    assert paired.auc.estimate == 1.0
    assert plain.auc.estimate < 0.9


def test_scores_do_not_depend_on_the_scale_of_a_draw() -> None:
    losses = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    scaled = losses * torch.tensor([1.0, 10.0, 0.1])
    assert torch.allclose(membership_scores(losses), membership_scores(scaled))


def test_most_exposed_come_first_with_the_share_of_others_below_them() -> None:
    found = most_exposed(torch.tensor([0.0, 2.0, 1.0]), torch.tensor([0.5, 1.5]), num=2)
    assert found == [(1, 1.0), (2, 0.5)]


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="1 members and 3 others"):
        membership(torch.zeros(1), torch.zeros(3))
