"""Which samples a step takes: one bucket at a time, whatever the layout, and every image."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from latentdiff.data.epoch_draws import EpochDraws
from latentdiff.training.inputs.batches import BatchLayout, EpochOrder, StepBatchSampler
from latentdiff.training.inputs.randomness import SampleKey, epoch_order, step_strata

BUCKET_OF = np.random.default_rng(0).integers(0, 4, 53).astype(np.int16)


def keys_of(order: EpochOrder, layout: BatchLayout, first: int, last: int) -> list[list[SampleKey]]:
    """The keys of each step over all processes, without padding, by index in the epoch."""
    steps = {"first_step": first, "last_step": last}
    shares = [
        list(StepBatchSampler(layout, order, **steps, rank=rank, seed=3))
        for rank in range(layout.num_processes)
    ]
    found = []
    for step in range(last - first):
        part = slice(step * layout.accumulation, (step + 1) * layout.accumulation)
        own = [key for share in shares for batch in share[part] for key in batch]
        found.append(sorted((key for key in own if key.weight), key=lambda key: key.index_in_epoch))
    return found


def test_without_buckets_the_order_is_the_epochs_permutation() -> None:
    order = EpochOrder(np.zeros(53, np.int16), batch_size=8, seed=3)
    assert order.steps_per_epoch == 7
    for step in (0, 6, 7, 20):
        epoch, place = divmod(step, 7)
        batch = order.batch(step)
        assert (batch.epoch, batch.start) == (epoch, place * 8)
        wanted = epoch_order(3, epoch, 53)[place * 8 : place * 8 + 8]
        np.testing.assert_array_equal(batch.indices, wanted)
    assert order.count(6) == 53 - 48


@pytest.mark.parametrize("partial", ["keep", "fill"])
def test_batches_hold_one_bucket_and_an_epoch_every_image(partial: Any) -> None:
    order = EpochOrder(BUCKET_OF, batch_size=8, seed=3, partial=partial)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.batch(step) for step in steps]
        assert all(batch.epoch == epoch for batch in batches)
        assert all(len(set(BUCKET_OF[batch.indices])) == 1 for batch in batches)
        assert [order.count(step) for step in steps] == [len(b.indices) for b in batches]
        assert batches[0].start == 0
        for one, following in pairwise(batches):
            assert following.start == one.start + len(one.indices)
        seen = np.concatenate([batch.indices for batch in batches])
        assert set(seen) == set(range(53))
        if partial == "keep":
            assert len(seen) == 53
        else:
            assert {len(batch.indices) for batch in batches} == {8}


def test_an_epochs_order_differs_from_the_last_and_is_found_again() -> None:
    order, other = (EpochOrder(BUCKET_OF, batch_size=8, seed=3) for _ in range(2))
    steps = list(range(3 * order.steps_per_epoch))
    forward = [order.batch(step).indices.tolist() for step in steps]
    backward = [other.batch(step).indices.tolist() for step in reversed(steps)]
    assert forward == backward[::-1]
    assert forward[: len(steps) // 3] != forward[len(steps) // 3 : 2 * len(steps) // 3]
    assert len(order._epochs) <= 2, "memory stays that of two epochs"


@pytest.mark.parametrize("layout", [(8, 0, 1), (8, 3, 1), (8, 1, 2), (8, 2, 3), (8, 8, 4)])
def test_any_layout_takes_the_same_samples(layout: tuple[int, int, int]) -> None:
    order = EpochOrder(BUCKET_OF, batch_size=8, seed=1)
    steps = keys_of(order, BatchLayout.of(*layout), 0, 2 * order.steps_per_epoch)
    for step, keys in enumerate(steps):
        batch = order.batch(step)
        assert [key.index for key in keys] == batch.indices.tolist()
        places = [key.index_in_epoch - batch.start for key in keys]
        assert places == list(range(len(batch.indices)))
        strata = step_strata(3, step, len(batch.indices))
        assert [key.stratum for key in keys] == strata.tolist()
        assert {key.epoch for key in keys} == {batch.epoch}


def test_a_resumed_order_continues_in_the_middle_of_an_epoch() -> None:
    layout = BatchLayout.of(8, 2, 2)
    whole = keys_of(EpochOrder(BUCKET_OF, batch_size=8, seed=1), layout, 0, 30)
    for first in (1, 8, 13):
        assert (
            keys_of(EpochOrder(BUCKET_OF, batch_size=8, seed=1), layout, first, 30) == whole[first:]
        )


def test_padding_is_of_the_steps_own_bucket_and_counts_nothing() -> None:
    order, layout = EpochOrder(BUCKET_OF, batch_size=8, seed=1), BatchLayout.of(8, 3, 2)
    for rank in range(2):
        keys = StepBatchSampler(layout, order, first_step=0, last_step=20, rank=rank, seed=3)
        batches = list(keys)
        assert len(batches) == len(keys)
        for number, batch in enumerate(batches):
            step = order.batch(number // layout.accumulation)
            assert len(batch) == 3
            assert {BUCKET_OF[key.index] for key in batch} == {BUCKET_OF[step.indices[0]]}


def repeated_order(**changes: Any) -> EpochOrder:
    """53 images in four buckets, some of them repeated, of two sources in shares of 1 and 2."""
    repeats = np.random.default_rng(1).integers(1, 5, 53)
    sources = np.repeat([0, 1], [30, 23])
    draws = EpochDraws(repeats, BUCKET_OF, sources=sources, weights=(1.0, 2.0))
    return EpochOrder(BUCKET_OF, batch_size=8, seed=3, draws=draws, **changes)


def test_every_epoch_of_repeats_has_the_same_counts_in_another_order() -> None:
    order, orders = repeated_order(), []
    assert order.draws is not None
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        batches = [order.batch(step) for step in steps]
        assert all(batch.epoch == epoch for batch in batches)
        assert all(len(set(BUCKET_OF[batch.indices])) == 1 for batch in batches)
        seen = np.concatenate([batch.indices for batch in batches])
        assert len(seen) == len(order.draws)
        assert set(seen) == set(range(53))
        counts = np.bincount(np.repeat([0, 1], [30, 23])[seen])
        assert counts.tolist() == list(order.draws.source_counts.values())
        orders.append(seen)
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(np.sort(orders[0]), np.sort(orders[1])), "who comes once more changes"


def test_repeats_draw_apart_and_no_layout_or_resume_changes_them() -> None:
    order, last = repeated_order(), 2 * repeated_order().steps_per_epoch + 3
    whole = keys_of(order, BatchLayout(8, 8, 1), 0, last)
    for layout in (BatchLayout(8, 2, 2), BatchLayout(8, 3, 1), BatchLayout(8, 1, 3)):
        assert keys_of(repeated_order(), layout, 0, last) == whole
    assert keys_of(repeated_order(), BatchLayout(8, 4, 2), 5, last) == whole[5:]
    keys = [(key.epoch, key.index, key.index_in_epoch) for step in whole for key in step]
    assert len(set(keys)) == len(keys)
    assert len({key[:2] for key in keys}) < len(keys), "some image comes twice in an epoch"
