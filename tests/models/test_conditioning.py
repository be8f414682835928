"""The conditioning of a batch: dropped captions, guidance, and what the U-Net reads of it."""

import pytest
import torch
from torch import Tensor

from latentdiff.models.conditioning import Conditioning, make_time_ids


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _sdxl(num: int, seed: int = 0) -> Conditioning:
    time_ids = torch.arange(num * 6).view(num, 6)
    return Conditioning(_randn(num, 5, 2, seed=seed), _randn(num, 3, seed=seed), time_ids)


def test_dropped_token_ids_become_the_null_prompts() -> None:
    ids, null = torch.arange(6).view(3, 2), torch.tensor([[8, 9]])
    found = Conditioning(input_ids=ids).with_text(
        Conditioning(input_ids=null), where=torch.tensor([False, True, False])
    )
    assert found.input_ids is not None
    assert found.input_ids.tolist() == [[0, 1], [8, 9], [4, 5]]


@pytest.mark.parametrize("null_batch", [1, 3])
def test_dropped_captions_become_the_null_prompt_and_keep_their_sizes(null_batch: int) -> None:
    text, null = _sdxl(3), _sdxl(null_batch, seed=1)
    dropped = text.with_text(null, where=torch.tensor([False, True, False])).tensors()
    for name in ("prompt_embeds", "pooled_embeds"):
        own, other = text.tensors()[name], null.expand(3).tensors()[name]
        assert torch.equal(dropped[name], torch.stack([own[0], other[1], own[2]]))
    assert torch.equal(dropped["time_ids"], text.tensors()["time_ids"])


def test_gradients_reach_only_what_was_kept() -> None:
    text, null = _randn(2, 1, 1).requires_grad_(), _randn(1, 1, 1, seed=2).requires_grad_()
    where = torch.tensor([True, False])
    found = Conditioning(text).with_text(Conditioning(null), where=where).prompt_embeds
    assert found is not None
    found.sum().backward()
    assert text.grad is not None
    assert null.grad is not None
    assert text.grad.flatten().tolist() == [0, 1]
    assert null.grad.flatten().tolist() == [1]


def test_dropping_keeps_the_embeddings_dtype() -> None:
    text = Conditioning(_randn(2, 3, 4)).to(dtype=torch.bfloat16)
    null = Conditioning(_randn(1, 3, 4))
    found = text.with_text(null, where=torch.tensor([True, False])).prompt_embeds
    assert found is not None
    assert found.dtype == torch.bfloat16


def test_a_dtype_is_that_of_embeddings_and_no_size_is_rounded() -> None:
    time_ids = make_time_ids((1023, 4097), (0, 3), (1024, 1000))[None]
    given = Conditioning(_randn(1, 5, 2), _randn(1, 3), time_ids).to(dtype=torch.bfloat16)
    assert given.time_ids is not None
    assert given.time_ids.tolist() == [[1023, 4097, 0, 3, 1024, 1000]]
    assert {x.dtype for x in given.unet_kwargs()["added_cond_kwargs"].values()} == {
        torch.bfloat16,
        torch.int64,
    }


def test_parts_of_a_batch_make_it_again() -> None:
    given = _sdxl(4)
    again = Conditioning.cat([given[:1], given[[1, 2]], given[-1:]])
    for name, value in given.tensors().items():
        assert torch.equal(again.tensors()[name], value)
    assert len(given.repeat_interleave(2)) == 8
    with pytest.raises(ValueError, match="same fields"):
        Conditioning.cat([given, Conditioning(_randn(1, 5, 2))])


def test_a_mix_is_of_the_text_alone() -> None:
    first, second = _sdxl(2)[:1], _sdxl(2)[1:]
    mixed = first.lerp(second, torch.tensor([0.0, 0.5, 1.0])).tensors()
    assert torch.equal(mixed["prompt_embeds"][0], first.tensors()["prompt_embeds"][0])
    assert torch.equal(mixed["pooled_embeds"][2], second.tensors()["pooled_embeds"][0])
    assert torch.equal(mixed["time_ids"], first.tensors()["time_ids"].expand(3, -1))


def test_a_hook_of_the_unet_finds_the_conditioning_in_its_keywords() -> None:
    for given in (_sdxl(2), Conditioning(_randn(2, 5, 2), class_labels=torch.tensor([1, 2]))):
        found = Conditioning.from_unet_kwargs(given.unet_kwargs())
        assert found.tensors().keys() == given.tensors().keys()
        assert all(torch.equal(x, given.tensors()[name]) for name, x in found.tensors().items())
