"""The stop rule, on costs whose course is known."""

import json

import numpy as np
import pytest

from latentdiff.evaluation.metrics.bootstrap import student_difference
from latentdiff.evaluation.metrics.stopping import PATIENCE, State, StopRule, Verdict

UNITS = np.linspace(0.5, 1.5, 8)  # costs of eight units before training: unlike each other


def costs(level: float, seed: int = 0, *, noise: float = 0.01) -> list[float]:
    return list(UNITS * level + noise * np.random.default_rng(seed).normal(size=len(UNITS)))


def judge(levels: list[float], rule: StopRule | None = None, **options: float) -> list[Verdict]:
    rule = rule or StopRule(**options)  # type: ignore[arg-type]
    found = [rule.add(State(10 * k, costs(level, k))) for k, level in enumerate(levels)]
    assert found[0] is None  # nothing to compare with
    return [one for one in found if one is not None]


def test_a_falling_cost_gains_although_the_units_differ_more_than_it_falls() -> None:
    verdicts = judge([1.0, 0.95, 0.9, 0.85, 0.8])
    assert [one.name for one in verdicts] == ["gaining"] * 4
    assert not any(one.stops for one in verdicts)
    assert verdicts[-1].best_step == 40


def test_a_cost_that_rises_twice_in_a_row_stops_the_run_at_its_lowest() -> None:
    verdicts = judge([1.0, 0.8, 0.85, 0.9])
    assert [one.name for one in verdicts] == ["gaining", "overfitting", "overfitting"]
    assert [one.stops for one in verdicts] == [False, False, True]
    assert verdicts[-1].best_step == 10
    assert verdicts[-1].change.low > 0


def test_a_flat_cost_stops_the_run_when_patience_ends() -> None:
    verdicts = judge([1.0, *[0.8] * (PATIENCE + 1)])
    assert [one.name for one in verdicts] == ["gaining", *["flat"] * PATIENCE]
    assert [one.stops for one in verdicts] == [*[False] * PATIENCE, True]


def test_gains_too_small_for_one_evaluation_add_up() -> None:
    names = [one.name for one in judge([1 - 0.006 * k for k in range(12)], patience=99)]
    assert "flat" in names
    assert names.count("gaining") >= 2


def test_noise_alone_rarely_overfits_twice_in_a_row() -> None:
    stops = 0
    for seed in range(100):
        rule = StopRule(patience=99)
        for k in range(13):
            verdict = rule.add(State(k, costs(1.0, 100 * seed + k)))
        stops += verdict is not None and verdict.stops
    assert stops <= 25


def test_only_a_gain_above_its_error_replaces_the_best_where_a_margin_is_asked() -> None:
    states = [[4.0, 4.0, 4.0], [1.0, 2.0, 3.0], [0.9, 1.8, 3.2], [0.5, 1.5, 2.6]]
    for margin, best in ((0.0, [1, 2, 3]), (1.0, [1, 3])):
        rule = StopRule(margin=margin)
        for k, values in enumerate(states):
            rule.add(State(k, values))
        assert rule.best_steps == best


def test_drift_without_a_gain_is_overfitting() -> None:
    rule = StopRule(margin=1.0)
    drifts = [[0.0] * 4, [0.1, 0.12, 0.1, 0.11], [0.2, 0.22, 0.21, 0.2]]
    states = [State(k, costs(lv, k), drifts[k]) for k, lv in enumerate((1.0, 0.8, 0.8))]
    names = [one and one.name for one in map(rule.add, states)]
    assert names == [None, "gaining", "overfitting"]


def test_warmup_brings_no_end_nearer_and_a_step_is_judged_once() -> None:
    rule = StopRule()
    rule.add(State(0, costs(1.0)))
    verdicts = [rule.add(State(k, costs(1.0, k)), counts=False) for k in range(1, 9)]
    assert not any(one and one.stops for one in verdicts)
    assert rule.add(State(8, costs(0.1))) is None


def test_a_rule_that_was_stored_goes_on_as_if_never_interrupted() -> None:
    levels = [1.0, 0.8, 0.85, 0.83, 0.9, 0.7, 0.72]
    whole, rule = StopRule(), StopRule()
    expected = [whole.add(State(k, costs(level, k))) for k, level in enumerate(levels)]
    found = []
    for k, level in enumerate(levels):
        rule = StopRule.from_json(json.loads(json.dumps(rule.to_json())))
        found.append(rule.add(State(k, costs(level, k))))
    assert found == expected
    assert json.dumps(rule.to_json()) == json.dumps(whole.to_json())


def test_regret_is_that_of_the_chosen_state_against_the_best_in_hindsight() -> None:
    verdict = judge([1.0, 0.8, 0.85, 0.9, 0.6])[-1]
    assert verdict.stops
    assert verdict.regret is not None
    assert verdict.regret.estimate == pytest.approx(0.2, abs=0.02)
    assert verdict.regret.low > 0


def test_ranking_names_the_last_best_first() -> None:
    rule = StopRule()
    judge([1.0, 0.9, 0.8, 0.85], rule)
    ranks = rule.ranking()
    assert sorted(ranks, key=ranks.__getitem__) == [20, 10]  # the untrained state is none to keep


def test_students_interval_has_its_level() -> None:
    rng = np.random.default_rng(0)
    held = [student_difference(rng.normal(size=4), np.zeros(4)).contains(0.0) for _ in range(2000)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)
