"""Evaluate one model: generate its images once, and apply every metric whose network is given.

Metrics that cannot be computed are named with the reason.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from latentdiff.config.options import EvalModelOptions, EvaluationOptions, SweepOptions
from latentdiff.config.validation import check_ranges
from latentdiff.data.folder.folder import Folder
from latentdiff.evaluation.eval_set import (
    DISTILLED,
    EvalModel,
    RealImages,
    read_real_images,
    read_split,
    subsample,
)
from latentdiff.evaluation.generate import GeneratedImages, generate
from latentdiff.evaluation.metric_nets import MetricNets
from latentdiff.evaluation.metrics.features import (
    THUMBNAILS,
    Features,
    FeatureSets,
    embed_sets,
)
from latentdiff.evaluation.report.clip_score import clip_section
from latentdiff.evaluation.report.fidelity import (
    MIN_IMAGES,
    cmmd_section,
    dino_section,
    diversity_section,
    fidelity_section,
)
from latentdiff.evaluation.report.heldout_loss import heldout_loss_section
from latentdiff.evaluation.report.memorization import memorization_section
from latentdiff.evaluation.report.prompt_following import is_scene, prompt_following_section
from latentdiff.evaluation.report.section import LabelledImage, PairedScore, Section
from latentdiff.evaluation.report.sweeps import check_sweep
from latentdiff.image_grid import to_pil
from latentdiff.pipeline.files.model_info import default_steps

MIN_SAMPLES = 2  # of an interval
MIN_GENERATED = 8
MIN_TRAIN = 3
NUM_SHOWN = 16
NUM_STEPS = 25  # sampling steps of a model that is not distilled
logger = logging.getLogger(__name__)
COMPARISONS = {  # sections that compare with real images in a network's features: its absence
    "fidelity": "no feature network was given (--features)",
    "dino": "no DINO was given (--dino)",
    "cmmd": "no CLIP was given (--clip)",
}
OF_IMAGES = (*COMPARISONS, "clip_score", "memorisation", "diversity", "following")


@dataclass(frozen=True, eq=False)
class EvalRun:
    """A model with the networks that score it, and the folder for its images."""

    eval_model: EvalModel
    nets: MetricNets
    folder: Path
    data: EvalModelOptions
    options: EvaluationOptions
    guidance_scale: float

    @property
    def num_captions(self) -> int:
        """How many captions are sampled at most."""
        return self.options.num_images // self.options.images_per_caption

    @property
    def is_heldout(self) -> bool:
        """Whether the images are a held-out split; training may have seen others."""
        return self.data.split == "heldout"

    @property
    def num_inference_steps(self) -> int:
        """Sampling steps, by default the model's own, at most those of the chain."""
        asked = self.options.num_inference_steps or default_steps(self.eval_model.info, NUM_STEPS)
        num_timesteps = int(self.eval_model.components.scheduler.config["num_train_timesteps"])
        return min(asked, num_timesteps)

    def generate(
        self, captions: Sequence[str], *, suffix: str = "", skip_seeds: int = 0
    ) -> GeneratedImages:
        """Generate images of captions; suffix: of the folder's name."""
        return generate(
            self.eval_model.pipeline(),
            captions,
            per_caption=max(
                self.options.images_per_caption, self.options.num_images // len(captions)
            ),
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            first_seed=self.data.seed + skip_seeds,
            batch_size=self.eval_model.batch_size,
            folder=self.folder.with_name(self.folder.name + suffix),
        )


@dataclass(eq=False)
class EvalResult:
    """The figures of one model; sections and scores are added one by one."""

    sections: list[Section] = field(default_factory=list)
    scores: dict[str, PairedScore] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # why, by the section's name
    failures: dict[str, Exception] = field(default_factory=dict)  # by the section's name
    generated: GeneratedImages | None = None

    @contextmanager
    def part(self, *names: str) -> Iterator[None]:
        """Add the named sections inside the block; a failure is noted, and others follow."""
        try:
            yield
        except Exception as error:
            missing = [name for name in names if name not in self.skipped]
            logger.warning("no section %s: %s", ", ".join(missing), error)
            self.failures |= dict.fromkeys(missing, error)
            reason = f"it failed: {type(error).__name__}: {error}"
            self.skipped |= dict.fromkeys(missing, reason)


def check_options(options: EvaluationOptions, sweep: SweepOptions) -> None:
    """Raise ValueError for options out of range."""
    num, each = options.num_images, options.images_per_caption
    if num and num < MIN_GENERATED:
        raise ValueError(f"num_images={num}, expected 0 or at least {MIN_GENERATED}")
    if each < 1 or (num and 2 * each > num):
        raise ValueError(
            f"images_per_caption={each}, expected at least 1, and num_images={num} to give two "
            "captions or more"
        )
    check_ranges(options)
    if min(options.step_sweep, default=1) < 1:
        raise ValueError(f"step_sweep={options.step_sweep}, expected at least one step each")
    if options.clip_weights and not options.clip:
        raise ValueError("clip_weights needs the open_clip model's name as --clip")
    if sweep.guidance_sweep or options.step_sweep:
        check_sweep(sweep)


def too_few(folder: Folder, options: EvaluationOptions) -> dict[str, str]:
    """Return why sections cannot be estimated from a folder's images, by the section's name."""
    skipped = {}
    if len(folder) < MIN_SAMPLES:
        skipped["heldout"] = f"the data has {len(folder)} image, an interval needs two or more"
    captions = len({record.captions[0] for record in folder})
    if not options.num_images:
        skipped |= dict.fromkeys(OF_IMAGES, "no image was generated (--num_images 0)")
    elif captions < MIN_SAMPLES:
        why = f"the data has {captions} different caption, two or more are needed"
        skipped |= dict.fromkeys(OF_IMAGES, why)
    return skipped


def run_evaluation(run: EvalRun, result: EvalResult) -> None:
    """Add every metric to the result; the held-out loss needs no generated images.

    What cannot be estimated from so few images, and what fails, is skipped with its reason.
    """
    eval_model, options = run.eval_model, run.options
    result.skipped |= too_few(eval_model.folder, options)
    if eval_model.is_distilled:
        result.skipped["heldout"] = DISTILLED
    if "heldout" not in result.skipped:
        with result.part("heldout"):
            loss, result.scores["heldout"] = heldout_loss_section(
                eval_model, is_heldout=run.is_heldout
            )
            result.sections.append(loss)
    if OF_IMAGES[0] in result.skipped:
        return
    with result.part(*OF_IMAGES):
        heldout = read_real_images(
            eval_model.folder, size=eval_model.size, class_column=options.class_column
        )
        real_images = heldout.subsample(run.num_captions)
        result.generated = generated = run.generate(real_images.captions)
        result.sections.append(_images_section(generated, real_images, is_heldout=run.is_heldout))
        with result.part("following"):
            _add_prompt_following(result, run, generated)
        with result.part("clip_score"):
            _add_clip_score(result, run, generated, real_images)
        with result.part(*COMPARISONS, "memorisation", "diversity"):
            _add_image_comparisons(result, run, generated, real_images, heldout)


def _add_prompt_following(result: EvalResult, run: EvalRun, generated: GeneratedImages) -> None:
    """Score the images by geometry, where the captions are of the shapes world."""
    if not all(is_scene(caption) for caption in generated.captions):
        result.skipped["following"] = "the captions are not of the built-in shapes world"
        return
    sets = _by_seen_caption(run, generated)
    if not sets:
        result.skipped["following"] = "it needs two captions or more"
        return
    section, scores = prompt_following_section(sets, seed=run.data.seed, is_heldout=run.is_heldout)
    result.sections.append(section)
    result.scores.update({f"following_{name}": score for name, score in scores.items()})


def _add_clip_score(
    result: EvalResult, run: EvalRun, generated: GeneratedImages, real_images: RealImages
) -> None:
    """Score the images by a CLIP, where one is given."""
    if run.nets.clip is None:
        result.skipped["clip_score"] = "no CLIP was given (--clip)"
        return
    section, score = clip_section(
        run.nets.clip,
        generated,
        real_images,
        batch_size=run.data.batch_size,
        device=run.eval_model.device,
        seed=run.data.seed,
    )
    result.sections.append(section)
    result.scores["clip_score"] = score


def _add_image_comparisons(
    result: EvalResult,
    run: EvalRun,
    generated: GeneratedImages,
    real_images: RealImages,
    heldout: RealImages,
) -> None:
    """Compare the generated images with real ones and with each other."""
    train, num_train_in_all = _train_images(run)
    embed = partial(_embed, run, generated=generated, heldout=heldout, train=train)
    features = embed(run.nets.features or THUMBNAILS)
    classes = [name for name in real_images.classes for _ in range(generated.per_caption)]
    by_class = {"classes": classes, "real_classes": heldout.classes}
    sections = {
        "fidelity": lambda _: fidelity_section(features, is_heldout=run.is_heldout, **by_class),
        "dino": lambda net: dino_section(embed(net), is_heldout=run.is_heldout, **by_class),
        "cmmd": lambda net: cmmd_section(embed(net), is_heldout=run.is_heldout),
    }
    for name, net in run.nets.compared().items():
        if net is None:
            result.skipped[name] = COMPARISONS[name]
        elif len(heldout) < MIN_IMAGES:
            result.skipped[name] = f"there are only {len(heldout)} real images"
        else:
            with result.part(name):
                result.sections.append(sections[name](net))
    if run.nets.features is not None:
        features = features.unit_length()
    if train is None:
        result.skipped["memorisation"] = (
            "it needs a training split besides the held-out one, with three images or more"
        )
    else:
        with result.part("memorisation"):
            section = memorization_section(
                features, generated, train, num_train_in_all=num_train_in_all
            )
            result.sections.append(section)
    if generated.per_caption == 1:
        result.skipped["diversity"] = "it needs two images a caption (--images_per_caption)"
        return
    with result.part("diversity"):
        section = diversity_section(features, per_caption=generated.per_caption)
        result.sections.append(section)


def _embed(
    run: EvalRun,
    net: Features,
    *,
    generated: GeneratedImages,
    heldout: RealImages,
    train: RealImages | None,
) -> FeatureSets:
    """Embed all images by a network."""
    return embed_sets(
        net,
        generated.flat,
        heldout.bytes,
        None if train is None else train.bytes,
        batch_size=run.data.batch_size,
        device=run.eval_model.device,
    )


def _train_images(run: EvalRun) -> tuple[RealImages | None, int]:
    """Return a subsample of the training images, and how many there are."""
    if run.data.split != "heldout":
        return None, 0
    folder = read_split(run.data, "train")
    if len(folder) < MIN_TRAIN:
        return None, len(folder)
    chosen = subsample(folder, run.options.num_train)
    return read_real_images(chosen, size=run.eval_model.size), len(folder)


def _by_seen_caption(run: EvalRun, generated: GeneratedImages) -> dict[str, GeneratedImages]:
    """Split the images by caption: keep those of unseen captions, generate others of seen ones.

    A seen caption is one that a training image has. A set of fewer than two captions is dropped.
    """
    if run.data.split == "train":
        return {"seen": generated}
    known = _train_captions(run)
    trained = sorted(known)
    new = [m for m, caption in enumerate(generated.captions) if caption not in known]
    sets = {}
    if len(new) > 1:
        captions = tuple(generated.captions[m] for m in new)
        sets["heldout"] = replace(generated, captions=captions, bytes=generated.bytes[new])
    if len(trained) > 1:
        count = min(run.num_captions, len(trained))
        seen = [trained[i * len(trained) // count] for i in range(count)]
        sets["seen"] = run.generate(seen, suffix="-seen", skip_seeds=len(generated.flat))
    return sets


def _train_captions(run: EvalRun) -> set[str]:
    """Return the captions of the shapes world that training images have."""
    if run.data.split != "heldout":
        return set()
    return set(filter(is_scene, read_split(run.data, "train").each_caption()))


def _images_section(
    generated: GeneratedImages, real_images: RealImages, *, is_heldout: bool
) -> Section:
    """Show real images next to the images generated for their captions."""
    count = min(NUM_SHOWN, len(generated.captions))
    groups = []
    for i in range(count):
        m = i * len(generated.captions) // count
        real = LabelledImage(to_pil(real_images.bytes[m]), generated.captions[m], "real")
        first_seed = generated.first_seed + m * generated.per_caption
        others = [
            LabelledImage(to_pil(one), "", f"seed {first_seed + k}")
            for k, one in enumerate(generated.bytes[m, :2])
        ]
        groups.append([real, *others])
    captions = "Held-out captions" if is_heldout else "Captions"
    notes = [f"{captions}, evenly spaced, not chosen. All generated images are in images/."]
    return Section("images", "Images", {}, (), notes, groups)
