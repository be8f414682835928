"""How images are made small and hidden: deterministic by their generator, and of the right size."""

import numpy as np
import pytest
from fakes_data import noise_image

from latentdiff.data.degradations import DEGRADATIONS
from latentdiff.data.inpaint_masks import random_mask, whole_mask


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_a_small_image_is_of_its_size_and_near_the_area_mean(name: str) -> None:
    image = noise_image(3, width=96, height=64)
    small, again = (DEGRADATIONS[name](image, (24, 16), np.random.default_rng(5)) for _ in "ab")
    assert small.size == (24, 16)
    assert small.tobytes() == again.tobytes()
    mean = np.asarray(image, np.float32).reshape(16, 4, 24, 4, 3).mean((1, 3))
    assert np.abs(np.asarray(small, np.float32) - mean).mean() < 8


def test_random_degradations_differ() -> None:
    image = noise_image(3, width=96, height=64)
    for name in ("jpeg", "blur"):
        made = {
            DEGRADATIONS[name](image, (24, 16), np.random.default_rng(k)).tobytes()
            for k in range(4)
        }
        assert len(made) > 1


@pytest.mark.parametrize("kind", ["boxes", "strokes", "random"])
def test_masks_hide_a_part_which_the_generator_alone_decides(kind: str) -> None:
    shares = []
    for seed in range(20):
        mask, again = (
            random_mask(np.random.default_rng(seed), height=48, width=64, kind=kind) for _ in "ab"
        )
        assert mask.shape == (48, 64)
        assert (mask == again).all()
        assert set(np.unique(mask)) <= {0, 1}
        shares.append(mask.mean())
    assert 0.1 < np.mean(shares) < 0.6
    assert min(shares) > 0
    assert len(set(shares)) == 20


def test_boxes_are_straight_and_a_whole_mask_hides_all() -> None:
    box = random_mask(np.random.default_rng(1), height=40, width=40, kind="boxes")
    rows, columns = box.any(1), box.any(0)
    assert rows.sum() >= 6
    assert columns.sum() >= 6
    assert whole_mask(3, 5).sum() == 15
