"""A whole inspection of a folder: what `scripts/inspect_data.py` does."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import CLIPTokenizer

from latentdiff.data.buckets import Bucket, Partial, make_buckets
from latentdiff.data.costs import CacheShape, Encode
from latentdiff.data.folder import Folder
from latentdiff.data.index import ScanIndex
from latentdiff.data.listing import Progress
from latentdiff.data.report import Report, make_report
from latentdiff.data.similar import find_alike
from latentdiff.latents import LatentCodec
from latentdiff.models import load_vae


def inspect_folder(
    folder: Folder,
    *,
    resolution: int = 512,
    buckets: bool = False,
    bucket_multiple: int = 64,
    bucket_max_aspect: float = 2.0,
    batch_size: int = 16,
    partial_batches: Partial = "keep",
    max_bad_fraction: float = 0.0,
    tokenizer: str = "",
    vae: str = "",
    quick: bool = False,
    random_flip: bool = False,
    num_crops: int = 1,
    cache: bool = True,
    cache_dir: str = "",
    progress: Progress | None = None,
) -> Report:
    """Report on a folder as training with these settings would meet it.

    tokenizer: a folder with a CLIP tokenizer, or a Stable-Diffusion folder that holds one. vae: a
    folder with a VAE, to measure its rate. random_flip, num_crops, cache: what is cached of each
    picture. quick: do not look for pictures that are alike, which decodes every picture once.
    cache_dir: where the scan index is, so that it is done once ever. The rest: see DataConfig.
    """
    sizes: tuple[Bucket, ...] = (Bucket(resolution, resolution),)
    if buckets:
        sizes = make_buckets(resolution, multiple=bucket_multiple, max_aspect=bucket_max_aspect)
    shape, encode = _vae_costs(vae) if vae else (CacheShape(), None)
    index = ScanIndex(cache_dir, folder.root) if cache_dir else None
    return make_report(
        folder,
        buckets=sizes,
        batch_size=batch_size,
        partial=partial_batches,
        max_bad_fraction=max_bad_fraction,
        tokenizer=load_tokenizer(Path(tokenizer)) if tokenizer else None,
        alike=None if quick else find_alike(folder, index=index, progress=progress),
        cache=replace(shape, copies=(1 + random_flip) * num_crops * cache),
        encode=encode,
    )


def chosen(settings: Mapping[str, Any], function: Callable[..., object]) -> dict[str, Any]:
    """Choose from many settings those that a function has parameters for."""
    return {name: settings[name] for name in signature(function).parameters if name in settings}


def progress_bar() -> Progress:
    """Make a progress bar on stderr; nothing is shown where stderr is not a terminal."""
    bar = tqdm(unit=" pictures", leave=False, disable=None, delay=1.0)

    def show(num_done: int, num_all: int) -> None:
        bar.total = num_all
        bar.update(num_done - bar.n)
        if num_done == num_all:
            bar.close()

    return show


def load_tokenizer(path: Path) -> CLIPTokenizer:
    """Load a CLIP tokenizer from its folder or from a Stable-Diffusion folder.

    Raises FileNotFoundError where there is none.
    """
    for folder in (path, path / "tokenizer"):
        if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
            tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
            return tokenizer
    raise FileNotFoundError(
        f"no tokenizer in {path}: expected tokenizer.json or vocab.json there or in its folder "
        "tokenizer/"
    )


def _vae_costs(path: str) -> tuple[CacheShape, Encode]:
    """Load a VAE, to say how large its latents are and how long it takes."""
    codec = LatentCodec(load_vae(path))

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> object:
        return codec.moments(pixels)

    return CacheShape(latent_factor=codec.factor, latent_channels=codec.channels), encode
