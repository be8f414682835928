"""Textual inversion (Gal et al. 2023): new tokens for a text encoder, whose embeddings are trained.

A token of n vectors is n tokens, <token>, <token>_1, ...; a caption names the first and means all
(text.tokenize expands it), as in diffusers. The text encoder's own embeddings are no parameters of
the training, so they stay bit for bit.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from latentdiff.atomic import atomic_file
from latentdiff.models.components import Components
from latentdiff.models.weights import load_into_meta

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


def add_tokens(components: Components, *, token: str, vectors: Tensor) -> None:
    """Add a token of n embeddings, vectors (n, D), to the tokenizer and the text encoder.

    Raises ValueError where the tokenizer has the token already.
    """
    tokenizer, text_encoder = components.tokenizer, components.text_encoder
    names = [token, *(f"{token}_{k}" for k in range(1, len(vectors)))]
    if known := [name for name in names if name in tokenizer.get_vocab()]:
        raise ValueError(
            f"finetune.token={token} is no new token: the model's tokenizer has {known[0]} "
            "already; choose another"
        )
    first, embeddings = len(tokenizer), text_encoder.get_input_embeddings()
    tokenizer.add_tokens(names)
    start = vectors.to(embeddings.weight, copy=True)
    text_encoder.set_input_embeddings(TokenEmbeddings(embeddings, start, first=first))


def known_vectors(components: Components, *, initializer_token: str, num_vectors: int) -> Tensor:
    """Return vectors (num_vectors, D), each the mean of the embeddings of known words."""
    ids = components.tokenizer(initializer_token, add_special_tokens=False).input_ids
    embeddings = components.text_encoder.get_input_embeddings()
    return embeddings.weight.detach()[ids].mean(0).repeat(num_vectors, 1)


def check_captions_have_token(captions: Iterable[str], token: str) -> None:
    """Raise ValueError where no caption has the new token, which would then stay untrained."""
    if not any(token in caption for caption in captions):
        raise ValueError(
            f"no caption has the token {token}, so it would stay untrained; give "
            f"--finetune.instance_prompts='[\"a photo of {token}\"]', or --data.trigger_word"
        )


def learned_embeds(components: Components, token: str) -> dict[str, Tensor]:
    """Return the trained embeddings by their token, as diffusers, A1111 and ComfyUI read them."""
    vectors = _token_embeddings(components).new.detach().cpu()  # (n, D)
    return {token: vectors[0].clone() if len(vectors) == 1 else vectors}


def save_embeds(
    embeds: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]
) -> tuple[int, int]:
    """Write the embeddings of one token; return their number, and bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        save_file(dict(embeds), temporary, metadata={"format": "pt"} | dict(metadata))
    (vectors,) = embeds.values()
    return len(vectors) if vectors.ndim > 1 else 1, path.stat().st_size


@torch.no_grad()
def merge_tokens(components: Components) -> Components:
    """Return the model with the trained tokens as rows of its text encoder's embeddings."""
    text_encoder, tokens = components.text_encoder, _token_embeddings(components)
    rows = torch.cat([tokens.known.weight[: tokens.first], tokens.new])  # (vocabulary + n, D)
    weights = text_encoder.state_dict()
    name = next(name for name in weights if name.endswith("token_embedding.new"))
    weights[name.replace(".new", ".weight")] = rows
    del weights[name], weights[name.replace(".new", ".known.weight")]
    config = copy.deepcopy(text_encoder.config)
    config.vocab_size = len(rows)
    with torch.device("meta"):
        empty = CLIPTextModel(config)
    return replace(components, text_encoder=load_into_meta(empty, weights, like=text_encoder))


def _token_embeddings(components: Components) -> TokenEmbeddings:
    embeddings = components.text_encoder.get_input_embeddings()
    assert isinstance(embeddings, TokenEmbeddings)
    return embeddings
