"""Figures of a folder: image sizes, captions and their tokens, and the use of each bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from latentdiff.data.arrow.columns import folders_of, in_chunks, iter_py
from latentdiff.data.buckets import Bucket, Partial, crop_loss, num_batches
from latentdiff.data.epoch_draws import EpochDraws
from latentdiff.data.folder.folder import Folder

if TYPE_CHECKING:  # only the count of tokens takes it
    from transformers import CLIPTokenizer

NUM_SHOWN = 20  # longest captions, most repeated captions


@dataclass(frozen=True)
class Summary:
    """Five numbers of a distribution."""

    min: float
    low: float  # 5 %
    median: float
    high: float  # 95 %
    max: float


@dataclass(frozen=True)
class SizeStats:
    """Pixels of the shorter side, width over height, and how many are wide, tall, square."""

    shorter: Summary
    aspect: Summary
    num_wide: int
    num_tall: int
    num_square: int


@dataclass(frozen=True)
class LongCaption:
    """A caption over the token limit: its record, its number of tokens, and the part cut off."""

    id: str
    num_tokens: int
    caption: str
    cut: str


@dataclass(frozen=True)
class TokenStats:
    """Tokens per caption with the start and end token, and the captions over the limit."""

    lengths: Summary
    limit: int
    num_over: int
    worst: list[LongCaption]


@dataclass(frozen=True)
class CaptionStats:
    num_captions: int
    num_different: int
    num_empty: int
    max_per_image: int
    repeated: list[tuple[str, int]]  # a caption and how often, most often first
    tokens: TokenStats | None  # None without a tokenizer


@dataclass(frozen=True)
class SampleRow:
    """The samples that an epoch takes from one source, or from one folder of repeats."""

    name: str
    num_images: int  # of the training split
    num_heldout: int
    num_samples: int  # of an epoch
    share: float  # of the epoch's samples, in [0, 1]


@dataclass(frozen=True)
class BucketRow:
    """One bucket of the training split. Shares are of an image's area, in [0, 1]."""

    width: int
    height: int
    num_images: int
    num_samples: int  # of an epoch: more than images where these come several times
    num_batches: int
    last_batch: int  # images in the last batch
    num_repeats: int  # images shown twice in an epoch to fill it
    num_enlarged: int
    mean_crop_loss: float
    max_crop_loss: float
    worst_id: str


def size_stats(folder: Folder) -> SizeStats:
    """Measure the images' sizes; the folder must not be empty."""
    widths, heights = folder.widths, folder.heights
    wide, tall = int((widths > heights).sum()), int((widths < heights).sum())
    shorter = summarize(np.minimum(widths, heights))
    return SizeStats(shorter, summarize(widths / heights), wide, tall, len(folder) - wide - tall)


def caption_stats(folder: Folder, tokenizer: CLIPTokenizer | None) -> CaptionStats:
    """Count captions and their tokens; the folder must not be empty."""
    lists = folder.captions
    counted = pc.value_counts(lists.flatten())
    captions, counts = counted.field("values"), counted.field("counts").to_numpy()
    often = np.argsort(-counts, kind="stable")[:NUM_SHOWN]
    repeated = [(captions[int(i)].as_py(), int(counts[i])) for i in often if counts[i] > 1]
    is_empty = pc.equal(captions, "").to_numpy(zero_copy_only=False)
    return CaptionStats(
        num_captions=int(counts.sum()),
        num_different=len(counts),
        num_empty=int(counts[is_empty].sum()),
        max_per_image=int(pc.max(pc.list_value_length(lists)).as_py()),
        repeated=repeated,
        tokens=None if tokenizer is None else token_stats(folder, tokenizer),
    )


def token_stats(folder: Folder, tokenizer: CLIPTokenizer) -> TokenStats:
    """Count the tokens of every caption."""
    from latentdiff.models.text import truncated_part

    lists = folder.captions
    counts = []
    for chunk in in_chunks(iter_py(lists.flatten())):
        encoded = tokenizer(chunk, truncation=False, verbose=False).input_ids
        counts.append(np.array([len(ids) for ids in encoded]))
    lengths = np.concatenate(counts)
    limit = int(tokenizer.model_max_length)
    record_of = pc.list_parent_indices(lists).to_numpy()
    worst = np.argsort(-lengths, kind="stable")[:NUM_SHOWN]
    long = []
    for place in worst[lengths[worst] > limit]:
        caption = lists.flatten()[int(place)].as_py()
        record = folder[int(record_of[place])]
        cut = truncated_part(tokenizer, caption)
        long.append(LongCaption(record.id, int(lengths[place]), caption, cut))
    return TokenStats(summarize(lengths), limit, int((lengths > limit).sum()), long)


def sample_rows(
    train: Folder, heldout: Folder, draws: EpochDraws, *, source_names: Sequence[str] = ()
) -> list[SampleRow]:
    """Count the images and samples of each source, or of each folder where there is one source."""
    if source_names:
        names, num = list(source_names), len(source_names)
        images, held = (np.bincount(one.sources, minlength=num) for one in (train, heldout))
        samples = np.array([draws.source_counts.get(source, 0) for source in range(num)])
    else:
        folders, num_held = folders_of(train.ids).dictionary_encode(), subfolder_counts(heldout)
        at = folders.indices.to_numpy()
        names = [name or "." for name in folders.dictionary.to_pylist()]
        images, samples = np.bincount(at), np.bincount(at, weights=train.repeats).astype(int)
        held = np.array([num_held.get(name, 0) for name in names])
    columns = zip(names, images.tolist(), held.tolist(), samples.tolist(), strict=True)
    return [SampleRow(*row, share=row[3] / max(1, len(draws))) for row in columns]


def bucket_rows(
    folder: Folder,
    buckets: Sequence[Bucket],
    *,
    batch_size: int,
    partial: Partial,
    bucket_of: np.ndarray,
    draws: EpochDraws | None = None,
) -> list[BucketRow]:
    """Count for each bucket in use its images, batches and repeats, and measure its crops.

    bucket_of: the bucket of each image, as of `assign_buckets`. draws: how often an epoch shows
    each image; once, by default.
    """
    widths, heights = folder.widths, folder.heights
    losses = crop_loss(widths, heights, bucket_of=bucket_of, buckets=buckets)
    rows = []
    for place, bucket in enumerate(buckets):
        members = np.flatnonzero(bucket_of == place)
        if not len(members):
            continue
        num_samples = len(members) if draws is None else draws.bucket_counts[place]
        batches = num_batches(np.array([num_samples]), batch_size=batch_size)
        left = num_samples - (batches - 1) * batch_size
        is_filled = partial == "fill"
        small = (widths[members] < bucket.width) | (heights[members] < bucket.height)
        worst = members[np.argmax(losses[members])]
        rows.append(
            BucketRow(
                width=bucket.width,
                height=bucket.height,
                num_images=len(members),
                num_samples=num_samples,
                num_batches=batches,
                last_batch=batch_size if is_filled else left,
                num_repeats=batch_size - left if is_filled else 0,
                num_enlarged=int(small.sum()),
                mean_crop_loss=float(losses[members].mean()),
                max_crop_loss=float(losses[worst]),
                worst_id=folder[int(worst)].id,
            )
        )
    return rows


def summarize(numbers: np.ndarray) -> Summary:
    """Take the minimum, 5 %, 50 %, 95 % and maximum of some numbers."""
    return Summary(*(float(x) for x in np.percentile(numbers, [0, 5, 50, 95, 100])))


def subfolder_counts(folder: Folder) -> dict[str, int]:
    """Count the images of each sub-folder that holds any itself, "." first, then by name."""
    counted = pc.value_counts(folders_of(folder.ids)).to_pylist()
    return {
        row["values"] or ".": row["counts"]
        for row in sorted(counted, key=lambda row: row["values"])
    }
