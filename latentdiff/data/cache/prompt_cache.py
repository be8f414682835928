"""Prompt embeddings of captions, encoded once and kept on disk, addressed by content.

A key is the hash of the caption, the text encoder's weights, the tokenizer and the dtype. The null
caption of classifier-free guidance is always there.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from latentdiff.data.cache.shard_file import as_keys, key_of
from latentdiff.data.cache.tensor_store import (
    BAR_DELAY_S,
    MISSING,
    StoreWriter,
    TensorStore,
    check_room,
    owned_by_rank,
)
from latentdiff.models.text import NULL_CAPTION, clip_skip_of, encode_text, tokenize
from latentdiff.models.weights import weights_hash

T = TypeVar("T")
CAPTIONS_AT_ONCE = 4096  # captions looked up at a time


class PromptCache:
    """Prompt embeddings by caption. num_encoded: captions that this process had to encode; keys:
    (M, 2) uint64, of the captions that the cache was built for."""

    def __init__(
        self, store: TensorStore, start: bytes, *, keys: np.ndarray, num_encoded: int
    ) -> None:
        self.keys, self.num_encoded = keys, num_encoded
        self._store = store
        self._start = start

    @classmethod
    def build(
        cls,
        captions: Iterable[str],
        tokenizer: CLIPTokenizer,
        *,
        text_encoder: CLIPTextModel,
        cache_dir: Path | str,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
        shard: tuple[int, int] = (0, 1),
        check_rows: bool = False,
        progress: bool = True,
    ) -> "PromptCache":
        """Encode the missing captions, the null caption among them, and open the result.

        Captions may repeat. shard, check_rows and interruption: as in LatentCache.build.
        """
        start = encoder_hash(tokenizer, text_encoder, dtype=dtype)
        store = TensorStore(Path(cache_dir) / "text", check_all=check_rows)
        if isinstance(captions, Sequence):
            wanted = {key_of(start, caption.encode()) for caption in (NULL_CAPTION, *captions)}
            size = tokenizer.model_max_length * text_encoder.config.hidden_size * dtype.itemsize
            check_room(store.folder, size * len(_missing(store, list(wanted), shard=(0, 1))))
        writer = StoreWriter(store.folder)
        seen: list[np.ndarray] = []
        encoded: set[bytes] = set()
        with tqdm(
            desc="captions",
            unit=" captions",
            delay=BAR_DELAY_S,
            disable=None if progress else True,
        ) as bar:
            try:
                for chunk in _chunks(chain([NULL_CAPTION], captions), CAPTIONS_AT_ONCE):
                    keys = [key_of(start, caption.encode()) for caption in chunk]
                    seen.append(np.unique(as_keys(keys), axis=0))
                    mine = _missing(store, keys, shard=shard)
                    todo = {keys[i]: chunk[i] for i in mine if keys[i] not in encoded}
                    for batch in _chunks(todo.items(), batch_size):
                        texts = [caption for _, caption in batch]
                        embeds = encode_captions(texts, tokenizer, text_encoder=text_encoder)
                        writer.add(as_keys(key for key, _ in batch), embeds.to(dtype))
                    encoded |= todo.keys()
                    bar.update(len(chunk))
            finally:
                writer.flush()
        store.refresh()
        keys_seen = np.unique(np.concatenate(seen), axis=0)
        return cls(store, start, keys=keys_seen, num_encoded=len(encoded))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def null_embeds(self) -> Tensor:
        """The null caption's embeddings (L, D)."""
        return self.prompt_embeds(NULL_CAPTION)

    def prompt_embeds(self, caption: str) -> Tensor:
        """Return the embeddings (L, D) of a caption, in the stored dtype.

        Raises ValueError for a caption that was not encoded, and for a damaged file.
        """
        key = as_keys([key_of(self._start, caption.encode())])
        row = int(self._store.find(key)[0])
        if row == MISSING:
            self._store.refresh()
            row = int(self._store.find(key)[0])
        if row == MISSING:
            raise ValueError(
                f"the caption {caption!r} is not in the cache; build it with all captions, and let "
                "all processes build before one reads"
            )
        return self._store.read(row)


def prompt_keys(
    captions: Iterable[str],
    tokenizer: CLIPTokenizer,
    *,
    text_encoder: CLIPTextModel,
    dtype: torch.dtype = torch.float32,
) -> np.ndarray:
    """Return the keys of captions and of the null caption: (M, 2) uint64."""
    start = encoder_hash(tokenizer, text_encoder, dtype=dtype)
    return as_keys(key_of(start, text.encode()) for text in chain([NULL_CAPTION], captions))


def encoder_hash(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, *, dtype: torch.dtype
) -> bytes:
    """Hash everything but the caption that prompt embeddings depend on."""
    config = text_encoder.config
    settings = {
        "tower": weights_hash(text_encoder),
        "heads": config.num_attention_heads,
        "activation": config.hidden_act,
        "eps": config.layer_norm_eps,
        "tokenizer": tokenizer_identity(tokenizer),
        "dtype": str(dtype),
    }
    if skipped := clip_skip_of(text_encoder):  # absent without, as before there was the setting
        settings["clip_skip"] = skipped
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()


def tokenizer_identity(tokenizer: CLIPTokenizer) -> str:
    """Hash the rules that turn captions into padded token ids, not the last call's settings."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    del rules["truncation"], rules["padding"]  # set anew by each call
    padding = [tokenizer.model_max_length, tokenizer.pad_token_id, tokenizer.padding_side]
    text = json.dumps([rules, padding], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@torch.no_grad()
def encode_captions(
    captions: Sequence[str], tokenizer: CLIPTokenizer, *, text_encoder: CLIPTextModel
) -> Tensor:
    """Encode captions to prompt embeddings (B, L, D) on the CPU, without autocast."""
    with torch.autocast(text_encoder.device.type, enabled=False):
        ids = tokenize(tokenizer, captions)
        return encode_text(text_encoder, ids, end_id=tokenizer.eos_token_id).cpu()


def _missing(store: TensorStore, keys: list[bytes], *, shard: tuple[int, int]) -> list[int]:
    """List the places of this process's share of the keys that the store lacks."""
    table = as_keys(keys)
    is_missing = (store.find(table) == MISSING) & owned_by_rank(table, shard)
    return np.flatnonzero(is_missing).tolist()


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
