"""The audit of captions as captions.json, as a page and as lines for the terminal.

The page shows the worst of each verdict; the file has every caption.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.atomic import write_text
from latentdiff.audit.caption_bits import KEPT_SHARE, CaptionAudit, CaptionValue, Verdict
from latentdiff.evaluation.eval_set import read_real_images
from latentdiff.evaluation.metrics.bootstrap import Interval, bootstrap_mean
from latentdiff.evaluation.report.html_report import write_evaluation_report
from latentdiff.evaluation.report.section import LabelledImage, ReportRow, Section, interval_json
from latentdiff.html import printable
from latentdiff.image_grid import to_pil

NUM_SHOWN, NUM_LINES = 24, 10  # captions of a verdict on the page, and in the terminal
TITLES: dict[Verdict, str] = {
    "wrong": "Probably wrong",
    "identity leak": "Other words carry the subject",
    "says nothing": "Empty of use",
}
NOTES: dict[Verdict, str] = {
    "wrong": "With its caption the model knows less of the image than with none. The worst first; "
    "of correct captions that are worth nothing one in 40 is listed here by chance.",
    "identity leak": f"More than {KEPT_SHARE:.0%} of the caption's bits stay without the trigger "
    "word: the model will draw the subject for these words too.",
    "says nothing": "The interval holds zero: the model draws the image as well with no caption.",
}


def write_caption_audit(audit: CaptionAudit, out: Path, *, facts: dict[str, str]) -> Path:
    """Write out/captions.json and out/captions.html; return the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(audit) | {"settings": facts}, indent=2, ensure_ascii=False)
    write_text(out / "captions.json", text + "\n")
    return write_evaluation_report(
        out / "captions.html",
        title="Captions in bits",
        facts=facts,
        sections=[_summary(audit), *_sections(audit)],
        skipped={},
    )


def to_json(audit: CaptionAudit) -> dict[str, Any]:
    """Return the counts of verdicts, every caption in the folder's order, and the words."""
    return {
        "verdicts": {name: len(audit.of(name)) for name in (*TITLES, "fine")},
        "captions": [_caption_json(one) for one in audit.captions],
        "words": [{"word": word} | interval_json(lost) for word, lost in audit.words],
    }


def _caption_json(one: CaptionValue) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": one.id,
        "caption": one.caption,
        "verdict": one.verdict,
        "bits": one.bits.estimate,
        "se": one.se,
        "interval": [one.bits.low, one.bits.high],
    }
    if one.without_trigger is not None:
        entry["bits_without_trigger"] = one.without_trigger.estimate
    return entry | ({"suggestion": one.suggestion} if one.suggestion else {})


def summary_lines(audit: CaptionAudit) -> Iterator[str]:
    """Yield the counts, and a line for each of the worst captions."""
    num = len(audit.captions)
    counts = [f"{len(audit.of(name))} {name}" for name in (*TITLES, "fine")]
    yield f"{num:,} captions: {', '.join(counts)}"
    for name in TITLES:
        found = audit.of(name)
        for one in found[:NUM_LINES]:
            yield f'{name:13} {bits_text(one)}  {one.id}  "{printable(one.caption)}"'
            if one.suggestion:
                yield f"{'':13} {printable(one.suggestion)}"
        if len(found) > NUM_LINES:
            yield f"{'':13} and {len(found) - NUM_LINES:,} more, in the report"
    if audit.words:
        shown = ", ".join(f"{printable(word)} {lost.estimate:+.1f}" for word, lost in audit.words)
        yield f"bits of other words: {shown}"


def bits_text(one: CaptionValue) -> str:
    """Return a caption's value with its interval, and what stays without the trigger word."""
    text = f"{one.bits.estimate:+.1f} bits [{one.bits.low:+.1f}, {one.bits.high:+.1f}]"
    if one.without_trigger is not None:
        text += f", {one.without_trigger.estimate:+.1f} without the trigger word"
    return text


def _summary(audit: CaptionAudit) -> Section:
    rows = []
    if len(audit.captions) > 1:
        rows.append(ReportRow("Bits a caption", _mean(one.bits for one in audit.captions)))
        without = [one.without_trigger for one in audit.captions if one.without_trigger]
        if without:
            rows.append(ReportRow("Without the trigger word", _mean(iter(without))))
    titles: Sequence[tuple[Verdict, str]] = [*TITLES.items(), ("fine", "Fine")]
    rows += [ReportRow(title, f"{len(audit.of(name)):,}") for name, title in titles]
    rows += [
        ReportRow(f'Bits of "{word}"', lost, "lost without it, the trigger word being out already")
        for word, lost in audit.words
    ]
    note = (
        "A caption's value is the model's loss on its image without a caption less the loss with "
        "it: the variational bound, in bits. Nothing in the folder was changed."
    )
    return Section("summary", "All captions", {}, rows, [note], has_headline=False)


def _mean(values: Iterator[Interval]) -> Interval:
    return bootstrap_mean([one.estimate for one in values])


def _sections(audit: CaptionAudit) -> Iterator[Section]:
    place = {one.id: i for i, one in enumerate(audit.captions)}
    for name, title in TITLES.items():
        shown = audit.of(name)[:NUM_SHOWN]
        if not shown:
            continue
        folder = audit.model.folder.select(np.array([place[one.id] for one in shown]))
        images = read_real_images(folder, size=audit.model.size).bytes
        groups = [
            [LabelledImage(to_pil(image), one.caption, f"{bits_text(one)}; {one.suggestion}")]
            for image, one in zip(images, shown, strict=True)
        ]
        yield Section(name, title, {}, (), [NOTES[name]], groups, has_headline=False)
