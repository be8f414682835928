"""Prompts become embeddings: weights, long prompts, and the plain case as Stable Diffusion's."""

import logging

import pytest
import torch
from fakes_pipeline import tiny_pipeline, tiny_text_encoder, tiny_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.models.text import encode_text, tokenize
from latentdiff.pipeline.conditioning.encode import (
    PromptEncoder,
    common_length,
    encode,
    tokenize_prompt,
)
from latentdiff.pipeline.conditioning.prompt import parse_prompt, weighted_parts
from latentdiff.pipeline.png_metadata import read_settings

CPU = torch.device("cpu")
LONG = "a red heart a green apple a yellow cat the blue sea the sky a table a face"


@pytest.fixture(scope="module")
def encoder():
    tokenizer = tiny_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": tiny_text_encoder(tokenizer), "device": CPU}


def embed(prompts, **options):
    return encode(
        [parse_prompt(prompt) for prompt in prompts], PromptEncoder(**options)
    ).prompt_embeds


def test_plain_prompts_read_as_captions_do(encoder):
    prompts = ["a red heart", "", "the (yellow) face of a cat: blue", LONG]
    with torch.no_grad():
        states = embed(prompts, **encoder)
        expected = encode_text(encoder["text_encoder"], tokenize(encoder["tokenizer"], prompts))
    torch.testing.assert_close(states, expected)


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("(red:1.3) apple", [("red", 1.3), (" apple", 1.0)]),
        ("a (red:.5) (green apple:2)", [("a ", 1.0), ("red", 0.5), (" ", 1.0), ("green apple", 2)]),
        ("plain (brackets) stay", [("plain (brackets) stay", 1.0)]),
        (r"\(red:1.3\) apple", [("(red:1.3) apple", 1.0)]),
        ("time 12:30 (at 12:30)", [("time 12:30 ", 1.0), ("at 12", 30)]),
        ("", [("", 1.0)]),
        ("()", [("()", 1.0)]),
        ("(:1.3)", [("(:1.3)", 1.0)]),
    ],
)
def test_weights_are_read(prompt, parts):
    if any(weight > 10 for _, weight in parts):
        with pytest.raises(ValueError, match="prompt weighs"):
            weighted_parts(prompt)
    else:
        assert weighted_parts(prompt) == parts


@pytest.mark.parametrize(
    "caption",
    [
        "a clock (12:30)",
        "a screen (ratio 16:9)",
        r"\(left\) a (red:1.5) apple",
        "(:3) \\",
        "(a:99)",
    ],
)
def test_without_prompt_weighting_a_text_is_encoded_as_training_encodes_a_caption(caption):
    pipe = tiny_pipeline()
    with torch.no_grad():
        expected = encode_text(pipe.text_encoder, tokenize(pipe.tokenizer, [caption]))
        arguments = (caption, CPU, 1, True, caption)
        got, negative = pipe.encode_prompt(*arguments, prompt_weighting=False)
    assert torch.equal(got, expected)
    assert torch.equal(negative, expected)


def test_words_of_several_vectors_are_expanded_without_prompt_weighting():
    pipe = tiny_pipeline()
    pipe.tokenizer.add_tokens(["<x>", "<x>_1"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with torch.no_grad():
        expected = encode_text(pipe.text_encoder, tokenize(pipe.tokenizer, ["a <x> (1:2)"]))
        got, _ = pipe.encode_prompt("a <x> (1:2)", CPU, 1, False, prompt_weighting=False)
    assert torch.equal(got, expected)


def test_an_image_of_a_verbatim_text_is_made_again_by_its_settings():
    pipe = tiny_pipeline()
    text, settings = "a clock (12:30)", {"seed": 1, "num_inference_steps": 1}
    image = pipe(text, prompt_weighting=False, **settings).images[0]
    call = read_settings(image)["call"]
    assert call["prompt_weighting"] is False
    assert pipe(**call).images[0].tobytes() == image.tobytes()
    assert "prompt_weighting" not in read_settings(pipe("(a:2)", **settings).images[0])["call"]
    with pytest.raises(ValueError, match="prompt weighs '12' by 30"):
        pipe(text, **settings)
    with pytest.raises(ValueError, match="prompt_weighting must be True or False"):
        pipe(text, prompt_weighting="no", **settings)


@given(st.text())
def test_any_text_is_split_without_loss(text):
    try:
        parts = weighted_parts(text)
    except ValueError as error:
        assert "weighs" in str(error)  # noqa: PT017  (both outcomes are right)
        return
    if all(weight == 1 for _, weight in parts) and "\\" not in text and ":" not in text:
        assert "".join(part for part, _ in parts) == text


def test_weight_moves_embeddings_along_the_line_from_the_null_caption(encoder):
    with torch.no_grad():
        plain, null = embed(["red apple"], **encoder), embed([""], **encoder)
        heavy, same, zero = (
            embed([f"(red:{weight}) apple"], **encoder) for weight in ("1.5", "1.0", "0")
        )
    torch.testing.assert_close(same, plain)
    num_red = len(tokenize_prompt(encoder["tokenizer"], parse_prompt("red")).ids)
    red = slice(1, 1 + num_red)
    torch.testing.assert_close(zero[:, red], null[:, red])
    torch.testing.assert_close(heavy[:, red], null[:, red] + 1.5 * (plain - null)[:, red])
    torch.testing.assert_close(heavy[:, 1 + num_red :], plain[:, 1 + num_red :])


def test_truncated_part_is_logged(encoder, caplog):
    with caplog.at_level(logging.WARNING, logger="latentdiff"):
        embed(["a cat", LONG], **encoder)
    window = encoder["tokenizer"].model_max_length - 2
    tokens = tokenize_prompt(encoder["tokenizer"], parse_prompt(LONG)).ids
    cut = encoder["tokenizer"].decode(tokens[window:]).replace("</w>", " ").strip()
    assert len(caplog.records) == 1
    assert repr(cut) in caplog.text
    assert "prompt 1" in caplog.text


def test_chunks_read_the_whole_prompt(encoder):
    window = encoder["tokenizer"].model_max_length - 2
    ids = tokenize_prompt(encoder["tokenizer"], parse_prompt(LONG)).ids
    num_chunks = -(-len(ids) // window)
    assert num_chunks > 1
    with torch.no_grad():
        states = embed([LONG], **encoder, long_prompts="chunks")
        first = embed([LONG], **encoder)
    assert states.shape[1] == num_chunks * (window + 2)
    torch.testing.assert_close(states[:, : window + 2], first)


def test_repeated_embeddings_leave_attention_as_it_is():
    generator = torch.Generator().manual_seed(0)
    short, long = (torch.randn(length, 8, generator=generator) for length in (4, 6))
    query = torch.randn(5, 8, generator=generator)
    padded_short, padded_long = common_length([short, long])
    assert padded_short.shape == padded_long.shape == (12, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(
        attend(query, padded_short, padded_short), attend(query, short, short)
    )
    torch.testing.assert_close(attend(query, padded_long, padded_long), attend(query, long, long))


def test_lengths_without_a_common_multiple_are_refused():
    with pytest.raises(ValueError, match="prompt lists texts"):
        common_length([torch.zeros(77 * k, 1) for k in (1, 61, 67)])
