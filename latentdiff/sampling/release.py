"""Pack a model for release: half precision, small files, and no path of this machine.

The models in latentdiff/assets are packed so. A packed folder opens as the original one does, in
float32 by default.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentdiff.atomic import atomic_folder
from latentdiff.device import DTYPES
from latentdiff.models.compatibility import read_json
from latentdiff.models.components import carry_tiny_vae, left_out
from latentdiff.pipeline.files.model_card import folder_title, model_card
from latentdiff.pipeline.pipeline import LatentDiffPipeline

MB = 1_000_000
HEADER = 200_000  # bytes that a shard has on top of its tensors, at the most
# any text may be a word in these
VOCABULARY = ("tokenizer.json", "vocab.json", "added_tokens.json")
LOCAL_PATH = re.compile(r"(/|~|[A-Za-z]:[\\/]).*[\\/].+")


def pack_model(
    model: str | os.PathLike[str],
    out: Path,
    *,
    dtype: str = "float16",
    max_file_mb: float = 14.0,
    max_total_mb: float = 45.0,
    guidance_scale: float | None = None,
    card: Path | None = None,
    safety_checker: bool = True,
) -> dict[str, int]:
    """Write a model in `dtype`, in shards of at most max_file_mb; return the files' bytes.

    guidance_scale: of calls that give none, by default the model's own. card: the README.md to
    put in; by default one is made of the model's info. safety_checker: False leaves it out.
    `out` appears whole or not at all. Raises ValueError for an `out` that exists, weights that
    `dtype` cannot hold, a path of this machine in a config, and a file or folder that comes out too
    large.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}, expected one of {', '.join(DTYPES)}")
    if out.exists():
        raise ValueError(f"{out} already exists, expected the name of a new folder")
    given = left_out(safety_checker=not safety_checker)
    pipe = LatentDiffPipeline.from_pretrained(model, **given)
    scale = pipe.model_info.guidance_scale if guidance_scale is None else guidance_scale
    pipe.model_info = dataclasses.replace(pipe.model_info, guidance_scale=scale)
    made = model_card(pipe.stated_info, name=folder_title(out), stock=pipe.stock_class_name)
    text = card.read_text(encoding="utf-8") if card else made
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            _shrink(name, part, DTYPES[dtype])
    with atomic_folder(out) as temporary:
        (temporary / "README.md").write_text(text, encoding="utf-8")
        pipe.save_pretrained(temporary, max_shard_size=int(max_file_mb * MB))
        carry_tiny_vae(os.fspath(model), temporary)
        refuse_local_paths(temporary)
        return _sizes(temporary, max_file_mb=max_file_mb, max_total_mb=max_total_mb)


def refuse_local_paths(folder: Path) -> None:
    """Raise ValueError for a path of this machine in a config of a model's folder."""
    for path in sorted(folder.rglob("*.json")):
        if path.name in VOCABULARY:
            continue
        texts = _text_files(read_json(path))
        if found := next((text for text in texts if LOCAL_PATH.fullmatch(text)), None):
            name = path.relative_to(folder)
            raise ValueError(f"{name} names {found}, expected no path of this machine; take it out")


@torch.no_grad()
def _shrink(name: str, part: nn.Module, dtype: torch.dtype) -> None:
    """Turn a component's weights into `dtype`; ValueError names one that becomes infinite."""
    part.to(dtype)
    for key, tensor in part.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{key} of the {name} is not finite in {dtype}, expected weights that it can hold; "
                "bfloat16 has float32's range"
            )


def _sizes(folder: Path, *, max_file_mb: float, max_total_mb: float) -> dict[str, int]:
    """Return the bytes of each file; ValueError for one, or all together, above the limits."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    largest, total = max(sizes, key=sizes.__getitem__), sum(sizes.values())
    if sizes[largest] > max_file_mb * MB + HEADER or total > max_total_mb * MB:
        raise ValueError(
            f"the packed model has {total / MB:.1f} MB in all, {sizes[largest] / MB:.1f} MB in "
            f"{largest}, expected at most {max_total_mb:g} and {max_file_mb:g}; train a smaller one"
        )
    return sizes


def _text_files(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for one in value.values() for text in _text_files(one))
    elif isinstance(value, list):
        yield from (text for one in value for text in _text_files(one))
