"""Paired comparison: better, worse, or cannot tell."""

import numpy as np
import pytest

from latentdiff.evaluation.report.comparison import compare

RNG = np.random.default_rng(0)
HARDNESS = RNG.normal(0, 5, 100)
GOOD = HARDNESS + 0.4 + RNG.normal(0, 0.5, 100)
POOR = HARDNESS + RNG.normal(0, 0.5, 100)


def test_the_better_model_is_found_under_noise_that_both_share():
    found = compare(GOOD, POOR, higher_is_better=True)
    assert found.verdict == "better"
    assert found.difference.contains(0.4)
    assert found.num_wins > found.num_losses > 0
    assert found.num_wins + found.num_losses == 100


def test_the_verdict_turns_with_the_order_and_with_the_score():
    assert compare(POOR, GOOD, higher_is_better=True).verdict == "worse"
    assert compare(POOR, GOOD, higher_is_better=False).verdict == "better"
    losses = compare(GOOD, POOR, higher_is_better=False)
    assert (losses.verdict, losses.num_wins < losses.num_losses) == ("worse", True)


def test_a_model_against_itself_gives_no_verdict():
    found = compare(GOOD, GOOD, higher_is_better=True)
    assert (found.verdict, found.num_wins, found.num_losses) == ("cannot tell", 0, 0)
    assert (found.difference.low, found.difference.high) == (0, 0)


def test_equal_models_seldom_get_a_verdict():
    rng = np.random.default_rng(1)
    verdicts = [
        compare(*rng.normal(size=(2, 60)), higher_is_better=True, num_resamples=1000).verdict
        for _ in range(300)
    ]
    assert 0.02 <= np.mean([verdict != "cannot tell" for verdict in verdicts]) <= 0.08


def test_a_few_pairs_give_no_verdict():
    assert compare(GOOD[:9] + 50, POOR[:9], higher_is_better=True).verdict == "cannot tell"
    assert compare(GOOD[:10] + 50, POOR[:10], higher_is_better=True).verdict == "better"


def test_the_sentence_states_the_figures():
    text = str(compare([2.0] * 20, [1.5] * 20, higher_is_better=True))
    assert text == "better: +0.5 [+0.5, +0.5] at 95%, 20 pairs, 20 won, 0 lost"


def test_scores_that_are_not_paired_are_refused():
    with pytest.raises(ValueError, match="not paired"):
        compare(GOOD, POOR[:50], higher_is_better=True)
    with pytest.raises(ValueError, match="not finite"):
        compare([float("nan")] * 20, [1.0] * 20, higher_is_better=True)
