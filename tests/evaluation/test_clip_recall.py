"""Recall at k against a direct count, and where captions repeat."""

import pytest
import torch
from torch.nn import functional as F

from latentdiff.evaluation.metrics.clip import recall_at


def test_perfect_pairs_are_found_and_reversed_ones_are_not() -> None:
    vectors = torch.eye(6)
    captions = list("abcdef")
    for both in (recall_at(vectors, vectors, captions, k=k) for k in (1, 3)):
        assert [found.estimate for found in both] == [1.0, 1.0]
    shifted = recall_at(vectors, vectors.roll(1, 0), captions, k=1)
    assert [found.estimate for found in shifted] == [0.0, 0.0]


def test_equals_a_count_by_hand_where_all_captions_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(40, 5, generator=generator), dim=1) for _ in range(2))
    captions = [f"caption {i}" for i in range(40)]
    scores = images @ texts.T
    for k in (1, 5, 10):
        ranks = (scores > scores.diag()[:, None]).sum(1), (scores > scores.diag()[None]).sum(0)
        expected = [(rank < k).float().mean().item() for rank in ranks]
        found = [one.estimate for one in recall_at(images, texts, captions, k=k)]
        assert found == pytest.approx(expected)


def test_any_image_of_a_shared_caption_is_right() -> None:
    images = torch.eye(4)
    images[1] = torch.tensor([0.6, 0.8, 0.0, 0.0])  # another dog
    texts = torch.stack([images[0], images[0], images[2], images[3]])
    of_image, of_caption = recall_at(images, texts, ["dog", "dog", "cat", "cow"], k=1)
    assert of_image.num_samples == 4
    assert of_caption.num_samples == 3
    assert of_caption.estimate == 1.0
    assert of_image.estimate == 1.0


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k}"):
        recall_at(torch.eye(4), torch.eye(4), list("abcd"), k=k)
