"""Settings of a run that distils a model into a student that needs fewer sampling steps."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from latentdiff.config.validation import at_least, between, check_ranges

DistillMethod = Literal["none", "guided", "progressive", "lcm_lora"]
DistillRecipe = Literal["progressive", "lcm_lora"]

STUDENT_STEPS = (16, 8, 4, 2, 1)  # sampling steps after each halving

UNUSED: dict[str, Any] = {  # settings of plain training, with the one value that distillation takes
    "finetune.method": "full",
    "finetune.class_prompt": "",
    "train.train_text_encoder": False,
    "train.keep_best": False,
    "diffusion.prediction_type": "",
    "diffusion.loss_weighting": "none",
    "diffusion.loss": "mse",
    "diffusion.learned_variance": False,
    "diffusion.caption_dropout": 0.0,
    "diffusion.offset_noise": 0.0,
    "diffusion.input_perturbation": 0.0,
}


@dataclass(frozen=True)
class DistillConfig:
    """One stage of distillation: model.pretrained teaches a copy of itself."""

    method: DistillMethod = "none"
    """none: plain training; guided: the student learns the guided prediction, in one pass, for
    every guidance scale (Meng et al. 2023); progressive: one step of the student is two of its
    teacher, which is a guided student itself (Salimans & Ho 2022); lcm_lora: a LoRA learns the
    guided model's clean end from any timestep (latent consistency, Luo et al. 2023)"""
    num_steps: int = between(1, 1000, default=32)
    """sampling steps of the student; it learns at the timesteps of these alone, but for lcm_lora,
    where they are those that the model is to be sampled in"""
    min_guidance: float = at_least(1, default=1.0)
    """lowest guidance scale that the student learns; 1 is no guidance"""
    max_guidance: float = at_least(1, default=8.0)
    """highest guidance scale that the student learns"""

    @property
    def is_on(self) -> bool:
        """Whether the run distils."""
        return self.method != "none"


def check_distillation(config: Any) -> None:
    """Raise ValueError for settings of a run that exclude distillation."""
    distill = config.distill
    if not distill.is_on:
        return
    if not config.model.pretrained:
        raise ValueError(
            f"distill.method={distill.method} needs the model that teaches; set model.pretrained"
        )
    if distill.max_guidance < distill.min_guidance:
        raise ValueError(
            f"distill.max_guidance={distill.max_guidance:g} is below distill.min_guidance="
            f"{distill.min_guidance:g}, expected scales that rise"
        )
    is_lora = distill.method == "lcm_lora"
    if is_lora and not config.train.ema:
        raise ValueError(
            "distill.method=lcm_lora needs train.ema=true: its target is the average of its weights"
        )
    for name, value in (UNUSED | ({"finetune.method": "lora"} if is_lora else {})).items():
        if (given := attrgetter(name)(config)) != value:
            raise ValueError(
                f"{name}={given} is not for distillation, whose student learns from its teacher "
                f"alone; set {name}={str(value).lower() if isinstance(value, bool) else value!r}"
            )
    if config.diffusion.timestep_sampling == "loss_aware":
        raise ValueError(
            "diffusion.timestep_sampling=loss_aware has no form for the few timesteps of a "
            "student; set diffusion.timestep_sampling=stratified"
        )


@dataclass(frozen=True)
class DistillOptions:
    """The stages of `latentdiff distill`, and what each is measured by."""

    method: DistillRecipe = "progressive"
    """progressive: guidance first, then halvings of the steps, of the whole U-Net; lcm_lora: a LoRA
    for the model and those tuned from it, sampled with the scheduler lcm and no guidance"""
    steps: int = 4
    """sampling steps of the last student: 16, 8, 4, 2 or 1"""
    guided_steps: int = at_least(0, default=0)
    """optimiser steps of the first stage, which learns guidance; 0: a quarter of the teacher's"""
    halving_steps: int = at_least(0, default=0)
    """optimiser steps of each halving; 0: an eighth of the teacher's"""
    lora_steps: int = at_least(1, default=1000)
    """optimiser steps of lcm_lora"""
    teacher_images: int = at_least(0, default=0)
    """images of the folder's captions that the teacher draws, with --teacher_num_steps, and the
    student trains on in place of the folder's own: for small folders; 0: none"""
    num_images: int = at_least(10, default=128)
    """captions, held-out ones first, that teacher and student draw from the same seeds"""
    teacher_num_steps: int = at_least(1, default=25)
    """sampling steps of the teacher, with classifier-free guidance"""
    guidance_scale: float | None = None
    """guidance scale of both; by default the teacher's own, within the scales that are learned"""
    measure_batch_size: int = at_least(1, default=16)
    """images drawn at once"""
    clip: str | None = None
    """folder of a transformers CLIP, or the name of an open_clip model: CLIP score"""
    clip_weights: str | None = None
    """safetensors file of the open_clip model that --clip names"""
    features: str | None = None
    """folder of a feature network, as for evaluate: FD of the student's images to the teacher's"""
    max_accuracy_loss: float = 0.1
    """captions of the shapes world: share of right images that a stage may lose"""
    max_clip_loss: float = 0.02
    """CLIP score, a cosine, that a stage may lose"""
    max_distance: float = 0.6
    """distance to the teacher's images that a stage may have, 1 being that of unlike captions"""

    def check(self) -> None:
        """Raise ValueError for options out of range."""
        if self.steps not in STUDENT_STEPS:
            raise ValueError(f"steps={self.steps}, expected 16, 8, 4, 2 or 1")
        check_ranges(self)
