"""Random embedding files for the tiny model: the word and its vectors, or a refusal by name."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import torch
from fakes_pipeline import tiny_tokenizer
from fuzz_inputs import FuzzCase
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.pipeline.files.adapter_file import EMBEDDING_NAMES, open_adapter
from latentdiff.pipeline.files.embedding_file import check_new_words, read_embedding

WIDTH = 16
WORDS = ["mystyle", "My-Style_v2", "<pet>", "ünï", "日本", "a b", "x" * 60, "(x)", "\\1"]
tokenizer = functools.cache(tiny_tokenizer)


def load_word(path: Path, token: str | None = None) -> tuple[str, Tensor]:
    file = open_adapter(path, names=EMBEDDING_NAMES, weight_name=None, subfolder=None)
    word, vectors = read_embedding(file, token, width=WIDTH)
    check_new_words({word: vectors}, tokenizer())
    return word, vectors


def valid(generator: random.Random) -> FuzzCase:
    word, is_nameless = generator.choice(WORDS), generator.random() < 0.5
    kind = generator.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    torch.manual_seed(generator.randrange(1000))
    vectors = torch.randn(generator.randint(1, 8), WIDTH).to(kind)
    token = "<other>" if generator.random() < 0.2 else None

    def load(folder: Path) -> Any:
        path = folder / (f"{word}.safetensors" if is_nameless else "learned_embeds.safetensors")
        save_file({"emb_params" if is_nameless else word: vectors}, path)
        return load_word(path, token)

    def is_right(found: tuple[str, Tensor]) -> bool:
        return found[0] == (token or word) and torch.equal(found[1], vectors.float())

    return FuzzCase(f"valid {word!r} {kind} {token}", load, is_right)


def bad_contents(generator: random.Random) -> dict[str, Tensor]:
    right = torch.randn(2, WIDTH)
    return generator.choice(
        [
            {"emb_params": torch.zeros(1, generator.choice([1, 15, 768, 1024, 1280]))},
            {"emb_params": right * torch.inf},
            {"emb_params": right.to(torch.int32)},
            {"emb_params": right[None]},
            {"emb_params": right[:0]},
            {"emb_params": torch.zeros(76, WIDTH)},
            {"emb_params": torch.tensor(1.0)},
            {"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)},
            {"<a>": right, "<b>": right.clone()},
            {"lora_unet_x.lora_down.weight": right},
            {"model.diffusion_model.out.0.weight": right},
            {" ": right},
            {},
        ]
    )


def spoiled(generator: random.Random) -> FuzzCase:
    weights, cut = bad_contents(generator), generator.random()
    is_cut = generator.random() < 0.3

    def load(folder: Path) -> Any:
        path = folder / "style.safetensors"
        save_file({"emb_params": torch.randn(2, WIDTH)} if is_cut else weights, path)
        if is_cut:
            whole = path.read_bytes()
            path.write_bytes(whole[: int(cut * len(whole))])
        return load_word(path)

    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    return FuzzCase(f"cut {cut:.3f}" if is_cut else f"{shapes}", load, named=("style.safetensors",))


def make_case(generator: random.Random) -> FuzzCase:
    """Return a random embedding file, half of them valid."""
    return generator.choice([valid, spoiled])(generator)
