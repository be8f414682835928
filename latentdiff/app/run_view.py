"""A training run as the page shows it, live and read only: status, time left, sheets, curves, log.

The figures and charts are those of `latentdiff report` (training/report/).
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from markupsafe import Markup

from latentdiff.app.page_html import status_html
from latentdiff.html import render_template
from latentdiff.training.report import curves, samples
from latentdiff.training.report.charts import charts
from latentdiff.training.report.receipts import receipt_facts
from latentdiff.training.report.run_record import RunRecord, read_run
from latentdiff.training.report.verdicts import verdict_facts

LOCK, HOLDER = ".lock", re.compile(r"process (\d+) on (.*)")
WATCHED = (LOCK, "metrics.jsonl", "log.txt", "samples", "pipeline", "checkpoints", "audit")
NUM_LOG_LINES = 12
RECEIPTS = {  # of training/report/receipts.py, in fewer words
    "root of its bill of materials": "Root, for latentdiff verify",
    "membership inference": "Membership inference (audit)",
    "captions in bits": "Captions (audit)",
}
STYLE = f"""
.run {{ --line: var(--border-color-primary); --soft: var(--background-fill-secondary);
  {curves.STYLE} {samples.STYLE} .grid {{ display: grid; gap: .8rem }}
  .panels > :not(.grid) {{ margin: 0 }} figure {{ margin: 0 }} .soft {{ opacity: .7;
  font-size: .85rem }} img {{ max-width: 100%; height: auto }} h3 {{ font-weight: 600 }}
  figcaption {{ font-size: .75rem; line-height: 1.3; overflow-wrap: anywhere }}
  pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-size: .8rem }}
  .status {{ font-weight: 600 }} summary {{ cursor: pointer }}
  dd {{ overflow-wrap: anywhere }} }}
"""
_RUN = """\
<div class="run">{{ status }}<div class="facts"><dl>{% for label, value in facts %}\
<div><dt>{{ label }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl></div>
{% if sheets %}<h3>Samples</h3>{{ sheets }}{% else %}<p class="soft">No samples yet</p>{% endif %}
{{ charts }}{% if log %}<details><summary>Last lines of the log</summary><pre>{{ log }}</pre>\
</details>{% endif %}</div>"""


@dataclass(frozen=True)
class RunProgress:
    """How far a run is. seconds_left: of its steps alone, None where it is not running."""

    is_running: bool
    text: str
    step: int
    max_steps: int
    seconds_left: float | None = None


def fingerprint(folder: Path) -> tuple[float, ...]:
    """Return what changes whenever a run has written something that the page shows."""
    paths = [folder / name for name in WATCHED]
    return tuple(path.stat().st_mtime if path.exists() else 0.0 for path in paths)


def run_html(folder: Path, name: str) -> str:
    """Return a run's part of the page; a sentence where the folder cannot be read (yet)."""
    try:
        run = read_run(folder, name)
    except (ValueError, OSError) as error:
        return status_html(str(error), kind="error")
    progress = progress_of(run)
    bar = {"value": progress.step, "maximum": progress.max_steps} if progress.is_running else {}
    status = status_html(progress.text, kind="running" if progress.is_running else "", **bar)
    lines = [f"{entry.time:%H:%M:%S} {entry.message}" for entry in run.log[-NUM_LOG_LINES:]]
    return render_template(
        _RUN,
        status=Markup(status),
        facts=list(latest_figures(run).items()),
        sheets=samples.sheet_slider(run, name="sheets"),
        charts=charts([run]),
        log=Markup("\n").join(lines),
    )


def progress_of(run: RunRecord) -> RunProgress:
    """Return how far a run is, and whether a process is at work on it."""
    step, num = run.last_step, run.max_steps
    if not is_held(run.folder):
        status = run.status
        if status.startswith("running"):
            status = f"ended by a kill after step {step:,} of {num:,}; the same command continues"
        return RunProgress(False, status[:1].upper() + status[1:], step, num)
    speeds = run.series("images_per_second").values
    left = (num - step) * run.images_per_step / speeds[-1] if speeds and speeds[-1] > 0 else None
    text = f"Running: step {step:,} of {num:,}"
    if left is not None:
        end = time.strftime("%H:%M", time.localtime(time.time() + left))
        text += f", about {left // 3600:.0f}:{left % 3600 // 60:02.0f} h left, until {end}"
    return RunProgress(True, text, step, num, left)


def is_held(folder: Path) -> bool:
    """Return whether a process is at work on a run; one of another machine is taken for alive."""
    lock = folder / LOCK
    text = lock.read_text(encoding="utf-8", errors="replace") if lock.is_file() else ""
    if (match := HOLDER.fullmatch(text.strip())) is None:
        return False
    return match[2] != socket.gethostname() or psutil.pid_exists(int(match[1]))


def latest_figures(run: RunRecord) -> Mapping[str, str]:
    """Return the newest figures of a run by label."""
    names = {
        "Loss": ("loss", "{:.4f}"),
        "Held-out loss": ("heldout_loss", "{:.4f}"),
        "Images/s": ("images_per_second", "{:.3g}"),
        "Learning rate": ("learning_rate", "{:.3g}"),
        "Memory": ("memory_gb", "{:.1f} GB"),
    }
    found = {label: (run.series(name).values, form) for label, (name, form) in names.items()}
    figures = {label: form.format(values[-1]) for label, (values, form) in found.items() if values}
    if verdict := verdict_facts(run).get("verdict"):
        figures["Verdict"] = verdict
    data = run.setting("data.root")
    figures |= {"Data": Path(str(data)).name} if data else {}
    return figures | {RECEIPTS[name]: text for name, text in receipt_facts(run.folder)}
