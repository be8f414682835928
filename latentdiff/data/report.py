"""What a captioned folder holds, what is wrong with it, and what training on it would mean.

`make_report` measures; `report_text` and `report_html` show. A report is plain data: `to_json` of
it is what `scripts/inspect_data.py --json` prints.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers import CLIPTokenizer

from latentdiff.data.buckets import Bucket, Partial
from latentdiff.data.costs import CacheShape, Encode, Plan, make_plan
from latentdiff.data.folder import Folder
from latentdiff.data.measures import (
    BucketRow,
    CaptionStats,
    SizeStats,
    bucket_rows,
    caption_stats,
    size_stats,
)
from latentdiff.data.similar import Alike
from latentdiff.data.splits import SPLITS


@dataclass(frozen=True)
class AlikeGroup:
    """Records that are the same picture or nearly; `is_leak` if both trained on and held out."""

    ids: list[str]
    is_exact: bool
    is_leak: bool


@dataclass(frozen=True)
class Report:
    root: str
    is_usable: bool
    why_not: list[str]
    num_found: int
    num_usable: int
    splits: dict[str, int]
    problems: dict[str, dict[str, Any]]
    sizes: SizeStats | None  # None of an empty folder, as are captions and plan
    captions: CaptionStats | None
    buckets: list[BucketRow]
    alike: list[AlikeGroup] | None  # None where it was not asked for
    plan: Plan | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_report(
    folder: Folder,
    *,
    buckets: Sequence[Bucket],
    batch_size: int,
    partial: Partial = "keep",
    max_bad_fraction: float = 0.0,
    tokenizer: CLIPTokenizer | None = None,
    alike: Sequence[Alike] | None = None,
    cache: CacheShape | None = None,
    encode: Encode | None = None,
) -> Report:
    """Measure a folder.

    alike: what `similar.find_alike` found among the folder's records. encode: what the VAE does
    with pixels (1, 3, H, W) in [-1, 1], to measure its rate. Buckets and steps are those of the
    training split.
    """
    why_not = folder.refusals(max_bad_fraction=max_bad_fraction)
    num_in_split = np.bincount(folder.splits, minlength=len(SPLITS)).tolist()
    train = folder.split("train")
    rows = bucket_rows(train, buckets, batch_size=batch_size, partial=partial)
    return Report(
        root=str(folder.root),
        is_usable=not why_not,
        why_not=why_not,
        num_found=folder.num_found,
        num_usable=len(folder),
        splits=dict(zip(SPLITS, num_in_split, strict=True)),
        problems=_problems(folder),
        sizes=size_stats(folder) if len(folder) else None,
        captions=caption_stats(folder, tokenizer) if len(folder) else None,
        buckets=rows,
        alike=None if alike is None else _alike_groups(folder, alike),
        plan=make_plan(
            folder, rows, batch_size=batch_size, cache=cache or CacheShape(), encode=encode
        )
        if len(folder)
        else None,
    )


def _problems(folder: Folder) -> dict[str, dict[str, Any]]:
    told = {}
    for key, group in folder.problems.items():
        examples = [{"where": where, "detail": detail} for where, detail in group.examples]
        told[key] = {**asdict(group.reason), "count": group.count, "examples": examples}
    return told


def _alike_groups(folder: Folder, alike: Sequence[Alike]) -> list[AlikeGroup]:
    is_train = folder.splits == SPLITS.index("train")
    groups = []
    for group in alike:
        places = list(group.places)
        is_leak = bool(is_train[places].any() and not is_train[places].all())
        groups.append(AlikeGroup([folder[i].id for i in places], group.is_exact, is_leak))
    return sorted(groups, key=lambda group: (not group.is_leak, not group.is_exact, group.ids))
