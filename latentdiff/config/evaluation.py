"""Options of evaluate, compare_subject and swiss_roll; torch-free, so that --help is quick."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class EvalModelOptions:
    """The images that a model is evaluated on, and how they are read."""

    data: str
    """a captioned folder"""
    split: Literal["heldout", "train", "all"] = "heldout"
    """"heldout" takes test/ or validation/, or the images that training held out by hash; "all" is
    for a folder that the model has never seen"""
    num_heldout: int = 1000
    """maximum number of real images, evenly spaced over the split; 1 and more"""
    caption_column: str = "text"
    """column of the metadata file that holds the caption"""
    heldout_fraction: float = 0.02
    """share held out by a stable hash, in [0, 1], as in training, where no folder is named test or
    validation"""
    batch_size: int = 32
    """images at once, 1 and more; lower it when memory runs out"""
    seed: int = 0
    """seed of all random numbers, 0 and more"""
    device: str | None = None
    """device: cpu, cuda, cuda:1, mps; by default the best there is"""
    safety_checker: bool = True
    """keep the model's safety checker, if any; false leaves it out, unread"""


@dataclass(frozen=True)
class EvaluationOptions:
    """The images that the model generates, and the networks that score them."""

    num_images: int = 128
    """images generated for held-out captions, 8 and more; 0: none"""
    images_per_caption: int = 2
    """generated images of one caption, 1 and more; more where captions are few"""
    num_inference_steps: int = 25
    """sampling steps, 1 and more"""
    guidance_scale: float | None = None
    """scale of classifier-free guidance, of both models alike; by default the scale that the first
    model's folder names, or 7.5"""
    features: str | None = None
    """folder of a feature network (a MobileNet's arch.json, a transformers vision model or a CLIP):
    fidelity, and better features for copies and diversity"""
    clip: str | None = None
    """folder of a transformers CLIP, or the name of an open_clip model: CLIP score"""
    clip_weights: str | None = None
    """safetensors file of the open_clip model that --clip names"""
    num_train: int = 5000
    """maximum number of training images that are searched for copies, 3 and more"""
    class_column: str = ""
    """column of the metadata file that names an image's class; by default, folders"""
    compare: str | None = None
    """another model, measured on the same captions and seeds and compared"""
    step_sweep: list[int] = field(default_factory=list)
    """numbers of sampling steps such as [5,10,25,50]; none by default"""


@dataclass(frozen=True)
class BoundOptions:
    """How the bound is estimated, and on how many steps its sheets are sampled."""

    chain: str = ""
    """bound a shorter chain, such as "25" or "ddim50"; the model's own by default"""
    variance_type: str | None = None
    """fixed_small, fixed_large or learned_range; the model's own by default"""
    draws: int = 16
    """timesteps sampled for each estimate of an image, 1 and more, by importance and in strata"""
    repeats: int = 2
    """estimates of each image, 1 and more; two or more separate noise from the variation of
    images"""
    pilot: int = 8
    """images whose every timestep is evaluated first, to choose the timesteps; 1 and more"""
    compare_variance: list[str] = field(default_factory=list)
    """chains, such as ["25","100"], on which a learned variance is compared with the two fixed
    ones"""
    image_steps: int = 50
    """steps of the sheets' chains, 0 and more; 0: no sheets"""


@dataclass(frozen=True)
class SweepOptions:
    """The guidance scales of the sweep, and the images of both sweeps."""

    guidance_sweep: list[float] = field(default_factory=list)
    """scales such as [1,2,4,8]; none by default"""
    sweep_captions: int = 32
    """captions of the images, 1 and more"""
    sweep_images: int = 4
    """images of each caption, 2 and more"""
    sweep_steps: int = 25
    """sampling steps of the guidance sweep, 1 and more"""


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
    """The prompts of both models, and their sampling settings."""

    prompt: str
    """the tuned model's prompt for the subject, such as "a photo of sks dog" """
    base_prompt: str = ""
    """the base model's prompt for the subject; empty: the same"""
    unrelated: tuple[str, ...] = UNRELATED
    """prompts whose images should not have changed; ten and more"""
    num_seeds: int = 16
    """images of the subject by each model, 2 and more"""
    num_inference_steps: int = 30
    """sampling steps, 1 and more"""
    guidance_scale: float = 5.0
    """scale of classifier-free guidance"""


@dataclass(frozen=True)
class RollOptions:
    """The size of the example, and the known coordinate."""

    max_steps: int = 6000
    """optimiser steps, 1 and more"""
    num_timesteps: int = 100
    """length of the chain, 2 and more"""
    num_points: int = 4000
    """points of each cloud, and of the bound; 1 and more"""
    known: float = 0.5
    """the value of the first coordinate that conditional samples are given"""
    tolerance: float = 0.1
    """standard deviation of that value, above 0"""
    seed: int = 0
    """seed of all random numbers, 0 and more"""
