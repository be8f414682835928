"""Buckets: sizes, assignment, and an order that drops nothing, a function of (seed, epoch)."""

import time

import numpy as np
import pytest

from latentdiff.data.buckets import (
    assign_buckets,
    crop_loss,
    make_buckets,
    make_epoch,
    num_batches,
    shuffled,
)


@pytest.mark.parametrize(("resolution", "multiple"), [(512, 64), (64, 16), (256, 32), (1024, 64)])
def test_buckets_keep_the_budget_the_multiple_and_the_aspect(resolution, multiple):
    buckets = make_buckets(resolution, multiple=multiple, max_aspect=3.0)
    sizes = [(b.height, b.width) for b in buckets]
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes)
    assert {(w, h) for h, w in sizes} == set(sizes), "upright and lying images are treated the same"
    for bucket in buckets:
        assert bucket.height % multiple == bucket.width % multiple == 0
        assert bucket.height * bucket.width <= resolution**2
        assert 1 / 3 <= bucket.aspect <= 3
    assert [b.aspect for b in buckets] == sorted(b.aspect for b in buckets)


def test_max_aspect_one_is_the_square_alone():
    assert len(make_buckets(512, multiple=64, max_aspect=1.0)) == 1


def test_a_resolution_off_the_grid_is_refused_with_the_nearest_ones():
    with pytest.raises(ValueError, match=r"multiple of 64.*got 500; 448 and 512 are"):
        make_buckets(500, multiple=64)


def test_every_image_lands_in_the_bucket_nearest_in_aspect():
    buckets = make_buckets(512, multiple=64, max_aspect=2.0)
    rng = np.random.default_rng(0)
    widths, heights = rng.integers(1, 4000, 500), rng.integers(1, 4000, 500)
    places = assign_buckets(widths, heights, buckets=buckets)
    for width, height, place in zip(widths, heights, places, strict=True):
        distances = [abs(np.log(width / height / bucket.aspect)) for bucket in buckets]
        assert distances[place] == pytest.approx(min(distances))


def test_crop_loss_is_the_area_cut_off():
    buckets = make_buckets(512, multiple=64, max_aspect=1.0)
    loss = crop_loss(
        np.array([512, 1024, 300]),
        np.array([512, 512, 400]),
        bucket_of=np.zeros(3, int),
        buckets=buckets,
    )
    np.testing.assert_allclose(loss, [0.0, 0.5, 0.25])


def test_keep_gives_every_record_once_and_batches_of_one_bucket():
    bucket_of = np.random.default_rng(1).integers(0, 7, 1003)
    epoch = make_epoch(bucket_of, batch_size=8, seed=3, epoch=0)
    assert sorted(np.concatenate(list(epoch))) == list(range(1003))
    counts = np.bincount(bucket_of)
    assert len(epoch) == num_batches(counts, batch_size=8) == sum(-(-c // 8) for c in counts)
    for batch, bucket in zip(epoch, epoch.buckets, strict=True):
        assert set(bucket_of[batch]) == {bucket}
        assert 1 <= len(batch) <= 8


def test_fill_makes_full_batches_and_repeats_evenly_within_a_bucket():
    bucket_of = np.array([0] * 3 + [1] * 21 + [2] * 16)
    epoch = make_epoch(bucket_of, batch_size=8, seed=0, epoch=0, partial="fill")
    assert all(len(batch) == 8 for batch in epoch)
    times = np.bincount(epoch.indices, minlength=40)
    assert times.min() == 1
    assert set(times[:3]) == {2, 3}
    assert set(times[3:24]) == {1, 2}
    assert set(times[24:]) == {1}
    for batch, bucket in zip(epoch, epoch.buckets, strict=True):
        assert set(bucket_of[batch]) == {bucket}


def test_the_order_is_a_function_of_seed_and_epoch():
    bucket_of = np.random.default_rng(1).integers(0, 4, 200)
    first = make_epoch(bucket_of, batch_size=4, seed=1, epoch=2)
    again = make_epoch(bucket_of, batch_size=4, seed=1, epoch=2)
    np.testing.assert_array_equal(first.indices, again.indices)
    np.testing.assert_array_equal(first.buckets, again.buckets)
    for seed, epoch in [(1, 3), (2, 2), (2, 1)]:
        other = make_epoch(bucket_of, batch_size=4, seed=seed, epoch=epoch)
        assert (other.indices != first.indices).mean() > 0.9


def test_the_order_is_pinned():
    assert shuffled(10, seed=0, epoch=0, stream=0).tolist() == PINNED
    big = shuffled(5, seed=2**64 - 1, epoch=1, stream=0)
    assert sorted(big) == list(range(5))


PINNED = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_buckets_come_in_any_order_over_the_epoch():
    bucket_of = np.repeat([0, 1], 400)
    epoch = make_epoch(bucket_of, batch_size=4, seed=0, epoch=0)
    assert abs(epoch.buckets[:100].mean() - 0.5) < 0.15


def test_an_empty_folder_makes_an_empty_epoch():
    assert len(make_epoch(np.zeros(0, int), batch_size=4, seed=0, epoch=0)) == 0


def test_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make_epoch(np.zeros(3, int), batch_size=0, seed=0, epoch=0)


def test_a_million_records_take_a_moment():
    bucket_of = np.random.default_rng(0).integers(0, 40, 1_000_000).astype(np.int16)
    start = time.process_time()
    epoch = make_epoch(bucket_of, batch_size=16, seed=0, epoch=0)
    assert time.process_time() - start < 3.0
    assert len(epoch.indices) == 1_000_000
