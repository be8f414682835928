"""What a caller may see and change after each step of the chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from latentdiff.diffusion.prediction import predict_x0
from latentdiff.models.build import schedule_of
from latentdiff.pipeline import checks
from latentdiff.pipeline.denoiser import Prediction

StepFunction: TypeAlias = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]

TENSORS = (
    "latents",  # (B, C, h, w) after the step
    "prompt_embeds",  # (B, L, D), or (2B, L, D) under guidance with the negative prompts first
    "negative_prompt_embeds",  # (B, L, D), None without guidance
    "predicted_z0",  # (B, C, h, w), the clean latents that the step's prediction stands for
    "guidance_difference",  # (B, C, h, w), conditional minus unconditional; None without guidance
)


@dataclass(frozen=True)
class StepEndCallback:
    """A caller's `callback(pipe, i, t, tensors) -> tensors` and the tensors it asks for by name.

    Latents, prompt_embeds and negative_prompt_embeds that it returns replace the old ones.
    """

    function: StepFunction | None
    names: tuple[str, ...]

    @classmethod
    def checked(cls, function: StepFunction | None, names: object) -> StepEndCallback:
        """Return the callback; ValueError where it cannot be called or asks for what is not."""
        return cls(function, tuple(checks.callback(function, names, known=TENSORS)))

    def __call__(
        self,
        pipe: Any,
        i: int,
        t: Tensor,
        *,
        latents: Tensor,
        states: Tensor,
        xt: Tensor,
        prediction: Prediction,
    ) -> tuple[Tensor, Tensor]:
        """Return the latents and text states to go on with."""
        if self.function is None:
            return latents, states
        is_guided = len(states) == 2 * len(latents)
        negative = states.chunk(2)[0] if is_guided else None
        tensors: dict[str, Tensor | None] = {}
        for name in self.names:
            if name == "predicted_z0":
                tensors[name] = predicted_z0(pipe.scheduler, prediction.output, xt, t)
            else:
                tensors[name] = {
                    "latents": latents,
                    "prompt_embeds": states,
                    "negative_prompt_embeds": negative,
                    "guidance_difference": prediction.difference,
                }[name]
        changed = self.function(pipe, i, t, tensors) or {}
        states = changed.get("prompt_embeds", states)
        negative_now = changed.get("negative_prompt_embeds")
        if negative_now is not None and negative_now is not negative:
            states = torch.cat([negative_now, states[-len(latents) :]])
        return changed.get("latents", latents), states


def predicted_z0(scheduler: Any, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
    """Return the clean latents (B, C, h, w) that a prediction stands for (Ho et al. 2020, Eq. 15).

    xt is the noisy latents at unit-variance scale, as every scheduler feeds the U-Net.
    """
    channels = xt.shape[1]
    return predict_x0(
        schedule_of(scheduler).to(xt.device),
        output[:, :channels],
        xt,
        nearest_steps(scheduler, t, count=len(xt)).to(xt.device),
        prediction_type=scheduler.config.prediction_type,
    ).float()


def nearest_steps(scheduler: Any, t: Tensor, *, count: int) -> Tensor:
    """Return the training timestep nearest to t, which some samplers have in between, (count,)."""
    last = scheduler.config.num_train_timesteps - 1
    return t.round().long().clamp(0, last).expand(count)
