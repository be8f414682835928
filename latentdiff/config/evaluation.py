"""Options of evaluate, compare_subject and swiss_roll; torch-free, so that --help is quick."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class EvalModelOptions:
    """The images that a model is evaluated on, and how they are read.

    Args:
        data: a captioned folder.
        split: "heldout" takes test/ or validation/, or the images that training held out by hash;
            "all" is for a folder that the model has never seen.
        num_heldout: real images at most, evenly spaced over the split.
        caption_column: column of the metadata file that holds the caption.
        heldout_fraction: as in training, where no folder is named test or validation.
        batch_size: images at once; lower it when memory runs out.
        seed: of every random draw.
        device: cpu, cuda, mps; the best available one by default.
        safety_checker: false opens models without their safety checker.
    """

    data: str
    split: Literal["heldout", "train", "all"] = "heldout"
    num_heldout: int = 1000
    caption_column: str = "text"
    heldout_fraction: float = 0.02
    batch_size: int = 32
    seed: int = 0
    device: str | None = None
    safety_checker: bool = True


@dataclass(frozen=True)
class EvaluationOptions:
    """The images that the model generates, and the networks that score them.

    Args:
        num_images: images generated for held-out captions; 0 generates none.
        images_per_caption: generated images of one caption; more where captions are few.
        steps: sampling steps.
        guidance_scale: scale of classifier-free guidance, of both models alike; by default the
            scale that the first model's folder names, or 7.5.
        features: folder of a feature network (a MobileNet's arch.json, a transformers vision model
            or a CLIP): fidelity, and better features for copies and diversity.
        clip: folder of a transformers CLIP, or the name of an open_clip model: CLIP score.
        clip_weights: safetensors file of that open_clip model.
        num_train: training images at most that are searched for copies.
        class_column: column of the metadata file that names an image's class; by default, folders.
        compare: another model, for the same captions and seeds.
        step_sweep: numbers of sampling steps such as [5,10,25,50]; none by default.
    """

    num_images: int = 128
    images_per_caption: int = 2
    steps: int = 25
    guidance_scale: float | None = None
    features: str | None = None
    clip: str | None = None
    clip_weights: str | None = None
    num_train: int = 5000
    class_column: str = ""
    compare: str | None = None
    step_sweep: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class BoundOptions:
    """How the bound is estimated, and on how many steps its sheets are sampled.

    Args:
        chain: bound a shorter chain, such as "25" or "ddim50"; the model's own by default.
        variance_type: fixed_small, fixed_large or learned_range; the model's own by default.
        draws: timesteps drawn for each estimate of an image, by importance and in strata.
        repeats: estimates of each image; two or more separate noise from the variation of images.
        pilot: images whose every step is evaluated first, to choose the timesteps.
        compare_variance: chains, such as ["25","100"], on which a learned variance is compared
            with the two fixed ones.
        image_steps: steps of the sheets' chains; 0 makes no sheets.
    """

    chain: str = ""
    variance_type: str | None = None
    draws: int = 16
    repeats: int = 2
    pilot: int = 8
    compare_variance: list[str] = field(default_factory=list)
    image_steps: int = 50


@dataclass(frozen=True)
class SweepOptions:
    """The guidance scales of the sweep, and the images of both sweeps.

    Args:
        guidance_sweep: scales such as [1,2,4,8]; none by default.
        sweep_captions: captions of the images.
        sweep_images: images a caption, at least 2.
        sweep_steps: sampling steps of the guidance sweep.
    """

    guidance_sweep: list[float] = field(default_factory=list)
    sweep_captions: int = 32
    sweep_images: int = 4
    sweep_steps: int = 25


UNRELATED = (
    "a red car",
    "a green apple",
    "a yellow face",
    "a blue house",
    "a tree",
    "a slice of pizza",
    "a bicycle",
    "an open book",
    "a city at night",
    "a mountain with snow",
    "a cup of coffee",
    "a person with a hat",
    "a rocket",
    "a bird",
    "a guitar",
    "a bunch of flowers",
)


@dataclass(frozen=True)
class CompareSubjectOptions:
    """The prompts of both models, and their sampling settings.

    Args:
        prompt: the tuned model's prompt for the subject, such as "a photo of sks dog".
        base_prompt: the base model's prompt for the subject; empty: the same.
        unrelated: prompts whose images should not have changed; ten or more.
        num_seeds: images of the subject by each model.
        steps: sampling steps.
        guidance_scale: classifier-free guidance.
    """

    prompt: str
    base_prompt: str = ""
    unrelated: tuple[str, ...] = UNRELATED
    num_seeds: int = 16
    steps: int = 30
    guidance_scale: float = 5.0


@dataclass(frozen=True)
class RollOptions:
    """The size of the example.

    Args:
        steps: optimiser steps.
        num_timesteps: length of the chain.
        num_points: of each cloud, and of the bound.
        known: the known value of the first coordinate.
        tolerance: standard deviation of `known`.
        seed: of every random draw.
    """

    steps: int = 6000
    num_timesteps: int = 100
    num_points: int = 4000
    known: float = 0.5
    tolerance: float = 0.1
    seed: int = 0
