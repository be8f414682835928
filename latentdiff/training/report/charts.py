"""Which curves a report shows of one run or of several, overlaid."""

from collections.abc import Callable, Sequence
from itertools import pairwise

from markupsafe import Markup

from latentdiff.html import render_template
from latentdiff.training.report.curves import COLORS, Curve, chart, smooth
from latentdiff.training.report.run_record import RunRecord

Z_95 = 1.96
KNOWN = (  # figures that have a chart of their own, or a part in one
    *("loss", "heldout_loss", "heldout_se", "train_loss_fixed", "train_se_fixed"),
    *("condition_use", "condition_use_se", "condition_match", "condition_match_se"),
    *("similarity", "similarity_se", "drift", "drift_se", "best_step", "chosen_step", "stop_step"),
    *("change", "change_low", "change_high", "change_since_step", "num_pairs"),
    *("regret", "regret_low", "regret_high"),
    *("learning_rate", "images_per_second", "memory_gb", "grad_norm", "num_heldout", "step"),
)
BY_TIMESTEP = "loss/t"
CONDITION_NOTE = "Share of the held-out loss that the image condition saves; bars: 95 % interval."


def charts(runs: Sequence[RunRecord]) -> Markup:
    """Lay out the charts of runs; a single run has its raw loss and all other figures too."""
    shown = [_loss(runs), _heldout(runs), *_of_samples(runs), _condition_use(runs)]
    if len(runs) == 1:
        shown.append(_by_timestep(runs[0]))
    for name, title, from_zero in (
        ("learning_rate", "Learning rate", True),
        ("images_per_second", "Images per second", True),
        ("memory_gb", "Peak memory (GB)", True),
        ("grad_norm", "Gradient norm", True),
    ):
        shown.append(chart(title, _one_each(runs, name), from_zero=from_zero))
    body = _grid(shown)
    if others := [chart(name, _one_each(runs, name)) for name in _other_names(runs)]:
        body += render_template(
            "<details><summary>{{ num }} more figures</summary>{{ charts }}</details>",
            num=len(others),
            charts=_grid(others),
        )
    return body


def _loss(runs: Sequence[RunRecord]) -> Markup:
    curves = []
    for k, run in enumerate(runs):
        steps, losses = run.series("loss")
        if len(runs) == 1:
            curves.append(Curve("each log line", steps, losses, _color(0), "raw"))
        label = run.name if len(runs) > 1 else "smoothed"
        curves.append(Curve(label, steps, smooth(losses), _color(k)))
    return chart("Training loss", curves, note="Smoothed: running mean of about 5 % of the lines.")


def _heldout(runs: Sequence[RunRecord]) -> Markup:
    curves = []
    for k, run in enumerate(runs):
        label = run.name if len(runs) > 1 else "held-out images"
        curves.append(_with_interval(run, "heldout_loss", "heldout_se", label, k))
        if len(runs) == 1:
            trained = _with_interval(
                run, "train_loss_fixed", "train_se_fixed", "training images", 1
            )
            curves.append(trained)
    note = "On the same images, timesteps and noise each time; bars: 95 % interval."
    return chart("Held-out loss", curves, note=note)


def _of_samples(runs: Sequence[RunRecord]) -> list[Markup]:
    """Draw how like the subject generated images are, and how far unrelated prompts drifted."""
    return [
        chart(
            title,
            [
                _with_interval(run, name, f"{name}_se", run.name if len(runs) > 1 else "", k)
                for k, run in enumerate(runs)
            ],
            note="On images of the same prompts and seeds each time; bars: 95 % interval.",
        )
        for name, title in (
            ("similarity", "Similarity to the training images"),
            ("drift", "Drift of unrelated prompts"),
        )
    ]


def _condition_use(runs: Sequence[RunRecord]) -> Markup:
    """Draw how much the held-out loss gains by the true condition over none and another image's."""
    curves = []
    for k, run in enumerate(runs):
        label = run.name if len(runs) > 1 else "over none"
        curves.append(_with_interval(run, "condition_use", "condition_use_se", label, k))
        if len(runs) == 1:
            other = "over another image's"
            curves.append(_with_interval(run, "condition_match", "condition_match_se", other, 1))
    note = " ".join(filter(None, [rise_text(runs[0]) if len(runs) == 1 else "", CONDITION_NOTE]))
    return chart("Condition use", curves, from_zero=True, note=note)


def rise_step(run: RunRecord) -> int | None:
    """Return the first step from which on the condition use stays above 0 with its interval."""
    steps, uses = run.series("condition_use")
    errors = run.series("condition_use_se").values
    if len(errors) != len(uses):
        return None
    rises = [use > Z_95 * error > 0 for use, error in zip(uses, errors, strict=True)]
    first = len(rises) - next((k for k, rose in enumerate(reversed(rises)) if not rose), len(rises))
    return int(steps[first]) if first < len(rises) else None


def rise_text(run: RunRecord) -> str:
    """Say when a model began to use its condition, and where that rose most; "" without one."""
    steps, uses = run.series("condition_use")
    if not uses:
        return ""
    if (step := rise_step(run)) is None:
        return "Not above 0 with its interval so far: the model ignores its condition."
    text = f"Above 0 with its interval from step {step:,} on."
    if len(uses) > 1:
        gains = [after - before for before, after in pairwise(uses)]
        k = max(range(len(gains)), key=gains.__getitem__)
        between = f"from step {steps[k]:,.0f} to {steps[k + 1]:,.0f}"
        text += f" The largest rise is {between}, by {gains[k]:.3f}."
    return text


def _with_interval(run: RunRecord, name: str, error: str, label: str, color: int) -> Curve:
    steps, values = run.series(name)
    errors = run.series(error).values
    half = [Z_95 * one for one in errors] if len(errors) == len(values) else ()
    return Curve(label, steps, values, _color(color), "points", half)


def _by_timestep(run: RunRecord) -> Markup:
    names = _names([run], lambda name: name.startswith(BY_TIMESTEP))
    curves = []
    for k, name in enumerate(sorted(names)):
        steps, values = run.series(name)
        label = f"t in {name.removeprefix(BY_TIMESTEP).replace('-', '..')}"
        curves.append(Curve(label, steps, smooth(values), _color(k)))
    return chart("Training loss by timestep, smoothed", curves)


def _one_each(runs: Sequence[RunRecord], name: str) -> list[Curve]:
    return [
        Curve(run.name if len(runs) > 1 else "", *run.series(name), color=_color(k))
        for k, run in enumerate(runs)
    ]


def _other_names(runs: Sequence[RunRecord]) -> list[str]:
    """Return the figures that no chart has, where a run has two of them or more."""

    def is_other(name: str) -> bool:
        known = (
            name in KNOWN or name.startswith(BY_TIMESTEP) or name.partition("/")[0].endswith("_se")
        )
        return not known and any(len(run.series(name).steps) > 1 for run in runs)

    return _names(runs, is_other)


def _names(runs: Sequence[RunRecord], keeps: Callable[[str], bool]) -> list[str]:
    found = dict.fromkeys(name for run in runs for row in run.rows for name in row)
    return [name for name in found if keeps(name)]


def _color(k: int) -> int:
    return k % len(COLORS)


def _grid(shown: Sequence[Markup]) -> Markup:
    return render_template('<div class="charts">{{ charts }}</div>', charts=Markup().join(shown))
