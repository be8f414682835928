"""Whether generated images show their captions' scenes, by the judge of the shapes world."""

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from latentdiff.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PAIR_SIZES,
    RELATIONS,
    Scene,
    all_scenes,
)
from latentdiff.evaluation.generate import GeneratedImages
from latentdiff.evaluation.metrics.shapes_judge import SceneReading, follows, judge_image
from latentdiff.evaluation.report.section import (
    PairedScore,
    ReportRow,
    Section,
    derangement,
    interval_json,
    share_by_caption,
)
from latentdiff.image_grid import to_pil


@dataclass(frozen=True, eq=False)
class Answers:
    """Which images of M captions show their captions' attributes, by attribute and for "all"."""

    shown: dict[str, Tensor]  # (M, K) bool
    named: dict[str, Tensor]  # (M,) bool, the captions that name the attribute


def prompt_following_section(
    sets: dict[str, GeneratedImages], *, seed: int, is_heldout: bool = True
) -> tuple[Section, dict[str, PairedScore]]:
    """Score sets of images by name, such as those of seen and of held-out combinations.

    All captions must be scenes. Chance is the score with the captions shuffled within their set.
    is_heldout: whether the set named heldout is of a held-out split, and is called so.
    """
    figures: dict[str, Any] = {}
    rows, scores = [], {}
    for name, generated in sets.items():
        readings = [[judge_image(to_pil(one)) for one in some] for some in generated.bytes]
        scenes = [scene_of(caption) for caption in generated.captions]
        other = [scenes[i] for i in derangement(len(scenes), seed=seed).tolist()]
        true, chance = (_answers(readings, wanted) for wanted in (scenes, other))
        figures[name] = _figures(true) | {"shuffled_captions": _figures(chance)}
        figures[name] |= {"num_captions": len(scenes), "num_images": len(generated.flat)}
        title = name.replace("heldout", "held-out" if is_heldout else "these")
        for attribute in sorted(true.shown, key=lambda one: one != "all"):
            share = _share(true, attribute)
            note = f"chance {_share(chance, attribute).estimate:.1%}"
            label = "everything right" if attribute == "all" else attribute.replace("_", " ")
            rows.append(
                ReportRow(f"{title.capitalize()} captions: {label}", share, note, is_share=True)
            )
        label = f"{title.capitalize()} captions, shuffled: everything right"
        rows.append(
            ReportRow(label, _share(chance, "all"), f"{len(generated.flat)} images", is_share=True)
        )
        values = true.shown["all"].double().mean(1)
        scores[name] = PairedScore(
            f"everything right, {title} captions", values, higher_is_better=True
        )
    unseen = "Held-out combinations of attributes are in no training image. " if is_heldout else ""
    notes = [
        "Read back by geometry and colour alone, without a network. "
        f"{unseen}Intervals are over captions."
    ]
    section = Section("following", "Prompt following (shapes)", figures, rows, notes)
    return section, scores


def scene_of(caption: str) -> Scene:
    """Return the scene that a caption of the shapes world describes. KeyError for another text."""
    return _scenes()[caption]


def is_scene(caption: str) -> bool:
    """Tell whether a caption is of the shapes world."""
    return caption in _scenes()


@cache
def _scenes() -> dict[str, Scene]:
    """Return all scenes of one and of two shapes by their captions."""
    shape = KINDS, COLOURS, PAIR_SIZES
    parts = product(*shape, BACKGROUNDS, RELATIONS, *shape)
    return {scene.caption: scene for scene in (*all_scenes(), *(Scene(*one) for one in parts))}


def _answers(readings: list[list[SceneReading]], scenes: list[Scene]) -> Answers:
    found = [
        [follows(reading, scene) for reading in some]
        for some, scene in zip(readings, scenes, strict=True)
    ]
    names = list(dict.fromkeys(name for some in found for name in some[0]))
    shown = {
        n: torch.tensor([[one.get(n, False) for one in some] for some in found]) for n in names
    }
    return Answers(shown, {n: torch.tensor([n in some[0] for some in found]) for n in names})


def _share(answers: Answers, attribute: str) -> Any:
    return share_by_caption(answers.shown[attribute][answers.named[attribute]])


def _figures(answers: Answers) -> dict[str, Any]:
    return {name: interval_json(_share(answers, name)) for name in answers.shown}
