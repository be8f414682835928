"""Dropped captions: by key alone, and replaced by the null prompt for ids and embeddings alike."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latentdiff.training.inputs.caption_dropout import drop_captions, is_caption_dropped
from latentdiff.training.inputs.randomness import SampleKey


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def test_dropped_token_ids_become_the_null_prompts() -> None:
    ids, null = torch.arange(6).view(3, 2), torch.tensor([[8, 9]])
    assert drop_captions(ids, null, torch.tensor([False, True, False])).tolist() == [
        [0, 1],
        [8, 9],
        [4, 5],
    ]


@pytest.mark.parametrize("null_batch", [1, 3])
def test_dropped_captions_become_the_null_prompt(null_batch: int) -> None:
    text, null = _randn(3, 5, 2, seed=1), _randn(null_batch, 5, 2, seed=2)
    embeds = drop_captions(text, null, torch.tensor([False, True, False]))
    assert torch.equal(embeds[0], text[0])
    assert torch.equal(embeds[1], null.expand(3, 5, 2)[1])
    assert torch.equal(embeds[2], text[2])


def test_gradients_reach_only_what_was_kept() -> None:
    text, null = _randn(2, 1, 1).requires_grad_(), _randn(1, 1, 1, seed=2).requires_grad_()
    drop_captions(text, null, torch.tensor([True, False])).sum().backward()
    assert text.grad is not None
    assert null.grad is not None
    assert text.grad.flatten().tolist() == [0, 1]
    assert null.grad.flatten().tolist() == [1]


def test_dropping_keeps_the_embeddings_dtype() -> None:
    text = _randn(2, 3, 4).to(torch.bfloat16)
    embeds = drop_captions(text, _randn(1, 3, 4), torch.tensor([True, False]))
    assert embeds.dtype == torch.bfloat16
