"""Seeded losses and images are those of tests/results.lock.json; a change of them is explained."""

from __future__ import annotations

from pathlib import Path

import pytest
from results_lock import (
    CHANGELOG,
    Result,
    compute,
    differences,
    kind,
    read_lock,
    unexplained,
    updated,
)


def test_losses_and_images_are_the_recorded_ones(tmp_path: Path) -> None:
    told = "\n".join(differences(read_lock(), compute(tmp_path), kind=kind()))
    assert not told, f'{told}\nmeant? make results-lock WHY="the reason"'


def test_every_change_of_numbers_is_in_the_changelog() -> None:
    assert not unexplained(read_lock(), CHANGELOG.read_text(encoding="utf-8"))


RESULTS = {"a loss": Result((0.5, 0.25), "bits"), "an image": Result((0.1,), "pixels")}
EMPTY = {"results": {}, "changes": []}


def test_other_values_are_told_and_other_bits_on_the_same_processor_alone() -> None:
    lock = updated(EMPTY, RESULTS, kind="mine", why="")
    assert lock["changes"] == []
    assert differences(lock, RESULTS, kind="mine") == []
    rounded = RESULTS | {"a loss": Result((0.5001, 0.25), "other bits")}
    assert differences(lock, rounded, kind="another") == []
    assert differences(lock, rounded, kind="mine") == [
        "a loss: equal but for rounding, other bits on mine"
    ]
    wrong = RESULTS | {"a loss": Result((0.51, 0.25), "other bits")}
    assert differences(lock, wrong, kind="another") == ["a loss: 0.51, 0.25 ..., was 0.5, 0.25 ..."]
    fewer = RESULTS | {"a loss": Result((0.5,), "bits")}
    assert len(differences(lock, fewer, kind="another")) == 1
    assert differences(lock, {"a loss": RESULTS["a loss"]}, kind="mine") == [
        "an image: no longer computed"
    ]


def test_numbers_change_only_with_a_reason_which_the_changelog_states() -> None:
    lock = updated(EMPTY, RESULTS, kind="mine", why="")
    lock = updated(lock, RESULTS, kind="another", why="")
    changed = RESULTS | {"a loss": Result((0.75, 0.25), "new bits")}
    with pytest.raises(ValueError, match="say why"):
        updated(lock, changed, kind="mine", why=" ")
    new = updated(lock, changed, kind="mine", why="a better loss")
    assert new["results"]["a loss"]["hashes"] == {"mine": "new bits"}
    assert new["results"]["an image"]["hashes"] == {"mine": "pixels", "another": "pixels"}
    assert new["changes"] == [{"results": ["a loss"], "why": "a better loss"}]
    assert unexplained(new, "- Nothing new.") == ["a better loss"]
    assert unexplained(new, "- Numbers change: a\n  better loss") == []
