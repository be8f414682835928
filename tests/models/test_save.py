"""Saved components are read by transformers 4 and 5 alike and say nothing of this machine."""

import json
from pathlib import Path

import pytest
import torch
from fakes_models import CAPTIONS, LONG, WORLD, make_unet
from fakes_pipeline import tiny_pipeline, tiny_text_encoder
from transformers import CLIPTextModel, CLIPTokenizer

from latentdiff import LatentDiffPipeline
from latentdiff.models.open_clip import clip_tokenizer_from_open_clip
from latentdiff.models.save import save_component
from latentdiff.models.text import tokenize, train_tokenizer
from latentdiff.models.weights import stored_shapes, weight_files

TEXTS = [*CAPTIONS, *WORLD, LONG, "a photo of <dog> , twice: <dog> <dog>_1", "wow! <|endoftext|>"]
OLDER_FORM = {"vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"}


def vocabulary(kind: str) -> CLIPTokenizer:
    """Return CLIP's vocabulary, or one of our own, of its own length."""
    if kind == "clip":
        return clip_tokenizer_from_open_clip()
    return train_tokenizer(CAPTIONS, vocab_size=600, max_length=16)


@pytest.mark.parametrize("words", [[], ["<dog>", "<dog>_1"]], ids=["plain", "new words"])
@pytest.mark.parametrize("kind", ["own", "clip"])
def test_both_forms_of_a_tokenizer_give_the_same_tokens(
    kind: str, words: list[str], tmp_path: Path
) -> None:
    tokenizer = vocabulary(kind)
    tokenizer.add_tokens(words)
    save_component(tokenizer, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == OLDER_FORM | {"tokenizer.json"} | ({"added_tokens.json"} if words else set())
    newer = CLIPTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    older = CLIPTokenizer.from_pretrained(tmp_path)
    expected = tokenize(tokenizer, TEXTS)
    for read in (newer, older):
        assert torch.equal(tokenize(read, TEXTS), expected)
        assert len(read) == len(tokenizer)
        assert read.model_max_length == tokenizer.model_max_length
        assert read.special_tokens_map == tokenizer.special_tokens_map


def test_files_of_the_older_form_are_as_its_reader_expects(tmp_path: Path) -> None:
    tokenizer = vocabulary("own")
    tokenizer.add_tokens(["<dog>"])
    save_component(tokenizer, tmp_path)
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    header, *merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    assert header.startswith("#version")  # the reader drops the first line unread
    assert [merge.split()[0] + merge.split()[1] in vocab for merge in merges] == [True] * len(
        merges
    )
    assert sorted(vocab.values()) == list(range(tokenizer.vocab_size))
    assert "<dog>" not in vocab
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {"<dog>": len(vocab)}
    assert json.loads((tmp_path / "special_tokens_map.json").read_text()) == {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_text_encoder_made_by_its_constructor_is_saved_under_the_names_of_the_format(
    tmp_path: Path, dtype: torch.dtype, variant: str | None
) -> None:
    made = CLIPTextModel(tiny_text_encoder(vocabulary("own")).config).to(dtype)
    pipe = tiny_pipeline(text_encoder=made)
    pipe.save_pretrained(tmp_path, variant=variant, max_shard_size="20KB")
    files = weight_files(tmp_path / "text_encoder", variant=variant)
    assert len(files) > 1
    assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) == len(files)
    names = list(stored_shapes(files))
    assert names
    assert [name for name in names if not name.startswith("text_model.")] == []
    again = LatentDiffPipeline.from_pretrained(tmp_path, torch_dtype=dtype, variant=variant)
    loaded = again.text_encoder.state_dict()
    for name, tensor in made.state_dict().items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == dtype


def test_saved_component_does_not_name_its_origin(tmp_path: Path) -> None:
    make_unet().save_pretrained(tmp_path / "first")
    unet = type(make_unet()).from_pretrained(tmp_path / "first")
    save_component(unet, tmp_path / "second")
    for path in (tmp_path / "second").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
