"""A report as plain text for a terminal; names and captions from files are made printable."""

from collections.abc import Iterator, Mapping, Sequence

from latentdiff.data.folder.problems import counted_title
from latentdiff.data.inspection.cost_estimate import CostEstimate
from latentdiff.data.inspection.inspect import DataReport, DuplicateNames
from latentdiff.data.inspection.pairs import pair_line
from latentdiff.data.inspection.statistics import (
    BucketRow,
    CaptionStats,
    SampleRow,
    SizeStats,
    Summary,
)
from latentdiff.html import printable

HIGH_CROP_LOSS = 0.05  # of an image's area
NUM_NAMES = 5  # shown of each kind; --json has the rest
SEVERITY_TITLES = {"error": "must be fixed", "skipped": "skipped", "note": "worth knowing"}


def report_as_text(report: DataReport) -> str:
    """Show a report to a person."""
    parts = [
        [_headline(report)],
        ["PROBLEMS", *_problems(report)],
        ["SIZES", *_sizes(report.sizes)] if report.sizes else [],
        ["CAPTIONS", *_captions(report.captions)] if report.captions else [],
        ["CONDITIONS", *(f"  {pair_line(one)}" for one in report.pairs)] if report.pairs else [],
        ["SAMPLES of an epoch", *_samples(report.samples)] if report.samples else [],
        ["BUCKETS of the training images", *_buckets(report.buckets)] if report.buckets else [],
        ["DUPLICATES", *_duplicates(report.duplicates)],
        ["COST", *_cost(report.cost), *_notes(report)] if report.cost else [],
        [_verdict(report)],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def counted(number: int, noun: str) -> str:
    """Write a number with its noun, as in 1 step, 2 steps."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size_text(num_bytes: float) -> str:
    """Write a number of bytes as a person reads it, as in 34.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def subfolders_text(counts: Mapping[str, int], *, max_names: int = 8) -> str:
    """Write how many images each sub-folder holds, as in 40 in ., 3 in extra."""
    shown = [f"{num:,} in {printable(name)}" for name, num in [*counts.items()][:max_names]]
    if rest := [*counts.values()][max_names:]:
        shown.append(f"{sum(rest):,} in {counted(len(rest), 'other folder')}")
    return ", ".join(shown)


def time_text(seconds: float) -> str:
    """Write a duration as a person reads it."""
    if seconds < 1:
        return "less than 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _headline(report: DataReport) -> str:
    splits = " + ".join(f"{num:,} {name}" for name, num in report.splits.items() if num)
    counts = f"{report.num_usable:,} of {report.num_found:,} images are usable"
    where = f"\n{subfolders_text(report.subfolders)}" if len(report.subfolders) > 1 else ""
    return f"{printable(report.root)}\n{counts}{f': {splits}' if splits else ''}{where}"


def _problems(report: DataReport) -> Iterator[str]:
    if not report.problems:
        yield "  none"
    for severity, title in SEVERITY_TITLES.items():
        chosen = [p for p in report.problems.values() if p["severity"] == severity]
        if chosen:
            yield f"  {title}:"
        for problem in chosen:
            yield f"    {counted_title(problem['title'], problem['count'])}"
            for example in problem["examples"][:NUM_NAMES]:
                detail = f": {printable(example['detail'])}" if example["detail"] else ""
                yield f"      {printable(example['where'])}{detail}"
            if problem["count"] > NUM_NAMES:
                yield f"      and {problem['count'] - NUM_NAMES:,} more"
            if problem["fix"]:
                yield f"      fix: {problem['fix']}"


def _sizes(sizes: SizeStats) -> Iterator[str]:
    yield f"  shorter side    {_range(sizes.shorter, '.0f')} px"
    yield f"  width : height  {_range(sizes.aspect, '.2f')}"
    yield f"  {sizes.num_wide:,} wide, {sizes.num_tall:,} tall, {sizes.num_square:,} square"


def _range(numbers: Summary, form: str) -> str:
    if numbers.min == numbers.max:
        return f"{numbers.min:{form}}"
    return f"{numbers.min:{form}} to {numbers.max:{form}}, median {numbers.median:{form}}"


def _captions(captions: CaptionStats) -> Iterator[str]:
    per = captions.max_per_image
    several = f", up to {per} an image" if per > 1 else ""
    num = counted(captions.num_captions, "caption")
    yield f"  {num}, {captions.num_different:,} different{several}"
    if captions.num_empty:
        yield f"  {captions.num_empty:,} empty"
    tokens = captions.tokens
    if tokens is None:
        yield "  tokens: not counted; --tokenizer=FOLDER names the tokenizer to count with"
    else:
        over = f"{tokens.num_over:,} over" if tokens.num_over else "none over"
        yield f"  tokens: {_range(tokens.lengths, '.0f')}; {over} the limit of {tokens.limit}"
        for long in tokens.worst[:NUM_NAMES]:
            name = printable(long.id)
            yield f"    {name}: {long.num_tokens} tokens, loses {_short(long.cut)}"
    if captions.repeated:
        caption, times = captions.repeated[0]
        yield f"  most repeated, {times:,} times: {_short(caption)}"


def _short(text: str, *, length: int = 70) -> str:
    text = printable(text)
    return f'"{text}"' if len(text) <= length else f'"{text[:length]}..."'


def _samples(rows: Sequence[SampleRow]) -> Iterator[str]:
    yield f"  {'training':>8}  {'held out':>8}  {'each':>9}  {'samples':>9}  {'share':>6}"
    for row in rows:
        yield (
            f"  {row.num_images:>8,}  {row.num_heldout:>8,}  {repeats_text(row):>9}"
            f"  {row.num_samples:>9,}"
            f"  {row.share:>6.1%}  {printable(row.name)}"
        )


def repeats_text(row: SampleRow) -> str:
    """Write how often an epoch shows each image of a row, as in x 10."""
    return f"x {row.num_samples / max(1, row.num_images):.4g}"


def samples_text(rows: Sequence[SampleRow], *, max_names: int = 8) -> str:
    """Write what an epoch takes of each row, as in 200 of 10_dog (20 images x 10)."""
    shown = [
        f"{row.num_samples:,} of {printable(row.name)} "
        f"({counted(row.num_images, 'image')} {repeats_text(row)})"
        for row in rows[:max_names]
    ]
    if rest := rows[max_names:]:
        num = sum(row.num_samples for row in rest)
        shown.append(f"{num:,} of {counted(len(rest), 'other folder')}")
    return ", ".join(shown)


def _buckets(rows: Sequence[BucketRow]) -> Iterator[str]:
    yield ("  width x height  images  batches  last batch  repeated  enlarged  cut off  at worst")
    for row in rows:
        size = f"{row.width} x {row.height}"
        yield (
            f"  {size:>14}  {row.num_images:>8,}  {row.num_batches:>7,}  {row.last_batch:>10,}"
            f"  {row.num_repeats:>8,}  {row.num_enlarged:>8,}  {row.mean_crop_loss:>7.1%}"
            f"  {row.max_crop_loss:>8.1%}"
            + (f" {printable(row.worst_id)}" if row.max_crop_loss else "")
        )
    yield "  no image is dropped; cut off: the share of an image outside its bucket's shape"
    if len(rows) == 1 and rows[0].mean_crop_loss > HIGH_CROP_LOSS:
        yield "  --data.buckets=true keeps images nearer to their own shape"


def _duplicates(groups: Sequence[DuplicateNames] | None) -> Iterator[str]:
    if groups is None:
        yield "  not searched (--quick)"
    elif not groups:
        yield "  none"
    for title, chosen in duplicate_sections(groups or []):
        yield f"  {title} ({len(chosen):,})"
        for group in chosen[:NUM_NAMES]:
            rest = f" and {len(group.ids) - 4:,} more" if len(group.ids) > 4 else ""
            yield "    " + " = ".join(printable(name) for name in group.ids[:4]) + rest
        if len(chosen) > NUM_NAMES:
            yield f"    and {len(chosen) - NUM_NAMES:,} more"


def duplicate_sections(groups: Sequence[DuplicateNames]) -> list[tuple[str, list[DuplicateNames]]]:
    """Sort groups into titled sections, the gravest first; empty sections are skipped."""
    titles = {
        (True, True): "equal files, both trained on and held out",
        (True, False): "nearly equal images, both trained on and held out",
        (False, True): "equal files",
        (False, False): "nearly equal images",
    }
    sections = [
        (title, [g for g in groups if (g.is_leak, g.is_exact) == kind])
        for kind, title in titles.items()
    ]
    return [(title, chosen) for title, chosen in sections if chosen]


def _cost(cost: CostEstimate) -> Iterator[str]:
    yield f"  {counted(cost.steps_per_epoch, 'step')} an epoch in batches of {cost.batch_size}"
    total = size_text(cost.latent_bytes + cost.text_bytes)
    parts = (
        f"latents {size_text(cost.latent_bytes)}, prompt embeddings {size_text(cost.text_bytes)}"
    )
    yield f"  the cache takes about {total}: {parts}"
    rate = f"{cost.load_rate:,.0f} images/s"
    if cost.encode_rate is None:
        yield f"  loading all images once takes {time_text(cost.seconds)} ({rate});"
        yield "  encoding them comes on top, --vae=FOLDER measures it"
    else:
        rate = f"loads {rate}, encodes {cost.encode_rate:,.1f} images/s"
        yield f"  building it takes {time_text(cost.seconds)} (one process {rate})"


def _notes(report: DataReport) -> Iterator[str]:
    if report.sizes_note:
        yield f"  {report.sizes_note}"


def leak_text(report: DataReport) -> str:
    """Warn of images that are both trained on and held out; "" where none is."""
    if not (num := sum(group.is_leak for group in report.duplicates or [])):
        return ""
    are = "is" if num == 1 else "are"
    return f"{counted(num, 'image')} {are} both trained on and held out: held-out figures flatter"


def _verdict(report: DataReport) -> str:
    if report.is_usable:
        return "\n".join(["USABLE: training may start.", *filter(None, [leak_text(report)])])
    return "\n".join(["NOT USABLE:", *(f"  {reason}" for reason in report.why_not)])
