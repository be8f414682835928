"""Text: token ids, prompt embeddings, and trained vocabularies."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from fakes_models import CAPTIONS, LONG, WORLD
from transformers import CLIPTokenizer

from latentdiff.models.conditioning import Conditioning
from latentdiff.models.text import (
    NULL_CAPTION,
    encode_text,
    null_prompt,
    tokenize,
    train_tokenizer,
    truncated_part,
)
from latentdiff.models.weights import stored_shapes

# --- token ids ---


def test_ids_are_padded_with_the_pad_token_to_the_tokenizers_length(tokenizer) -> None:
    ids = tokenize(tokenizer, ["a red circle", NULL_CAPTION, LONG])
    assert ids.shape == (3, 16)
    assert ids.dtype == torch.int64
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids[1].tolist() == [start, *[end] * 15]
    assert (ids[:, 0] == start).all()
    assert ids[2, -1] == end
    assert end not in ids[2, :-1]


def test_ids_equal_those_of_the_stock_pipelines_call(tokenizer) -> None:
    captions = [*CAPTIONS, *WORLD, LONG]
    stock = tokenizer(
        captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    assert torch.equal(tokenize(tokenizer, captions), stock.input_ids)
    assert tokenize(tokenizer, []).shape == (0, 16)


@pytest.mark.parametrize(
    ("captions", "message"),
    [("a cat", "one string"), (["a", None], r"captions\[1\] is None"), ([["a"]], r"captions\[0\]")],
)
def test_captions_that_are_no_strings_are_refused(tokenizer, captions, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize(tokenizer, captions)


def test_tokenizer_without_a_length_is_refused(tokenizer) -> None:
    endless = CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=[])
    with pytest.raises(ValueError, match="model_max_length"):
        tokenize(endless, ["a"])


def test_counted_tokens_tell_whether_something_is_cut(tokenizer) -> None:
    for caption in [*CAPTIONS, *WORLD, LONG]:
        cut = truncated_part(tokenizer, caption)
        assert bool(cut) == (len(tokenizer(caption).input_ids) > 16)
        assert caption.strip().endswith(cut)
    assert len(tokenizer("").input_ids) == 2


def test_kept_and_cut_part_make_the_caption(tokenizer) -> None:
    cut = truncated_part(tokenizer, LONG)
    kept = LONG.removesuffix(cut)
    assert cut.endswith("and the END")
    assert len(tokenizer(kept).input_ids) == 16
    assert torch.equal(tokenize(tokenizer, [kept]), tokenize(tokenizer, [LONG]))


def test_kept_and_cut_part_make_the_caption_beyond_ascii(tokenizer) -> None:
    caption = "Cafe\u0301 数 " * 20  # a combining accent: normalisation shortens it
    cut = truncated_part(tokenizer, caption)
    kept = caption.rstrip().removesuffix(cut)
    whole, start = tokenizer(caption).input_ids, tokenizer(kept).input_ids[:-1]
    assert start == whole[: len(start)]
    assert 16 - 3 <= len(start) < 16  # a letter of up to three bytes may have been cut in two


# --- prompt embeddings ---


def test_prompt_embeds_are_the_last_hidden_state_after_the_final_norm(
    text_encoder, tokenizer
) -> None:
    ids = tokenize(tokenizer, CAPTIONS)
    with torch.no_grad():
        prompt_embeds = encode_text(text_encoder, ids)
        hidden = text_encoder(ids, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(prompt_embeds, text_encoder(ids)[0])
        torch.testing.assert_close(prompt_embeds, text_encoder.final_layer_norm(hidden))
    assert prompt_embeds.shape == (len(CAPTIONS), 16, 16)


def test_prompt_embeds_equal_the_stock_pipelines(sd_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    stock = StableDiffusionPipeline.from_pretrained(sd_folder)
    expected, null = stock.encode_prompt("two small yellow triangles", "cpu", 1, True)
    ids = tokenize(stock.tokenizer, ["two small yellow triangles", NULL_CAPTION])
    with torch.no_grad():
        assert torch.equal(encode_text(stock.text_encoder, ids), torch.cat([expected, null]))


def test_captions_longer_than_the_encoder_are_refused(text_encoder) -> None:
    with pytest.raises(ValueError, match="L at most 16"):
        encode_text(text_encoder, torch.zeros(1, 17, dtype=torch.int64))


# --- a vocabulary of our own ---


def test_trained_vocabulary_is_laid_out_as_clips(tokenizer, shared_dir: Path) -> None:
    clip = json.loads((shared_dir / "weights" / "clip-tokenizer" / "vocab.json").read_text())
    vocab = tokenizer.get_vocab()
    assert {token for token, index in clip.items() if index < 512} <= vocab.keys()
    assert tokenizer.bos_token_id == len(tokenizer) - 2
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1
    assert sorted(vocab.values()) == list(range(len(tokenizer)))


def test_trained_tokenizer_knows_every_text_and_gives_it_back(tokenizer) -> None:
    for caption in [*CAPTIONS, *WORLD]:
        ids = tokenizer(caption).input_ids
        assert tokenizer.unk_token_id not in ids[1:-1]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert text.split() == tokenizer.decode(tokenizer(text).input_ids[1:-1]).split()


def test_frequent_words_become_one_token(tokenizer) -> None:
    assert len(tokenizer("a red circle on a blue background").input_ids) == 9
    small = train_tokenizer(CAPTIONS, vocab_size=514)
    assert len(small) == 514
    assert len(small("red").input_ids) == 5


def test_trained_tokenizer_saves_and_loads_equal(tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.model_max_length == 16
    captions = [*CAPTIONS, *WORLD, LONG]
    assert torch.equal(tokenize(loaded, captions), tokenize(tokenizer, captions))


def test_trained_vocabulary_does_not_depend_on_chance_or_order() -> None:
    """Every pair of letters is as frequent as every other: only ties decide."""
    captions = ["".join(pair) for pair in itertools.permutations("qwertyuiop", 2)]
    trained = {
        train_tokenizer(order, vocab_size=560).backend_tokenizer.to_str()
        for order in (captions, captions, captions[::-1])
    }
    assert len(trained) == 1


def test_vocabulary_too_small_for_all_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 514"):
        train_tokenizer(CAPTIONS, vocab_size=513)


def test_text_encoder_is_saved_under_stable_diffusions_names(text_encoder, tmp_path: Path) -> None:
    """Readers older than transformers 5 look for "text_model." and leave the rest random."""
    text_encoder.save_pretrained(tmp_path)
    names = stored_shapes([tmp_path / "model.safetensors"])
    assert all(name.startswith("text_model.") for name in names)


@pytest.mark.parametrize("zeros", [True, False])
def test_null_prompt_is_zeros_for_the_text_alone_where_the_model_says_so(zeros: bool) -> None:
    sizes = torch.ones(1, 6, dtype=torch.int64)
    empty = Conditioning(torch.ones(1, 3, 2), torch.ones(1, 2), sizes)
    found = null_prompt(empty, zeros=zeros)
    for name in ("prompt_embeds", "pooled_embeds"):
        assert bool((found.tensors()[name] == (0 if zeros else 1)).all())
    assert found.time_ids is sizes
    ids = Conditioning(input_ids=torch.ones(1, 3, dtype=torch.int64))
    assert null_prompt(ids, zeros=zeros) is ids
