"""Learned words from files of several programs: by their name, at the right width, or refused."""

import logging

import pytest
import torch
from fakes_pipeline import tiny_pipeline
from safetensors.torch import save_file

WIDTH = 16


def vectors(num: int = 2, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(0))


def embeddings_of(pipe, prompt: str) -> torch.Tensor:
    """Return the input embeddings of a prompt's tokens, without start, end and padding."""
    ids = pipe.tokenizer(prompt, add_special_tokens=False).input_ids
    return pipe.text_encoder.get_input_embeddings().weight.detach()[ids]


def embeds_of(pipe, prompt: str) -> torch.Tensor:
    return pipe.encode_prompt(prompt, pipe.device, 1, False)[0]


def test_the_files_name_is_the_word_of_a_nameless_embedding(tmp_path):
    save_file({"emb_params": vectors()}, tmp_path / "MyStyle.safetensors")
    pipe = tiny_pipeline()
    before = embeds_of(pipe, "a mystyle")
    pipe.load_textual_inversion(tmp_path / "MyStyle.safetensors")
    assert torch.equal(embeddings_of(pipe, "mystyle mystyle_1"), vectors())
    both, other_case = (embeds_of(pipe, p) for p in ("a mystyle", "a MyStyle"))
    spelled = embeds_of(pipe, "a mystyle mystyle_1")
    assert torch.equal(both, spelled)
    assert torch.equal(both, other_case)
    assert not torch.equal(both, before)
    with pytest.raises(ValueError, match="mystyle"):
        pipe.load_textual_inversion({"mystyle": vectors()})


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_vectors_of_any_float_load(kind):
    pipe = tiny_pipeline()
    pipe.load_textual_inversion({"<pet>": vectors(1).to(kind)})
    assert torch.allclose(embeddings_of(pipe, "<pet>"), vectors(1).to(kind).float())


def test_a_word_that_is_asked_for_takes_the_place_of_the_files(tmp_path):
    save_file({"emb_params": vectors()}, tmp_path / "style.safetensors")
    save_file({"<cat>": vectors(1)}, tmp_path / "cat.safetensors")
    pipe = tiny_pipeline()
    sources = [tmp_path / "style.safetensors", tmp_path / "cat.safetensors"]
    pipe.load_textual_inversion(sources, token=["<s>", "<c>"])
    assert torch.equal(embeddings_of(pipe, "<s> <s>_1 <c>"), torch.cat([vectors(), vectors(1)]))
    with pytest.raises(ValueError, match="token names 1 words for 2"):
        pipe.load_textual_inversion(sources, token=["<t>"])


def test_a_word_that_changes_ordinary_words_is_warned_of(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    save_file({"emb_params": vectors(1)}, tmp_path / "eart.safetensors")
    pipe = tiny_pipeline()
    assert len(pipe.tokenizer.tokenize("heart")) == 1
    pipe.load_textual_inversion(tmp_path / "eart.safetensors")
    assert len(pipe.tokenizer.tokenize("heart")) > 1
    assert "'eart' is part of 1 of the tokenizer's words, such as heart" in caplog.text
    caplog.clear()
    pipe.load_textual_inversion({"<eart>": vectors(1)})
    assert not caplog.text


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"emb_params": torch.zeros(2, 768)}, "of width 768, for Stable Diffusion 1; .* width 16"),
        ({"<x>": torch.zeros(1280)}, "of width 1280, for Stable Diffusion XL"),
        ({"<x>": torch.zeros(5)}, "of width 5, for another text encoder"),
        ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "Stable Diffusion XL"),
        ({"<x>": torch.zeros(0, 16)}, r"holds \(0, 16\)"),
        ({"<x>": torch.zeros(2, 2, 16)}, r"holds \(2, 2, 16\)"),
        ({"<x>": torch.zeros(2, 16, dtype=torch.int64)}, "torch.int64"),
        ({"<x>": torch.full((1, 16), torch.nan)}, "not finite"),
        ({"<x>": torch.zeros(1, 16), "<y>": torch.zeros(1, 16)}, "holds <x>, <y>"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(weights, said, tmp_path):
    path = tmp_path / "style.safetensors"
    save_file(weights, path)
    pipe = tiny_pipeline()
    size = len(pipe.tokenizer)
    with pytest.raises(ValueError, match=rf"style\.safetensors .*{said}") as failure:
        pipe.load_textual_inversion(path)
    assert "\n" not in str(failure.value)
    assert len(str(failure.value)) < 300 + len(str(path))
    assert len(pipe.tokenizer) == size


@pytest.mark.parametrize("word", ["a</w>", "apple</w>", " ", ""])
def test_a_word_that_is_known_or_blank_is_refused(word):
    with pytest.raises(ValueError, match=r"already|does not name its word"):
        tiny_pipeline().load_textual_inversion({"<x>": vectors(1)}, token=word)


def test_nothing_is_added_where_one_of_several_is_refused():
    pipe = tiny_pipeline()
    size = len(pipe.tokenizer)
    with pytest.raises(ValueError, match="already"):
        pipe.load_textual_inversion(
            [{"<x>": vectors(1)}, {"<x>_1": vectors(1)}, {"<X>": vectors(1)}]
        )
    assert len(pipe.tokenizer) == size
    assert pipe.text_encoder.get_input_embeddings().weight.shape[0] == size
