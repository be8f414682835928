"""`latentdiff report RUN [RUN ...]`: one page on a run, or on several next to each other.

It reads run folders, also while they are written, and changes nothing in them. One HTML file
without scripts or fetches: what a mail or a browser without network shows.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from latentdiff.atomic import write_text
from latentdiff.data.inspection.text_report import size_text
from latentdiff.html import page, render_template, table
from latentdiff.training.progress import duration_text
from latentdiff.training.report import curves
from latentdiff.training.report.charts import charts, rise_step
from latentdiff.training.report.receipts import receipt_facts, receipt_sections
from latentdiff.training.report.run_record import RunRecord, read_runs
from latentdiff.training.report.samples import STYLE as SAMPLES_STYLE
from latentdiff.training.report.samples import before_and_after, sheet_slider, side_by_side
from latentdiff.training.report.verdicts import verdict_facts, verdicts_section

NUM_EXAMPLES, NUM_FOLDERS = 5, 12
STYLE = (
    curves.STYLE
    + SAMPLES_STYLE
    + """
body { max-width: 82rem } .facts { display: grid; gap: .6rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)) }
.facts div { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .7rem;
  min-width: 0 }
.facts dt { opacity: .7; font-size: .8rem } .facts dd { margin: 0; font-weight: 600;
  overflow-wrap: anywhere } h2 { border-top: 1px solid var(--line); padding-top: 1rem }
.run > summary { font-size: 1.1rem; font-weight: 600; margin: 1.2rem 0 .4rem; overflow-wrap:
  anywhere } summary { cursor: pointer } .scroll { overflow-x: auto }
.scroll th { overflow-wrap: anywhere; min-width: 4.5rem }
.bad-text { color: var(--bad); font-weight: 600 } td.w { white-space: pre-line }
@media (max-width: 40rem) { .facts { grid-template-columns: repeat(2, 1fr) } }
"""
)
BODY = """\
<h1>{{ title }}</h1>{{ head }}
{% for name, content in sections if content %}<h2>{{ name }}</h2>{{ content }}{% endfor %}"""
FACTS = """\
<dl class="facts">{% for name, fact in facts.items() %}<div><dt>{{ name }}</dt>\
<dd>{{ fact }}</dd></div>{% endfor %}</dl>"""
RUN = """\
<details class="run"><summary>{{ name }}</summary>{{ facts }}
{% for title, content in sections if content %}<h2>{{ title }}</h2>{{ content }}{% endfor %}
</details>"""
DETAILS = "<details><summary>{{ title }}</summary>{{ content }}</details>"
SOFT = '<p class="soft">{{ text }}</p>'


def write_run_report(paths: Sequence[str], out: Path | None = None) -> Path:
    """Write the page on run folders; by default into the first, as report.html. Return its path.

    FileNotFoundError or ValueError for what is no run folder.
    """
    runs = read_runs(list(paths))
    path = out or runs[0].folder / ("report.html" if len(runs) == 1 else "comparison.html")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, run_report_html(runs))
    return path


def run_report_html(runs: Sequence[RunRecord]) -> str:
    """Lay out the page: one run in full, or what several share and differ in, then each in full."""
    title = " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"
    if len(runs) == 1:
        samples, *rest = _sections(runs[0], 0)
        first = ("Before and after", before_and_after(runs[0]))
        head, sections = _facts(runs[0]), [first, samples, ("Curves", charts(runs)), *rest]
    else:
        head = _scroll(_comparison(runs))
        each = [
            render_template(RUN, name=run.name, facts=_facts(run), sections=_sections(run, k))
            for k, run in enumerate(runs)
        ]
        sections = [
            ("Curves", charts(runs)),
            ("Settings that differ", _differences(runs)),
            (_samples_title(runs), side_by_side(runs)),
            ("Each run", Markup().join(each)),
        ]
    body = render_template(BODY, title=title, head=head, sections=sections)
    return page(f"{title}: training", body=body, style=STYLE)


def _samples_title(runs: Sequence[RunRecord]) -> str:
    has_one_seed = len({run.setting("train.seed") for run in runs}) == 1
    return "Same prompts, same seeds" if has_one_seed else "Same prompts"


def _sections(run: RunRecord, number: int) -> list[tuple[str, Markup]]:
    return [
        ("Samples", sheet_slider(run, name=f"run{number}")),
        ("When to stop", verdicts_section(run)),
        ("Plan and what was measured", _plan(run)),
        ("Data", _data(run)),
        *receipt_sections(run),
        ("Warnings", _warnings(run)),
        ("Settings", _settings(run)),
    ]


def facts_of(run: RunRecord) -> dict[str, str]:
    """Return what matters most of a run, in words, by its name."""
    heldout, errors = run.series("heldout_loss"), run.series("heldout_se")
    facts = {"status": run.status, "kind": run.kind}
    facts["steps"] = f"{run.last_step:,} of {run.max_steps:,}"
    if losses := run.series("loss").values:
        facts["loss, smoothed"] = f"{curves.smooth(losses)[-1]:.4f}"
    if heldout.values:
        error = f" ± {1.96 * errors.values[-1]:.4f}" if errors.values else ""
        facts["held-out loss"] = f"{heldout.values[-1]:.4f}{error}"
        best = min(range(len(heldout.values)), key=heldout.values.__getitem__)
        facts["lowest held-out loss"] = (
            f"{heldout.values[best]:.4f}, step {heldout.steps[best]:,.0f}"
        )
    facts |= verdict_facts(run)
    if uses := run.series("condition_use").values:
        step = rise_step(run)
        since = "not above 0 yet" if step is None else f"above 0 from step {step:,} on"
        facts["condition use"] = f"{uses[-1]:.3f}, {since}"
    if run.training_seconds:
        facts["training time"] = duration_text(run.training_seconds)
        num_images = run.images_per_step * run.last_step
        facts["mean speed"] = f"{num_images / run.training_seconds:.3g} images/s"
    if memory := run.series("memory_gb").values:
        facts["peak memory"] = f"{max(memory):.2f} GB"
    return facts | dict(receipt_facts(run.folder))


def _facts(run: RunRecord) -> Markup:
    return render_template(FACTS, facts=facts_of(run))


def _comparison(runs: Sequence[RunRecord]) -> Markup:
    """Lay out the runs' facts, a column each."""
    facts = [facts_of(run) for run in runs]
    names = list(dict.fromkeys(name for one in facts for name in one))
    rows = [[name, *(one.get(name, "") for one in facts)] for name in names]
    return table(["", *(run.name for run in runs)], rows)


def _differences(runs: Sequence[RunRecord]) -> Markup:
    """Lay out the settings that are not the same in all runs, without names of output folders."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    values = {name: [_text(run.settings.get(name, "")) for run in runs] for name in names}
    rows = [
        [_name(name), *found]
        for name, found in values.items()
        if len(set(found)) > 1 and name != "output_dir"
    ]
    if not rows:
        return _soft("None but the output folder.")
    return _scroll(table(["setting", *(run.name for run in runs)], rows))


def _plan(run: RunRecord) -> Markup:
    """Put the plan next to the measured: steps, images, time, speed, memory."""
    steps = run.plan.get("steps", {})
    rows = [["steps", f"{run.max_steps:,}", f"{run.last_step:,}"]]
    if per_epoch := steps.get("steps_per_epoch"):
        rows.append(["epochs", *(f"{n / per_epoch:,.4g}" for n in (run.max_steps, run.last_step))])
    num_images = [f"{n * run.images_per_step:,.0f}" for n in (run.max_steps, run.last_step)]
    rows.append(["images seen", *num_images])
    speeds = run.series("images_per_second").values
    if speeds and speeds[0] > 0:
        total = run.max_steps * run.images_per_step / speeds[0]
        rows.append(["time in steps", duration_text(total), duration_text(run.training_seconds)])
        rows.append(
            ["images per second", f"{speeds[0]:.3g}", f"{min(speeds):.3g} to {max(speeds):.3g}"]
        )
    if run.wall_seconds is not None:
        rows.append(
            ["time in all, with sheets and evaluation", "", duration_text(run.wall_seconds)]
        )
    if waits := run.series("data_wait").values:
        rows.append(["share of it waiting for data", "", f"{sum(waits) / len(waits):.1%}"])
    memory = run.plan.get("memory", {})
    if known := sum(memory.get(name) or 0 for name in MEMORY_PARTS):
        peak = max(run.series("memory_gb").values, default=0.0)
        rows.append(["memory", f"{size_text(known)}, tensors alone", f"{peak:.2f} GB at its peak"])
    notes = [
        "Time and images per second are planned from the first logged steps."
        if speeds
        else "No steps were logged.",
        *(_memory_notes(run, memory) if memory else []),
    ]
    return table(["", "planned", "measured"], rows) + _soft(" ".join(notes))


MEMORY_PARTS = ("weights", "gradients", "optimizer", "averages", "activations")


def _memory_notes(run: RunRecord, memory: Mapping[str, Any]) -> list[str]:
    """Say what the plan's memory consists of, and what a CPU's peak has besides."""
    parts = [f"{name} {size_text(memory[name])}" for name in MEMORY_PARTS if memory.get(name)]
    notes = [f"Planned memory: {', '.join(parts)}."]
    if run.plan.get("device") == "cpu":
        notes.append("The peak on the CPU is of the whole process, its libraries included.")
    return [*notes, f"Parameters: {'; '.join(run.plan.get('parameters', []))}."]


def _data(run: RunRecord) -> Markup:
    """List a run's images by split, sub-folder and source, and the folder's problems."""
    data = run.plan.get("data")
    if not data:
        return Markup("")
    splits = ", ".join(f"{num:,} {name}" for name, num in data["splits"].items())
    folders = list(data["subfolders"].items())
    shown = ", ".join(f"{num:,} in {name}" for name, num in folders[:NUM_FOLDERS])
    more = f" and {len(folders) - NUM_FOLDERS} more folders" if len(folders) > NUM_FOLDERS else ""
    sources = data.get("sources") or []
    body = render_template(
        "<p>{{ root }}: {{ splits }}.{{ where }}</p>",
        root=f"{len(sources)} sources" if sources else _text(run.setting("data.root")),
        splits=splits,
        where=f" Training images: {shown}{more}." if len(folders) > 1 else "",
    )
    body += _scroll(_sources(sources)) if sources else ""
    rows = [
        [
            problem["severity"],
            f"{problem['count']:,}",
            render_template(
                '{{ title }}{% if fix %}<br><span class="soft">{{ fix }}</span>{% endif %}',
                title=problem["title"],
                fix=problem["fix"],
            ),
            "; ".join(": ".join(filter(None, example)) for example in problem["examples"]),
        ]
        for problem in data["problems"]
    ]
    if not rows:
        return body + _soft("Nothing was refused or skipped.")
    return body + table(["", "files", "reason", "such as"], rows, classes=("", "n", "", "soft"))


def _sources(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Lay out the images of each source, and its share of the samples of an epoch."""
    total = max(1, sum(row["samples_per_epoch"] for row in rows))
    counts = ("train", "held out", "samples_per_epoch")
    cells = [
        [row["root"], *(f"{row[name]:,}" for name in counts), f"{row[counts[-1]] / total:.0%}"]
        for row in rows
    ]
    heads = ["source", "training images", "held out", "samples an epoch", "share"]
    return table(heads, cells, classes=("", "n", "n", "n", "n"))


def _warnings(run: RunRecord) -> Markup:
    """List what was logged as a warning or an error, each once, with its time and number."""
    found = [entry for entry in run.log if entry.level in ("WARNING", "ERROR", "CRITICAL")]
    if not found:
        return _soft("None was logged." if run.log else "This run has no log.txt.")
    by_message: dict[str, list[Any]] = {}
    for entry in found:
        by_message.setdefault(entry.message, []).append(entry)
    rows = [
        [
            f"{entries[0].time:%d %B %H:%M}",
            entries[0].level.lower() + (f", {len(entries)} times" if len(entries) > 1 else ""),
            message,
        ]
        for message, entries in by_message.items()
    ]
    return table(["first", "", "message"], rows, classes=("", "", "w"))


def _settings(run: RunRecord) -> Markup:
    """List the settings that differ from their defaults, and all of them by section."""
    changed = [
        [_name(name), _text(value), _text(run.defaults[name])]
        for name, value in run.settings.items()
        if value != run.defaults[name]
    ]
    body = table(["differs from the default", "value", "default"], changed)
    sections: dict[str, list[list[str | Markup]]] = {}
    for name, value in run.settings.items():
        section = name.partition(".")[0] if "." in name else "run"
        sections.setdefault(section, []).append([_name(name), _text(value)])
    for section, rows in sections.items():
        title = f"all of {section} ({len(rows)})"
        body += render_template(DETAILS, title=title, content=table(["setting", "value"], rows))
    return body


def _name(setting: str) -> Markup:
    """Let a setting's name break at its dots and underscores."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(setting))))


def _text(value: Any) -> str:
    """Write a setting's value as YAML would, in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _soft(text: str) -> Markup:
    return render_template(SOFT, text=text)


def _scroll(content: Markup) -> Markup:
    return render_template('<div class="scroll">{{ content }}</div>', content=content)
