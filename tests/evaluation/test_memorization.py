"""Copies of training images are found, and held-out images are not called copies."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentdiff.evaluation.metrics.memorization import find_copies, relative_distances

NUM_FEATURES = 32


def world(n: int, *, seed: int) -> Tensor:
    """Sample features from a crowded and a sparse region alike. (n, 32)"""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, NUM_FEATURES, generator=generator)
    is_sparse = torch.arange(n)[:, None] % 2 == 0
    return torch.where(is_sparse, 10 * x + 40, x)


def near(x: Tensor, *, strength: float) -> Tensor:
    """Move points by a fraction of their region's spread."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    spread = torch.where(x.mean(1, keepdim=True) > 20, 10.0, 1.0)
    return x + strength * spread * noise


TRAIN, HELD_OUT, FRESH = world(600, seed=0), world(200, seed=1), world(200, seed=2)


@pytest.mark.parametrize("strength", [0.0, 0.02, 0.2])
def test_planted_copies_are_found_and_nothing_else(strength):
    planted = torch.arange(0, 600, 20)
    samples = torch.cat([near(TRAIN[planted], strength=strength), FRESH])
    found = find_copies(samples, TRAIN, heldout=HELD_OUT)
    assert found.is_copy.tolist() == [True] * 30 + [False] * 200
    assert torch.equal(found.indices[:30], planted)
    assert found.copies.estimate == pytest.approx(30 / 230)
    assert (found.false_alarms.estimate, found.false_alarms.num_samples) == (0, 200)
    assert (found.scores <= found.threshold).equal(found.is_copy)


def test_heldout_images_are_not_copies():
    assert not find_copies(HELD_OUT, TRAIN, heldout=HELD_OUT).is_copy.any()


def test_copies_of_repeated_images_are_found():
    repeated = torch.cat([TRAIN, near(TRAIN[:1].expand(12, -1), strength=0.01)])
    found = find_copies(near(TRAIN[:2], strength=0.02), repeated, heldout=HELD_OUT)
    assert found.is_copy.all()


def test_a_twin_among_the_heldout_does_not_hide_copies():
    leaky = torch.cat([HELD_OUT, TRAIN[5:6]])
    found = find_copies(near(TRAIN[:40], strength=0.1), TRAIN, heldout=leaky)
    assert found.is_copy.all()
    assert found.false_alarms.estimate == pytest.approx(1 / 201)


def test_relative_distances_do_not_depend_on_the_unit():
    scores, distances, indices = relative_distances(FRESH, TRAIN)
    scaled, longer, same = relative_distances(5 * FRESH, 5 * TRAIN)
    torch.testing.assert_close(scaled, scores)
    torch.testing.assert_close(longer, 5 * distances)
    assert torch.equal(indices, same)
    assert 0 < scores.min() <= scores.max() <= 1


def test_a_relative_distance_is_to_the_median_neighbour():
    train = torch.tensor([[1.0], [2.0], [4.0], [8.0], [100.0]])
    scores, distances, indices = relative_distances(torch.zeros(1, 1), train, num_neighbours=3)
    assert (scores.item(), distances.item(), indices.item()) == (0.5, 1.0, 0)
    scores, _, _ = relative_distances(torch.zeros(1, 1), train)
    assert scores.item() == 0.25


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match=r"heldout must be features .* got \(0, 32\)"):
        find_copies(FRESH, TRAIN, heldout=HELD_OUT[:0])
    with pytest.raises(ValueError, match=r"samples must be features .* got \(200, 8\)"):
        find_copies(FRESH[:, :8], TRAIN, heldout=HELD_OUT)
    with pytest.raises(ValueError, match="train holds features that are not finite"):
        find_copies(FRESH, TRAIN / 0, heldout=HELD_OUT)


def thumbnail(image: Image.Image) -> Tensor:
    small = image.convert("RGB").resize((12, 12), Image.Resampling.BOX)
    return torch.from_numpy(np.asarray(small, np.float32).ravel().copy())


def degraded(path: Path) -> Image.Image:
    """Save an image as a small, poor JPEG, as a copy might come out of a model."""
    with Image.open(path) as image:
        small = image.convert("RGB").resize((96, 96), Image.Resampling.BICUBIC)
    small.save(file := io.BytesIO(), "JPEG", quality=40)
    return Image.open(file)


def test_copies_of_photographs_are_found(shared_dir: Path):
    folder = shared_dir / "data/flowers"
    train_files = sorted((folder / "train").glob("*.jpg"))
    test_files = sorted((folder / "test").glob("*.jpg"))
    train = torch.stack([thumbnail(Image.open(file)) for file in train_files])
    unseen = torch.stack([thumbnail(Image.open(file)) for file in test_files])
    copies = torch.stack([thumbnail(degraded(file)) for file in train_files[::10]])
    found = find_copies(torch.cat([copies, unseen[1::2]]), train, heldout=unseen[::2])
    num_copies = len(copies)
    assert found.is_copy[:num_copies].all()
    assert not found.is_copy[num_copies:].any()
    # the flagged ones among the held-out are true twins: sunflowers_150*.jpg is in both splits
    _, to_train, _ = relative_distances(unseen[::2], train)
    assert found.false_alarms.estimate * len(to_train) == pytest.approx((to_train == 0).sum())
