"""Prompt embeddings of captions, encoded once and kept on disk, addressed by content.

A key is the hash of the caption, the text encoders' weights, the tokenizers and the dtype. The null
caption of classifier-free guidance is always there. Of SDXL one row holds the states of both text
encoders and, after them, the pooled embeddings.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer

from latentdiff.data.cache.shard_file import as_keys, key_of
from latentdiff.data.cache.tensor_store import (
    MISSING,
    StoreWriter,
    TensorStore,
    check_room,
    owned_by_rank,
    progress_bar,
)
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.text import NULL_CAPTION, TextEncoders, clip_skip_of
from latentdiff.models.weights import weights_hash


class PromptCache:
    """Prompt embeddings by caption. num_encoded: captions that this process had to encode; keys:
    (M, 2) uint64, of the captions that the cache was built for."""

    def __init__(
        self,
        store: TensorStore,
        start: bytes,
        *,
        keys: np.ndarray,
        num_encoded: int,
        pooled_size: int = 0,
    ) -> None:
        """pooled_size: of the pooled embeddings, 0 for a model that has none."""
        self.keys, self.num_encoded, self.pooled_size = keys, num_encoded, pooled_size
        self._store = store
        self._start = start

    @classmethod
    def build(
        cls,
        captions: Iterable[str],
        encoders: TextEncoders,
        *,
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
        start = encoder_hash(encoders, dtype=dtype)
        store = TensorStore(Path(cache_dir) / "text", check_all=check_rows)
        unique = list(dict.fromkeys(chain([NULL_CAPTION], captions)))
        keys = as_keys(key_of(start, caption.encode()) for caption in unique)
        missing = np.flatnonzero(store.find(keys) == MISSING)
        row_bytes = math.prod(_row_shape(encoders)) * dtype.itemsize
        check_room(store.folder, row_bytes * len(missing))
        todo = missing[owned_by_rank(keys[missing], shard)]
        _encode(
            [unique[index] for index in todo.tolist()],
            keys[todo],
            encoders,
            writer=StoreWriter(store.folder),
            dtype=dtype,
            batch_size=batch_size,
            progress=progress,
        )
        store.refresh()
        return cls(
            store,
            start,
            keys=keys,
            num_encoded=len(todo),
            pooled_size=_pooled_size(encoders),
        )

    def __len__(self) -> int:
        return len(self.keys)

    def embeds(self, caption: str) -> dict[str, Tensor]:
        """Return prompt_embeds (L, D) of a caption and, of SDXL, pooled_embeds (P,), as stored.

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
        return _parts_of(self._store.read(row), pooled_size=self.pooled_size)


def _encode(
    captions: Sequence[str],
    keys: np.ndarray,
    encoders: TextEncoders,
    *,
    writer: StoreWriter,
    dtype: torch.dtype,
    batch_size: int,
    progress: bool,
) -> None:
    """Encode captions, and write their embeddings under their keys (N, 2)."""
    with progress_bar("captions", " captions", progress=progress, total=len(captions)) as bar:
        try:
            for start in range(0, len(captions), batch_size):
                part = slice(start, start + batch_size)
                with torch.no_grad():
                    rows = _rows_of(encoders.encode_captions(captions[part])).cpu()
                writer.add(keys[part], rows.to(dtype))
                bar.update(len(rows))
        finally:
            writer.flush()


def _pooled_size(encoders: TextEncoders) -> int:
    second = encoders.text_encoder_2
    return 0 if second is None else int(second.config.projection_dim)


def _row_shape(encoders: TextEncoders) -> tuple[int, int]:
    """Return the shape of a caption's row: its tokens and, after them, pooled embeddings."""
    parts = [encoders.text_encoder, encoders.text_encoder_2]
    width = sum(part.config.hidden_size for part in parts if part is not None)
    return encoders.tokenizer.model_max_length - (-_pooled_size(encoders) // width), width


def _rows_of(conditioning: Conditioning) -> Tensor:
    """Return what is stored of B captions: (B, L, D), or (B, L + n, D) with pooled embeddings."""
    embeds, pooled = conditioning.prompt_embeds, conditioning.pooled_embeds
    assert embeds is not None
    if pooled is None:
        return embeds
    width = embeds.shape[-1]
    filled = F.pad(pooled, (0, -pooled.shape[-1] % width))
    return torch.cat([embeds, filled.view(len(pooled), -1, width).to(embeds)], dim=1)


def _parts_of(row: Tensor, *, pooled_size: int) -> dict[str, Tensor]:
    """Take what is stored of a caption, (L + n, D), apart."""
    if not pooled_size:
        return {"prompt_embeds": row}
    num = -(-pooled_size // row.shape[-1])
    return {"prompt_embeds": row[:-num], "pooled_embeds": row[-num:].flatten()[:pooled_size]}


def prompt_keys(
    captions: Iterable[str], encoders: TextEncoders, *, dtype: torch.dtype = torch.float32
) -> np.ndarray:
    """Return the keys of captions and of the null caption: (M, 2) uint64."""
    start = encoder_hash(encoders, dtype=dtype)
    return as_keys(key_of(start, text.encode()) for text in chain([NULL_CAPTION], captions))


def encoder_hash(encoders: TextEncoders, *, dtype: torch.dtype) -> bytes:
    """Hash everything but the caption that prompt embeddings depend on."""
    settings = _identity(encoders.text_encoder, encoders.tokenizer) | {"dtype": str(dtype)}
    if encoders.text_encoder_2 is not None and encoders.tokenizer_2 is not None:
        second = settings["second"] = _identity(encoders.text_encoder_2, encoders.tokenizer_2)
        if "clip_skip" in settings:  # by both
            second["clip_skip"] = settings["clip_skip"]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).digest()


def _identity(text_encoder: Any, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    config = text_encoder.config
    settings = {
        "tower": weights_hash(text_encoder),
        "heads": config.num_attention_heads,
        "activation": config.hidden_act,
        "eps": config.layer_norm_eps,
        "tokenizer": tokenizer_identity(tokenizer),
    }
    if skipped := clip_skip_of(text_encoder):  # absent without, as before there was the setting
        settings["clip_skip"] = skipped
    return settings


def tokenizer_identity(tokenizer: CLIPTokenizer) -> str:
    """Hash the rules that turn captions into padded token ids, not the last call's settings."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    del rules["truncation"], rules["padding"]  # set anew by each call
    padding = [tokenizer.model_max_length, tokenizer.pad_token_id, tokenizer.padding_side]
    text = json.dumps([rules, padding], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
