"""Random numbers depend on their key and on nothing else."""

import hashlib

import numpy as np
import pytest
import torch

from latentdiff.training.inputs.randomness import epoch_order, sample_generator, standard_normal

KEY = {"seed": 3, "epoch": 1, "sample_id": 7, "index_in_epoch": 5, "purpose": "noise"}


def draw(**changed: object) -> torch.Tensor:
    key = {**KEY, **changed}
    generator = sample_generator(
        key["seed"], key["epoch"], key["sample_id"], key["index_in_epoch"], key["purpose"]
    )
    return standard_normal(generator, (4, 4))


def test_same_key_gives_the_same_numbers_whatever_was_drawn_before() -> None:
    first = draw()
    np.random.seed(99)
    torch.manual_seed(99)
    draw(sample_id=8)
    assert torch.equal(first, draw())
    assert first.dtype == torch.float32
    assert first.shape == (4, 4)


@pytest.mark.parametrize(
    "changed",
    [
        {"seed": 4},
        {"epoch": 2},
        {"sample_id": 8},
        {"index_in_epoch": 6},
        {"purpose": "vae"},
        {"seed": -3},
    ],
)
def test_every_part_of_the_key_matters(changed: dict[str, object]) -> None:
    assert not torch.equal(draw(), draw(**changed))


def test_parts_of_the_key_do_not_run_into_each_other() -> None:
    assert not torch.equal(draw(epoch=1, sample_id=11), draw(epoch=11, sample_id=1))
    assert not torch.equal(draw(epoch=12, sample_id=3), draw(epoch=1, sample_id=23))


def test_numpy_integers_are_the_integers_they_equal() -> None:
    assert torch.equal(draw(), draw(sample_id=np.int64(7), seed=np.int32(3)))


def test_stream_is_philox_of_the_key_and_pinned() -> None:
    """The same numbers on every machine and in every later version of this file."""
    bits = sample_generator(0, 0, 0, 0, "noise").bit_generator.random_raw(2)
    assert bits.tolist() == [14353901028563467228, 12266456208790458747]
    key = hashlib.blake2b(b"('sample', 0, 0, 0, 0, 'noise')", digest_size=16).digest()
    public = np.random.Philox(key=int.from_bytes(key, "little"))
    assert np.array_equal(public.random_raw(2), bits)


def test_draws_of_many_samples_are_standard_normal_and_uncorrelated() -> None:
    values = torch.stack(
        [standard_normal(sample_generator(0, 0, i, i, "noise"), (64,)) for i in range(1000)]
    )
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
    neighbours = (values[1:] * values[:-1]).mean()
    assert abs(neighbours) < 0.02


def test_epoch_order_is_a_permutation_that_changes_with_seed_and_epoch() -> None:
    order = epoch_order(0, 0, 100)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(100))
    assert np.array_equal(order, epoch_order(0, 0, 100))
    assert not np.array_equal(order, epoch_order(0, 1, 100))
    assert not np.array_equal(order, epoch_order(1, 0, 100))
    assert epoch_order(0, 0, 0).shape == (0,)
