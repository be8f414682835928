"""What can be proved of a run, for its page: bill of materials, privacy receipt, captions in bits.

Each is shown where its command has written it: `train`, `latentdiff audit`, `audit captions`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from latentdiff.html import render_template, table
from latentdiff.pipeline.files.model_info import BILL_NAME, CONTENT_NAME
from latentdiff.training.bill.bill import Bill
from latentdiff.training.bill.contents import bill_of_folder
from latentdiff.training.report.run_record import AUDIT, RunRecord

ROOT, MAX_HEAD = re.compile(r'"root": "([0-9a-f]{64})"'), 200  # characters, where a bill states it
NUM_CAPTIONS = 12  # of the page, the worst first
KINDS = {
    "members": "training images against held-out ones",
    "canaries": "canaries against their twins",
    "base": "the same images by the base model, which saw neither",
}
SCROLL = '<div class="scroll">{{ content }}</div>'
SOFT = '<p class="soft">{{ text }}</p>'
CONTENT = (
    """<details><summary>Summary of training content</summary><pre>{{ text }}</pre></details>"""
)


def receipt_facts(run: Path) -> Iterator[tuple[str, str]]:
    """Yield the root of a run's bill and what audits found, by their names."""
    if folders := _folders(run):
        with (folders[0] / BILL_NAME).open(encoding="utf-8") as file:  # it may list many images
            if found := ROOT.search(file.read(MAX_HEAD)):
                yield "root of its bill of materials", found[1]
    if (privacy := _json(run / AUDIT / "privacy.json")) is not None:
        yield "membership inference", f"AUC {_interval(privacy['members']['auc'])}"
    if (captions := _json(run / AUDIT / "captions.json")) is not None:
        counts = captions["verdicts"].items()
        yield "captions in bits", ", ".join(f"{num:,} {name}" for name, num in counts)


def receipt_sections(run: RunRecord) -> list[tuple[str, Markup]]:
    """Return title and content of each section; the content is empty where nothing is there."""
    return [
        ("What it was made of", _bill(run.folder)),
        ("What it betrays of its data", _privacy(run.folder)),
        ("Captions in bits", _captions(run.folder)),
    ]


def _folders(run: Path) -> list[Path]:
    """Return the exported folders that have a bill, pipeline/ before lora/."""
    return [path.parent for path in sorted(run.glob(f"*/{BILL_NAME}"), reverse=True)]


def _bills(run: Path) -> Iterator[tuple[Bill, str]]:
    """Yield the bill and the stated root of each exported folder."""
    for folder in _folders(run):
        try:
            found = bill_of_folder(folder)
        except (OSError, ValueError):  # which latentdiff verify explains
            continue
        if found is not None:
            yield found


def _bill(run: Path) -> Markup:
    bills = list(_bills(run))
    if not bills:
        return Markup()
    bill = bills[0][0]
    rows = [[f"root of {one.artifact}/", root] for one, root in bills]
    num = [f"{one.data['num_images']:,}" if one.data else "not recorded" for one in bill.segments]
    rows.append(["images", ", then ".join(num)])
    rows += [[f"base: {role}", _base(facts)] for role, facts in bill.last.base.items()]
    rows += [
        ["resumed with something changed", f"after step {one.from_step:,}"]
        for one in bill.segments[1:]
    ]
    body = render_template(SCROLL, content=table(["", ""], rows))
    content = run / bill.artifact / CONTENT_NAME
    if content.is_file():
        body += render_template(CONTENT, text=content.read_text(encoding="utf-8"))
    return body + _soft(
        f"latentdiff verify {run.name} --data DIR --root ROOT proves or refutes a folder. "
        "Integrity, not authorship: publish the root where it cannot be changed later."
    )


def _base(facts: Mapping[str, str]) -> str:
    return f"{facts['name']}, sha256 {facts['sha256'][:16] or 'not known'}"


def _privacy(run: Path) -> Markup:
    if (found := _json(run / AUDIT / "privacy.json")) is None:
        return Markup()
    rows = [
        [title, _interval(found[name]["auc"]), _interval(found[name]["true_positives"], share=True)]
        for name, title in KINDS.items()
        if name in found
    ]
    rate = found["members"]["false_positive_rate"]
    body = table(["", "AUC", f"found at {rate:.0%} false positives"], rows)
    if "copies" in found:
        copies = _interval(found["copies"]["copies"], share=True)
        body += _soft(f"Copies among generated images: {copies}.")
    return body + _soft(
        "0.5 where the model tells nothing, 1 where it tells all; an attacker who trains models of "
        "the same kind finds more. audit/privacy.html shows the most exposed images."
    )


def _captions(run: Path) -> Markup:
    if (found := _json(run / AUDIT / "captions.json")) is None:
        return Markup()
    worst = sorted(
        (one for one in found["captions"] if one["verdict"] != "fine"), key=lambda one: one["bits"]
    )
    rows = [
        [
            one["verdict"],
            f"{one['bits']:+.1f} ± {1.96 * one['se']:.1f}",
            one["id"],
            one["caption"],
            one.get("suggestion", ""),
        ]
        for one in worst[:NUM_CAPTIONS]
    ]
    counts = ", ".join(f"{num:,} {name}" for name, num in found["verdicts"].items())
    body = _soft(f"{counts}. audit/captions.html shows the images; nothing was changed.")
    if not rows:
        return body
    heads = ["", "bits", "image", "caption", "suggestion"]
    return body + table(heads, rows, classes=("", "n", "", "", "soft"))


def _interval(one: Mapping[str, float], *, share: bool = False) -> str:
    low, high, estimate = one["low"], one["high"], one["estimate"]
    if share:
        return f"{estimate:.1%} [{low:.1%}, {high:.1%}]"
    return f"{estimate:.3f} [{low:.3f}, {high:.3f}]"


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _soft(text: str) -> Markup:
    return render_template(SOFT, text=text)
