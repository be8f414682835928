"""The privacy receipt as privacy.json, as a page, as lines for the terminal and in a model card."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.atomic import write_text
from latentdiff.audit.membership import FALSE_POSITIVE_RATE, Membership, most_exposed
from latentdiff.audit.privacy import CANARIES, MEMBERS, OTHERS, PrivacyReceipt
from latentdiff.evaluation.eval_set import read_real_images
from latentdiff.evaluation.metrics.bootstrap import Interval
from latentdiff.evaluation.report.html_report import write_evaluation_report
from latentdiff.evaluation.report.section import LabelledImage, ReportRow, Section, interval_json
from latentdiff.image_grid import to_pil

NUM_SHOWN = 16  # of the most exposed images
CARD_LABEL = "Membership inference"
CARD_TABLE = re.compile(r"^\| \| \|\n\|---\|---\|\n(?:\|.*\n)+", re.MULTILINE)
NOTE = (
    "Each image's loss is measured at the same timesteps and noise. The AUC is the chance that a "
    "training image has a lower one than a held-out image: 0.5 where the model tells nothing of "
    "what it was trained on, 1 where it tells all. The held-out images must be of the same kind, "
    "or their kind is what is told apart. A stronger attack may find more."
)


def write_privacy_receipt(receipt: PrivacyReceipt, out: Path, *, facts: dict[str, str]) -> Path:
    """Write out/privacy.json and out/privacy.html; return the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    figures = to_json(receipt) | {"settings": facts}
    write_text(out / "privacy.json", json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    sections = [_section(receipt), _exposed(receipt)]
    return write_evaluation_report(
        out / "privacy.html",
        title="Privacy receipt",
        facts=facts,
        sections=[*sections, *([receipt.copies] if receipt.copies else [])],
        skipped={} if receipt.copies else {"memorisation": "no image was generated"},
    )


def to_json(receipt: PrivacyReceipt) -> dict[str, Any]:
    """Return the figures, and the most exposed images, as JSON values."""
    parts = {"members": receipt.members, "canaries": receipt.canaries, "base": receipt.base}
    figures: dict[str, Any] = {
        name: _membership_json(one) for name, one in parts.items() if one is not None
    }
    figures["most_exposed"] = [
        {"id": receipt.folders[MEMBERS][i].id, "less_exposed_others": share}
        for i, share in _ranked(receipt)
    ]
    return figures | ({"copies": receipt.copies.figures} if receipt.copies else {})


def _membership_json(one: Membership) -> dict[str, Any]:
    return {
        "auc": interval_json(one.auc),
        "true_positives": interval_json(one.true_positives),
        "false_positive_rate": FALSE_POSITIVE_RATE,
        "p_value": one.p_value,
    }


def summary_lines(receipt: PrivacyReceipt) -> Iterator[str]:
    """Yield a line for each measure."""
    kinds = [("training images", receipt.members), (CANARIES, receipt.canaries)]
    kinds.append(("by the base model", receipt.base))
    for name, one in kinds:
        if one is not None:
            yield f"{name:17} {membership_text(one)}"
    if receipt.copies is not None:
        copies = receipt.copies.figures["copies"]
        low, high = (f"{copies[name]:.1%}" for name in ("low", "high"))
        yield f"{'copies':17} {copies['estimate']:.1%} [{low}, {high}] of the generated images"


def membership_text(one: Membership) -> str:
    """Return the AUC and the true-positive rate with their intervals."""
    auc, found = one.auc, one.true_positives
    return (
        f"AUC {auc.estimate:.3f} [{auc.low:.3f}, {auc.high:.3f}], {found.estimate:.1%} "
        f"[{found.low:.1%}, {found.high:.1%}] found at {FALSE_POSITIVE_RATE:.0%} false positives"
    )


def add_to_card(card: Path, receipt: PrivacyReceipt) -> None:
    """Write the receipt's line into a model card's first table, in place of an older one.

    FileNotFoundError or ValueError where there is no card or no table of two columns in it.
    """
    if not card.is_file():
        raise FileNotFoundError(f"{card} does not exist, expected the card of the model's folder")
    text = membership_text(receipt.members)
    if receipt.canaries is not None:
        text += f"; {CANARIES}: {membership_text(receipt.canaries)}"
    lines = card.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = "".join(line for line in lines if not line.startswith(f"| {CARD_LABEL} |"))
    if (table := CARD_TABLE.search(kept)) is None:
        raise ValueError(f"{card} has no table of two columns to write the result into")
    row = f"| {CARD_LABEL} | {text} |\n"
    write_text(card, kept[: table.end()] + row + kept[table.end() :])


def _section(receipt: PrivacyReceipt) -> Section:
    rows = [*_rows(receipt.members, "Training images", len(receipt.scores[OTHERS]))]
    if receipt.canaries is not None:
        rows += _rows(receipt.canaries, "Canaries", len(receipt.scores["twins"]))
    if receipt.base is not None:
        note = "which saw neither: 0.5 where both folders are of one kind"
        rows.append(ReportRow("AUC by the base model", receipt.base.auc, note))
    return Section("membership", "Membership inference", {}, rows, [NOTE])


def _rows(one: Membership, name: str, num_others: int) -> Iterator[ReportRow]:
    yield ReportRow(f"{name}: AUC", one.auc, f"against {num_others:,} that were never shown")
    allowed = int(FALSE_POSITIVE_RATE * num_others)
    note = f"above all but {allowed} of those" if allowed else "above all of those"
    found: Interval = one.true_positives
    yield ReportRow(
        f"{name}: found at {FALSE_POSITIVE_RATE:.0%} false positives", found, note, is_share=True
    )


def _ranked(receipt: PrivacyReceipt) -> list[tuple[int, float]]:
    return most_exposed(receipt.scores[MEMBERS], receipt.scores[OTHERS], num=NUM_SHOWN)


def _exposed(receipt: PrivacyReceipt) -> Section:
    ranked = _ranked(receipt)
    shown = receipt.folders[MEMBERS].select(np.array([i for i, _ in ranked]))
    images = read_real_images(shown, size=receipt.model.size)
    groups = [
        [
            LabelledImage(
                to_pil(image), caption, f"{name}: better known than {share:.0%} of those held out"
            )
        ]
        for image, caption, name, (_, share) in zip(
            images.bytes, images.captions, images.ids, ranked, strict=True
        )
    ]
    note = "The training images that the model knows best, next to the held-out images."
    return Section("exposed", "Most exposed images", {}, (), [note], groups, has_headline=False)
