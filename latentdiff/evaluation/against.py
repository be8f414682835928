"""Is a model better than another one? Both drew the same captions from the same seeds."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from latentdiff.evaluation.compare import MIN_PAIRS, compare
from latentdiff.evaluation.drawing import Drawn, to_image
from latentdiff.evaluation.sections import Row, Score, Section, Shown, plain_interval

NUM_SHOWN = 12


def against_section(
    name: str,
    first: Mapping[str, Score],
    second: Mapping[str, Score],
    *,
    pictures: tuple[Drawn, Drawn] | None,
    left_out: Mapping[str, str],
) -> Section:
    """Compare the first model's scores with those of the second, which is called `name`.

    left_out: why a score cannot be compared, by its key.
    """
    figures: dict[str, Any] = {"other": name, "left_out": dict(left_out)}
    rows = []
    for key, score in first.items():
        if key in left_out or key not in second:
            continue
        result = compare(score.values, second[key].values, higher_is_better=score.higher_is_better)
        figures[key] = asdict(result) | {"difference": plain_interval(result.difference)}
        note = f"{result.num_wins} won, {result.num_losses} lost of {len(score.values)}"
        better = "more" if score.higher_is_better else "less"
        label = f"Against the other, {score.name}: {result.verdict}"
        rows.append(Row(label, result.difference, f"{note}; {better} is better"))
    notes = [
        f"This model less {name}, pair by pair on the same captions, seeds, timesteps and noise. "
        "“Cannot tell” where the interval holds 0, or where there are fewer than "
        f"{MIN_PAIRS} pairs."
    ]
    notes += [f"Not compared: {key}, because {why}." for key, why in left_out.items()]
    groups = [] if pictures is None else _pairs(*pictures)
    return Section("compare", f"Against {name}", figures, rows, notes, groups)


def _pairs(first: Drawn, second: Drawn) -> list[list[Shown]]:
    count = len(first.captions)
    places = sorted({round(i * (count - 1) / (NUM_SHOWN - 1)) for i in range(NUM_SHOWN)})
    return [
        [
            Shown(to_image(drawn.bytes[m, 0]), first.captions[m], label)
            for drawn, label in ((first, "this model"), (second, "the other"))
        ]
        for m in places
    ]
