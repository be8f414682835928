"""Teacher and student of a stage: the model as it was loaded, and a copy that reads the guidance.

Does not answer for: what the student learns (objective.py), or how it is run (text_to_image/).
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from latentdiff.config.finetune import DistillMethod
from latentdiff.models.components import Components
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.unet.guidance_embedding import (
    add_guidance_embedding,
    has_guidance_embedding,
    predict,
)
from latentdiff.pipeline.schedulers import distilled_scheduler, make_scheduler
from latentdiff.training.finetune.lora import without_adapters


def check_teacher(configs: Mapping[str, Mapping[str, Any]], *, method: DistillMethod) -> None:
    """Raise ValueError for a model, by its configs, that cannot be trained in this way."""
    reads_guidance = configs.get("unet", {}).get("time_cond_proj_dim") is not None
    is_flow = configs.get("scheduler", {}).get("prediction_type") == "flow_prediction"
    if method != "none" and is_flow:
        raise ValueError(
            "model.pretrained is a model of rectified flow, expected one that predicts epsilon, v "
            "or the sample, whose DDIM steps are distilled"
        )
    if method == "none" and reads_guidance:
        raise ValueError(
            "model.pretrained reads the guidance scale as an input, so it is distilled, and plain "
            "training knows no scale; train the model that it was distilled from, and load the "
            "LoRA into either"
        )
    if method in ("guided", "lcm_lora") and reads_guidance:
        raise ValueError(
            "model.pretrained reads the guidance scale as an input, so it is distilled already; "
            "set distill.method=progressive, or start from a model that is not distilled"
        )
    if method == "progressive" and not reads_guidance:
        raise ValueError(
            "model.pretrained does not read the guidance scale as an input, expected the student "
            "of a stage with distill.method=guided; `latentdiff distill` runs all stages in turn"
        )


def make_student(
    teacher: Components, *, method: DistillMethod
) -> tuple[UNet2DConditionModel, Components]:
    """Return the teacher's U-Net and the student, which at first predicts as its teacher does.

    The student is a copy whose U-Net reads the guidance, with a sampler of few steps; the other
    components are shared. For lcm_lora it is the model with its adapters, and the teacher the same
    weights without them.
    """
    if method == "lcm_lora":
        scheduler = make_scheduler("lcm", trained=teacher.scheduler)
        return without_adapters(teacher.unet), replace(teacher, scheduler=scheduler)
    unet = add_guidance_embedding(teacher.unet)
    scheduler = distilled_scheduler(teacher.scheduler)
    return teacher.unet, replace(teacher, unet=unet, scheduler=scheduler)


@dataclass(frozen=True)
class Teacher:
    """A frozen U-Net that predicts, in the precision of the run."""

    unet: UNet2DConditionModel
    autocast: Callable[[], AbstractContextManager[Any]]

    @torch.no_grad()
    def __call__(self, zt: Tensor, t: Tensor, conditioning: Conditioning, scale: Tensor) -> Tensor:
        """Return the output for zt (B, C, h, w), t (B,) and the conditioning of B images, float32.

        scale: (B,), of guidance, for a U-Net that reads it.
        """
        given = scale if has_guidance_embedding(self.unet) else None
        with self.autocast():
            return predict(self.unet, zt, t, conditioning, given).float()
