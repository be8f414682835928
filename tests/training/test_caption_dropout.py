"""Captions are dropped by their keys alone; test_conditioning.py has what takes their place."""

from dataclasses import replace

import pytest

from latentdiff.training.inputs.caption_dropout import is_caption_dropped
from latentdiff.training.inputs.randomness import SampleKey


def test_share_of_dropped_captions_is_the_probability_and_follows_the_key() -> None:
    keys = [SampleKey(k % 100, k // 100, k, 0, 1.0) for k in range(4000)]

    def dropped(keys: list[SampleKey], seed: int = 1) -> list[bool]:
        return [is_caption_dropped(key, seed=seed, caption_dropout=0.25) for key in keys]

    first = dropped(keys)
    assert sum(first) / len(keys) == pytest.approx(0.25, abs=0.02)
    assert dropped([replace(key, stratum=3, weight=0.0) for key in keys]) == first
    assert dropped(keys, seed=2) != first
    assert not any(is_caption_dropped(key, seed=1, caption_dropout=0) for key in keys)
    assert all(is_caption_dropped(key, seed=1, caption_dropout=1) for key in keys)
