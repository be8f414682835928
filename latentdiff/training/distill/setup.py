"""The objective of a stage of distillation, made from its settings and the components."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F

from latentdiff.config.finetune import DistillConfig
from latentdiff.diffusion.distillation import CLEAN, SOLVER_STEPS, trailing_timesteps
from latentdiff.diffusion.schedules import Schedule
from latentdiff.diffusion.timesteps import TimestepSampler
from latentdiff.models.build import schedule_of
from latentdiff.models.components import Components
from latentdiff.models.conditioning import Conditioning
from latentdiff.training.distill.consistency import Consistency
from latentdiff.training.distill.objective import (
    Distillation,
    GuidedTarget,
    HalvedTarget,
    Target,
)
from latentdiff.training.distill.student import Teacher
from latentdiff.training.objective import TrainingObjective


def num_distilled_timesteps(distill: DistillConfig) -> int:
    """Return the number of timesteps that a student learns at."""
    return SOLVER_STEPS if distill.method == "lcm_lora" else distill.num_steps


def distill_objective(
    distill: DistillConfig,
    components: Components,
    teacher: Teacher,
    *,
    sample_steps: TimestepSampler,
    null_text: Conditioning,
    device: torch.device,
    averaged: Callable[[], AbstractContextManager[None]],
) -> TrainingObjective:
    """Return the loss of a student, on the device; null_text is there already.

    sample_steps: over num_distilled_timesteps. averaged: a context in which the student has its
    averaged weights, the target of lcm_lora.
    """
    schedule = schedule_of(components.scheduler).to(device, dtype=torch.float32)
    prediction_type = components.scheduler.config["prediction_type"]
    if distill.method == "lcm_lora":
        return Consistency(
            schedule,
            prediction_type,
            teacher,
            null_text,
            sample_steps=sample_steps,
            min_guidance=distill.min_guidance,
            max_guidance=distill.max_guidance,
            averaged=averaged,
        )
    return Distillation(
        schedule,
        prediction_type,
        _target(distill, teacher, schedule, prediction_type, null_text=null_text, device=device),
        num_steps=distill.num_steps,
        sample_steps=sample_steps,
        min_guidance=distill.min_guidance,
        max_guidance=distill.max_guidance,
        weighs_guidance=distill.guidance_weighting == "inverse_square",
    )


def _target(
    distill: DistillConfig,
    teacher: Teacher,
    schedule: Schedule,
    prediction_type: str,
    *,
    null_text: Conditioning,
    device: torch.device,
) -> Target:
    """Return the teacher's answer: its guided prediction, or where two of its steps lead."""

    def timesteps(num_steps: int) -> torch.Tensor:
        return trailing_timesteps(num_steps, schedule.num_timesteps).to(device)

    if distill.method == "guided":
        return GuidedTarget(teacher, timesteps(distill.num_steps), null_text)
    path = F.pad(timesteps(2 * distill.num_steps), (0, 1), value=CLEAN)
    return HalvedTarget(teacher, schedule, prediction_type, path=path)
