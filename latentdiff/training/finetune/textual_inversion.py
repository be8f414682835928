"""Textual inversion (Gal et al. 2023): new tokens for a text encoder, whose embeddings are trained.

A token of n vectors is n tokens, <token>, <token>_1, ...; a caption names the first and means all
(text.tokenize expands it), as in diffusers. The text encoder's own embeddings are no parameters of
the training, so they stay bit for bit.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from latentdiff.atomic import atomic_file
from latentdiff.models.compatibility import TEXT_ENCODERS
from latentdiff.models.components import Components
from latentdiff.models.text import pool_at_end_token
from latentdiff.models.weights import load_into_meta
from latentdiff.pipeline.files.embedding_file import SDXL_EMBEDDINGS

FILE_NAME = "learned_embeds.safetensors"  # as diffusers looks for in a folder


class TokenEmbeddings(nn.Module):
    """Token ids (...) to embeddings (..., D): frozen below the id `first`, trainable from it on."""

    def __init__(self, known: nn.Embedding, new: Tensor, *, first: int) -> None:
        """new: (n, D), initial embeddings of the ids first .. first + n - 1."""
        super().__init__()
        self.known, self.first = known, first
        self.new = nn.Parameter(new)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up embeddings (..., D) of ids (...)."""
        is_new = (ids >= self.first)[..., None]
        known = self.known(ids.clamp(max=self.first - 1))
        new = self.new[(ids - self.first).clamp(min=0)]
        return torch.where(is_new, new.to(known.dtype), known)


def add_tokens(components: Components, *, token: str, vectors: Sequence[Tensor]) -> None:
    """Add a token of n embeddings to the tokenizers and text encoders of a model.

    The encoders pool at the end token from now on, as where the word is loaded later. vectors:
    (n, D) for each text encoder. Raises ValueError where a tokenizer has the token.
    """
    for (text_encoder, tokenizer), start in zip(_encoders(components), vectors, strict=True):
        names = [token, *(f"{token}_{k}" for k in range(1, len(start)))]
        if known := [name for name in names if name in tokenizer.get_vocab()]:
            raise ValueError(
                f"finetune.token={token} is no new token: the model's tokenizer has {known[0]} "
                "already; choose another"
            )
        first, embeddings = len(tokenizer), text_encoder.get_input_embeddings()
        tokenizer.add_tokens(names)
        new = start.to(embeddings.weight, copy=True)
        text_encoder.set_input_embeddings(TokenEmbeddings(embeddings, new, first=first))
        pool_at_end_token(text_encoder, tokenizer)


def known_vectors(
    components: Components, *, initializer_token: str, num_vectors: int
) -> list[Tensor]:
    """Return vectors (num_vectors, D) for each text encoder, each the mean of known words'."""
    found = []
    for text_encoder, tokenizer in _encoders(components):
        ids = tokenizer(initializer_token, add_special_tokens=False).input_ids
        embeddings = text_encoder.get_input_embeddings()
        found.append(embeddings.weight.detach()[ids].mean(0).repeat(num_vectors, 1))
    return found


def _encoders(components: Components) -> list[tuple[Any, CLIPTokenizer]]:
    """Return the text encoders of a model with their tokenizers."""
    encoders = [(components.text_encoder, components.tokenizer)]
    if components.text_encoder_2 is not None and components.tokenizer_2 is not None:
        encoders.append((components.text_encoder_2, components.tokenizer_2))
    return encoders


def check_captions_have_token(captions: Iterable[str], token: str) -> None:
    """Raise ValueError where no caption has the new token, which would then stay untrained."""
    if not any(token in caption for caption in captions):
        raise ValueError(
            f"no caption has the token {token}, so it would stay untrained; give "
            f"--finetune.instance_prompts='[\"a photo of {token}\"]', or --data.trigger_word"
        )


def learned_embeds(components: Components, token: str) -> dict[str, Tensor]:
    """Return the trained embeddings as diffusers, A1111 and ComfyUI read them.

    By their token, or, of SDXL, both text encoders' as clip_l and clip_g.
    """
    rows = [_token_embeddings(encoder).new.detach().cpu() for encoder, _ in _encoders(components)]
    if len(rows) > 1:
        return dict(zip(SDXL_EMBEDDINGS, rows, strict=True))
    (vectors,) = rows  # (n, D)
    return {token: vectors[0].clone() if len(vectors) == 1 else vectors}


def save_embeds(
    embeds: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]
) -> tuple[int, int]:
    """Write the embeddings of one token; return the number of its vectors, and bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_file(dict(embeds), temporary, metadata={"format": "pt"} | dict(metadata))
    vectors = next(iter(embeds.values()))
    return len(vectors) if vectors.ndim > 1 else 1, path.stat().st_size


def merge_tokens(components: Components) -> Components:
    """Return the model with the trained tokens as rows of its text encoders' embeddings."""
    merged = [_merged(text_encoder) for text_encoder, _ in _encoders(components)]
    return replace(components, **dict(zip(TEXT_ENCODERS, merged, strict=False)))


@torch.no_grad()
def _merged(text_encoder: Any) -> Any:
    tokens = _token_embeddings(text_encoder)
    rows = torch.cat([tokens.known.weight[: tokens.first], tokens.new])  # (vocabulary + n, D)
    weights = text_encoder.state_dict()
    name = next(name for name in weights if name.endswith("token_embedding.new"))
    weights[name.replace(".new", ".weight")] = rows
    del weights[name], weights[name.replace(".new", ".known.weight")]
    config = copy.deepcopy(text_encoder.config)
    config.vocab_size = len(rows)
    with torch.device("meta"):
        empty = type(text_encoder)(config)
    return load_into_meta(empty, weights, like=text_encoder)


def _token_embeddings(text_encoder: Any) -> TokenEmbeddings:
    embeddings = text_encoder.get_input_embeddings()
    assert isinstance(embeddings, TokenEmbeddings)
    return embeddings
