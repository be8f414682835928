"""What an evaluation draws and by whom it is judged, as a person asks for it.

Draw a model's images once and let every judge that is there look at them.

What cannot be measured is named with the reason.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from latentdiff.config.evaluation import EvalModelOptions, EvaluationOptions, SweepOptions
from latentdiff.device import choose_device
from latentdiff.evaluation.eval_set import EvalModel, read_split, spread
from latentdiff.evaluation.generate import (
    GeneratedImages,
    ImageArrays,
    generate,
    read_real_images,
)
from latentdiff.evaluation.metrics.clip import Clip, load_clip, load_open_clip
from latentdiff.evaluation.metrics.features import Features, open_features
from latentdiff.evaluation.report.clip_score import clip_section
from latentdiff.evaluation.report.copies_and_diversity import (
    as_thumbnails,
    copies_section,
    diversity_section,
    unit_length,
)
from latentdiff.evaluation.report.fidelity import FEWEST, Embedded, embed_images, fidelity_section
from latentdiff.evaluation.report.heldout_loss import loss_section
from latentdiff.evaluation.report.prompt_following import following_section, is_scene
from latentdiff.evaluation.report.section import LabelledImage, Score, Section
from latentdiff.evaluation.report.sweeps import check_sweep
from latentdiff.image_grid import to_pil

FEWEST_IMAGES = 8
FEWEST_TRAIN = 3


@dataclass(frozen=True, eq=False)
class MetricNets:
    """The networks that judge images."""

    clip: Clip | None
    features: Features | None


def check_options(options: EvaluationOptions, sweep: SweepOptions) -> None:
    """Raise ValueError for options out of range."""
    num, each = options.num_images, options.images_per_caption
    if num and num < FEWEST_IMAGES:
        raise ValueError(f"num_images={num}, expected 0 or at least {FEWEST_IMAGES}")
    if each < 1 or (num and 2 * each > num):
        raise ValueError(
            f"images_per_caption={each}, expected at least 1, and num_images={num} to give two "
            "captions or more"
        )
    lowest = {"steps": 1, "num_train": FEWEST_TRAIN}
    for name, least in lowest.items():
        if (value := getattr(options, name)) < least:
            raise ValueError(f"{name}={value}, expected at least {least}")
    if min(options.step_sweep, default=1) < 1:
        raise ValueError(f"step_sweep={options.step_sweep}, expected at least one step each")
    if options.clip_weights and not options.clip:
        raise ValueError("clip_weights needs the open_clip model's name as --clip")
    if sweep.guidance_sweep or options.step_sweep:
        check_sweep(sweep)


def load_metric_nets(options: EvaluationOptions, data: EvalModelOptions) -> MetricNets:
    """Open the networks that are given; ValueError or FileNotFoundError says what is wrong."""
    device = choose_device(data.device)
    clip = None
    if options.clip and options.clip_weights:
        clip = load_open_clip(options.clip, options.clip_weights, device=device)
    elif options.clip:
        clip = load_clip(options.clip, device=device)
    features = open_features(options.features, device=device) if options.features else None
    return MetricNets(clip, features)


NUM_SHOWN = 16
OF_IMAGES = ("fidelity", "clip_score", "memorisation", "diversity", "following")


@dataclass(frozen=True, eq=False)
class EvalRun:
    """A model, who judges it and how, and the folder for its images."""

    subject: EvalModel
    judges: MetricNets
    folder: Path
    data: EvalModelOptions
    options: EvaluationOptions
    guidance_scale: float

    @property
    def num_captions(self) -> int:
        """How many captions are asked for at the most."""
        return self.options.num_images // self.options.images_per_caption

    @property
    def num_steps(self) -> int:
        """Sampling steps, no more than the chain has."""
        num_timesteps = int(self.subject.components.scheduler.config["num_train_timesteps"])
        return min(self.options.steps, num_timesteps)

    def draw(
        self, captions: Sequence[str], *, kind: str = "", skip_seeds: int = 0
    ) -> GeneratedImages:
        """Draw captions; kind goes to the folder's name."""
        return generate(
            self.subject,
            captions,
            per_caption=max(
                self.options.images_per_caption, self.options.num_images // len(captions)
            ),
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            first_seed=self.data.seed + skip_seeds,
            folder=self.folder.with_name(self.folder.name + kind),
        )


@dataclass(frozen=True, eq=False)
class EvalResult:
    """What was found of one model; sections and scores are added one by one."""

    sections: list[Section]
    scores: dict[str, Score]
    left_out: dict[str, str]
    drawn: GeneratedImages | None


def run_evaluation(exam: EvalRun) -> EvalResult:
    """Draw, and let every judge look; the held-out loss needs no images."""
    subject, options = exam.subject, exam.options
    loss, score = loss_section(subject)
    heldout = read_real_images(subject.folder, size=subject.size, class_column=options.class_column)
    captions = len(set(heldout.captions))
    if not options.num_images or captions < 2:
        why = "nothing was drawn (--num_images 0)"
        if options.num_images:
            why = f"the data has {captions} different caption, two or more are needed"
        return EvalResult([loss], {"heldout": score}, dict.fromkeys(OF_IMAGES, why), None)
    asked = heldout.spread(exam.num_captions)
    drawn = exam.draw(asked.captions)
    measured = EvalResult([_sheet(drawn, asked)], {}, {}, drawn)
    _add_prompt_following(measured, exam, drawn)
    _add_clip_score(measured, exam, drawn, asked)
    measured.sections.append(loss)
    measured.scores["heldout"] = score
    _add_fidelity(measured, exam, drawn, asked, heldout)
    return measured


def _add_prompt_following(measured: EvalResult, exam: EvalRun, drawn: GeneratedImages) -> None:
    """Judge the images by geometry, where the captions are of the shapes world."""
    if not all(is_scene(caption) for caption in drawn.captions):
        measured.left_out["following"] = "the captions are not of the built-in shapes world"
        return
    sets = _by_seen_caption(exam, drawn)
    if not sets:
        measured.left_out["following"] = "it needs two captions or more"
        return
    section, scores = following_section(sets, seed=exam.data.seed)
    measured.sections.append(section)
    measured.scores.update({f"following_{name}": score for name, score in scores.items()})


def _add_clip_score(
    measured: EvalResult, exam: EvalRun, drawn: GeneratedImages, asked: ImageArrays
) -> None:
    """Judge the images by a CLIP, where one is given."""
    if exam.judges.clip is None:
        measured.left_out["clip_score"] = "no CLIP was given (--clip)"
        return
    section, score = clip_section(
        exam.judges.clip,
        drawn,
        asked,
        batch_size=exam.data.batch_size,
        device=exam.subject.device,
        seed=exam.data.seed,
    )
    measured.sections.append(section)
    measured.scores["clip_score"] = score


def _add_fidelity(
    measured: EvalResult,
    exam: EvalRun,
    drawn: GeneratedImages,
    asked: ImageArrays,
    heldout: ImageArrays,
) -> None:
    """Compare the drawn images with real ones and with each other."""
    train, num_in_all = _train_images(exam)
    embedded = _embedded(exam, drawn, heldout, train)
    if exam.judges.features is None:
        measured.left_out["fidelity"] = "no feature network was given (--features)"
    elif len(heldout) < FEWEST:
        measured.left_out["fidelity"] = f"there are only {len(heldout)} real images"
    else:
        classes = [name for name in asked.classes for _ in range(drawn.per_caption)]
        section = fidelity_section(embedded, classes=classes, real_classes=heldout.classes)
        measured.sections.append(section)
    if exam.judges.features is not None:
        embedded = unit_length(embedded)
    if train is None:
        measured.left_out["memorisation"] = (
            "it needs a training split beside the held-out one, with three images or more"
        )
    else:
        section = copies_section(embedded, drawn, train, num_train_in_all=num_in_all)
        measured.sections.append(section)
    if drawn.per_caption > 1:
        measured.sections.append(diversity_section(embedded, drawn))
    else:
        measured.left_out["diversity"] = "it needs two images a caption (--images_per_caption)"


def _embedded(
    exam: EvalRun, drawn: GeneratedImages, heldout: ImageArrays, train: ImageArrays | None
) -> Embedded:
    """Turn all images into features, or into thumbnails where no network is given."""
    if exam.judges.features is None:
        return as_thumbnails(drawn, heldout, train)
    return embed_images(
        exam.judges.features,
        drawn,
        heldout,
        train,
        batch_size=exam.data.batch_size,
        device=exam.subject.device,
    )


def _train_images(exam: EvalRun) -> tuple[ImageArrays | None, int]:
    """Return some of the training images, and how many there are."""
    if exam.data.split != "heldout":
        return None, 0
    folder = read_split(exam.data, "train")
    if len(folder) < FEWEST_TRAIN:
        return None, len(folder)
    chosen = spread(folder, exam.options.num_train)
    return read_real_images(chosen, size=exam.subject.size), len(folder)


def _by_seen_caption(exam: EvalRun, drawn: GeneratedImages) -> dict[str, GeneratedImages]:
    """Keep images of captions that no training image has; draw others that some have.

    A set of fewer than two captions is left out.
    """
    if exam.data.split == "train":
        return {"seen": drawn}
    known = _train_captions(exam)
    trained = sorted(known)
    new = [m for m, caption in enumerate(drawn.captions) if caption not in known]
    sets = {}
    if len(new) > 1:
        captions = tuple(drawn.captions[m] for m in new)
        sets["heldout"] = replace(drawn, captions=captions, bytes=drawn.bytes[new])
    if len(trained) > 1:
        count = min(exam.num_captions, len(trained))
        seen = [trained[i * len(trained) // count] for i in range(count)]
        sets["seen"] = exam.draw(seen, kind="-seen", skip_seeds=len(drawn.flat))
    return sets


def _train_captions(exam: EvalRun) -> set[str]:
    """Return the captions of the shapes world that training images have."""
    if exam.data.split != "heldout":
        return set()
    return set(filter(is_scene, read_split(exam.data, "train").each_caption()))


def _sheet(drawn: GeneratedImages, asked: ImageArrays) -> Section:
    """Show real images beside what was drawn for their captions."""
    count = min(NUM_SHOWN, len(drawn.captions))
    groups = []
    for i in range(count):
        m = i * len(drawn.captions) // count
        real = LabelledImage(to_pil(asked.bytes[m]), drawn.captions[m], "real")
        made = [
            LabelledImage(to_pil(one), "", f"seed {drawn.first_seed + m * drawn.per_caption + k}")
            for k, one in enumerate(drawn.bytes[m, :2])
        ]
        groups.append([real, *made])
    notes = ["Held-out captions, spread evenly, not chosen. All images drawn are in images/."]
    return Section("images", "ImageArrays", {}, (), notes, groups)
