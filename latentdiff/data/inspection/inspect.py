"""A report on a captioned folder: its content, its problems, and the cost of training on it.

`inspect_folder` measures by a run's settings; text_report and html_report show the result. A
report is plain data: `latentdiff inspect --json` prints its `to_json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from latentdiff.data.arrow.listing import Progress
from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.buckets import Bucket, Partial, assign_buckets, make_buckets
from latentdiff.data.epoch_draws import EpochDraws, make_draws
from latentdiff.data.folder.folder import Folder
from latentdiff.data.folder.folder_names import SPLITS
from latentdiff.data.folder.problems import Problems
from latentdiff.data.inspection.cost_estimate import CacheShape, CostEstimate, Encode, estimate_cost
from latentdiff.data.inspection.near_duplicates import DuplicateGroup, find_near_duplicates
from latentdiff.data.inspection.pairs import PairStats, check_pairs
from latentdiff.data.inspection.statistics import (
    BucketRow,
    CaptionStats,
    SampleRow,
    SizeStats,
    bucket_rows,
    caption_stats,
    sample_rows,
    size_stats,
    subfolder_counts,
)

if TYPE_CHECKING:  # without --tokenizer and --vae nothing of these is loaded
    import torch
    from transformers import CLIPTokenizer


@dataclass(frozen=True)
class DuplicateNames:
    """Ids of images that are equal or nearly so; `is_leak` if both trained on and held out."""

    ids: list[str]
    is_exact: bool
    is_leak: bool


@dataclass(frozen=True)
class DataReport:
    root: str
    is_usable: bool
    why_not: list[str]
    num_found: int
    num_usable: int
    splits: dict[str, int]
    subfolders: dict[str, int]
    problems: dict[str, dict[str, Any]]
    sizes: SizeStats | None  # None of an empty folder, as are captions and cost
    captions: CaptionStats | None
    samples: list[SampleRow]  # by source; by folder where these have repeats, else empty
    buckets: list[BucketRow]
    duplicates: list[DuplicateNames] | None  # None where they were not searched
    cost: CostEstimate | None
    pairs: list[PairStats] = field(default_factory=list)  # of conditions and inpainting masks
    sizes_note: str = ""  # what buckets and cost hold for, where no model or size was named

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_data_report(
    folder: Folder,
    *,
    buckets: Sequence[Bucket],
    batch_size: int,
    partial: Partial = "keep",
    max_invalid_fraction: float = 0.0,
    tokenizer: CLIPTokenizer | None = None,
    duplicates: Sequence[DuplicateGroup] | None = None,
    cache: CacheShape | None = None,
    encode: Encode | None = None,
    sources: Mapping[str, Folder] | None = None,
    weights: Sequence[float] = (),
    pairs: tuple[Sequence[PairStats], Problems] | None = None,
) -> DataReport:
    """Measure a folder.

    sources: the folders that it joins, by name; weights: of each of them, or none. duplicates: from
    `find_near_duplicates`; pairs: from `check_pairs`. encode: the VAE's encoder of pixels (1, 3, H,
    W) in [-1, 1], to measure its speed. Buckets and steps are those of the training split.
    """
    refusals = {
        name: part.refusals(max_invalid_fraction=max_invalid_fraction)
        for name, part in (sources or {"": folder}).items()
    }
    why_not = [f"{name}: {one}" if name else one for name in refusals for one in refusals[name]]
    num_in_split = np.bincount(folder.splits, minlength=len(SPLITS)).tolist()
    train = folder.split("train")
    bucket_of = assign_buckets(train.widths, train.heights, buckets=buckets)
    draws = make_draws(train, bucket_of, weights)
    if draws is None and sources:
        draws = EpochDraws(train.repeats, bucket_of, sources=train.sources)
    rows = bucket_rows(
        train, buckets, batch_size=batch_size, partial=partial, bucket_of=bucket_of, draws=draws
    )
    return DataReport(
        root=" + ".join(sources) if sources else folder.name,
        is_usable=not why_not,
        why_not=why_not,
        num_found=folder.num_found,
        num_usable=len(folder),
        splits=dict(zip(SPLITS, num_in_split, strict=True)),
        subfolders=subfolder_counts(folder),
        problems=_problems(folder.problems) | (_problems(pairs[1]) if pairs else {}),
        sizes=size_stats(folder) if len(folder) else None,
        captions=caption_stats(folder, tokenizer) if len(folder) else None,
        samples=[]
        if draws is None
        else sample_rows(train, folder.heldout(), draws, source_names=list(sources or [])),
        buckets=rows,
        duplicates=None if duplicates is None else _duplicate_groups(folder, duplicates),
        cost=estimate_cost(
            folder, rows, batch_size=batch_size, cache=cache or CacheShape(), encode=encode
        )
        if len(folder)
        else None,
        pairs=list(pairs[0]) if pairs else [],
    )


def without_captions(report: DataReport) -> DataReport:
    """Return the report of a training that reads no captions: it says nothing of them."""
    problems = {key: one for key, one in report.problems.items() if key != "empty_caption"}
    return replace(report, problems=problems, captions=None)


def default_sizes_note(*, resolution: int, batch_size: int) -> str:
    """Say what sizes buckets and cost are of, where neither a model nor a size was named."""
    return (
        f"buckets and cost are for {resolution} px and batches of {batch_size}; "
        "--config lora_mini gives those of a preset"
    )


def _problems(found: Problems) -> dict[str, dict[str, Any]]:
    problems = {}
    for key, group in found.items():
        examples = [{"where": where, "detail": detail} for where, detail in group.examples]
        problems[key] = {**asdict(group.reason), "count": group.count, "examples": examples}
    return problems


def _duplicate_groups(folder: Folder, duplicates: Sequence[DuplicateGroup]) -> list[DuplicateNames]:
    is_train = folder.splits == SPLITS.index("train")
    groups = []
    for group in duplicates:
        places = list(group.indices)
        is_leak = bool(is_train[places].any() and not is_train[places].all())
        groups.append(DuplicateNames([folder[i].id for i in places], group.is_exact, is_leak))
    return sorted(groups, key=lambda group: (not group.is_leak, not group.is_exact, group.ids))


def inspect_folder(
    folder: Folder,
    *,
    resolution: int = 512,
    buckets: bool = False,
    bucket_multiple: int = 64,
    bucket_max_aspect: float = 2.0,
    batch_size: int = 16,
    partial_batches: Partial = "keep",
    max_invalid_fraction: float = 0.0,
    tokenizer: str = "",
    vae: str = "",
    quick: bool = False,
    random_flip: bool = False,
    num_crops: int = 1,
    cache: bool = True,
    cache_dir: str = "",
    sources: Mapping[str, Folder] | None = None,
    weights: Sequence[float] = (),
    conditions_may_equal: bool = False,
    progress: Progress | None = None,
) -> DataReport:
    """Report on a folder as training with these settings would read it.

    tokenizer, vae: folders of a CLIP tokenizer and of a VAE, whose speed is measured. quick: skip
    the search for duplicates, which decodes every image once ever, and the look at conditions.
    conditions_may_equal: they may be their images, in low resolution. sources, weights: as in
    `make_data_report`. The rest: see DataConfig.
    """
    sizes: tuple[Bucket, ...] = (Bucket(resolution, resolution),)
    if buckets:
        sizes = make_buckets(resolution, multiple=bucket_multiple, max_aspect=bucket_max_aspect)
    shape, encode = _vae_costs(vae) if vae else (CacheShape(), None)
    index = ScanIndex(cache_dir, folder.root) if cache_dir else None
    return make_data_report(
        folder,
        buckets=sizes,
        batch_size=batch_size,
        partial=partial_batches,
        max_invalid_fraction=max_invalid_fraction,
        tokenizer=load_tokenizer(Path(tokenizer)) if tokenizer else None,
        duplicates=None if quick else find_near_duplicates(folder, index=index, progress=progress),
        cache=replace(shape, copies=(1 + random_flip) * num_crops * cache),
        encode=encode,
        sources=sources,
        weights=weights,
        pairs=None if quick else check_pairs(folder, may_equal=conditions_may_equal),
    )


def matching_settings(
    settings: Mapping[str, Any], function: Callable[..., object]
) -> dict[str, Any]:
    """Select from many settings those that a function has parameters for."""
    return {name: settings[name] for name in signature(function).parameters if name in settings}


def progress_bar() -> Progress:
    """Make a progress bar on stderr; nothing is shown where stderr is not a terminal."""
    bar = tqdm(unit=" images", leave=False, disable=None, delay=1.0)

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
    from transformers import CLIPTokenizer

    for folder in (path, path / "tokenizer"):
        if (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists():
            tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
            return tokenizer
    raise FileNotFoundError(
        f"no tokenizer in {path}: expected tokenizer.json or vocab.json there or in its folder "
        "tokenizer/"
    )


def _vae_costs(path: str) -> tuple[CacheShape, Encode]:
    """Load a VAE; return the shape of its latents and its encoder."""
    import torch

    from latentdiff.models.components import load_vae
    from latentdiff.models.latents import LatentCodec

    codec = LatentCodec(load_vae(path))

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> object:
        return codec.moments(pixels)

    return CacheShape(latent_factor=codec.factor, latent_channels=codec.channels), encode
