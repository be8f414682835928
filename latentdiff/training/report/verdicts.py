"""When to stop, as the report shows it: each evaluation's verdict, the chosen step, its regret."""

from typing import Any

from markupsafe import Markup

from latentdiff.html import render_template, table
from latentdiff.training.report.run_record import RunRecord

NUM_ROWS = 40  # evaluations shown, the newest
SOFT = '<p class="soft">{{ text }}</p>'
COLUMNS = ("after step", "verdict", "change", "95 % interval", "against step", "best step so far")
NOTE = (
    "Change: {measure} less that of the best step before, over {pairs} pairs measured at both. "
    "Gaining: below the last step that gained, by an interval that excludes 0. Overfitting: above "
    "the best step so{drift}. Flat: neither."
)
DRIFT = ", or with more drift and no gain"


def verdict_facts(run: RunRecord) -> dict[str, str]:
    """Return the last verdict and the chosen step's regret, in words, by name."""
    if not (rows := _rows(run)):
        return {}
    last = rows[-1]
    facts = {"verdict": f"{last['verdict']}, after step {last['step']:,}"}
    if "stop_step" in last:
        facts["stop here"] = f"step {last['chosen_step']:,.0f}, known at {last['stop_step']:,.0f}"
        more = ", nothing measured after it" if last["step"] == last["stop_step"] else ""
        facts["regret of it"] = f"{last['regret']:.4f} {_interval(last, 'regret')}{more}"
    return facts


def verdicts_section(run: RunRecord) -> Markup:
    """Lay out the verdicts of a run, newest last; empty where it has none."""
    if not (rows := _rows(run)):
        return Markup("")
    last = rows[-1]
    body = table(
        COLUMNS,
        [
            [
                f"{row['step']:,}",
                row["verdict"],
                f"{row['change']:+.4f}",
                _interval(row, "change"),
                f"{row['change_since_step']:,.0f}",
                f"{row['best_step']:,.0f}",
            ]
            for row in rows[-NUM_ROWS:]
        ],
        classes=("n", "", "n", "n", "n", "n"),
    )
    measure = last["verdict_measure"]
    texts = [_stop_text(last)]
    note = NOTE.format(
        measure=measure,
        pairs=f"{last.get('num_pairs', 0):,.0f}",
        drift="" if measure == "held-out loss" else DRIFT,
    )
    for text in (*texts, note):
        body = body + render_template(SOFT, text=text)
    return body


def _stop_text(last: dict[str, Any]) -> str:
    if "stop_step" not in last:
        return "No evaluation so far says that training should stop."
    known, chosen = (f"{last[name]:,.0f}" for name in ("stop_step", "chosen_step"))
    text = (
        f"After step {known} the verdicts said stop, and step {chosen} was the best. Its regret, "
        f"how much more it costs than the best step in hindsight: {last['regret']:.4f} "
        f"{_interval(last, 'regret')}."
    )
    if last["step"] == last["stop_step"]:
        text += (
            " Nothing was measured after it: --train.stop=never, then the same command, trains on "
            "and tells."
        )
    return text


def _rows(run: RunRecord) -> list[dict[str, Any]]:
    return [row for row in run.rows if row.get("verdict")]


def _interval(row: dict[str, Any], name: str) -> str:
    return f"[{row[f'{name}_low']:+.4f}, {row[f'{name}_high']:+.4f}]"
