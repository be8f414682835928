"""Step callbacks: the tensors a caller may see and change after each step, traces and previews."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import Tensor

from latentdiff.image_grid import draw_grid, to_pil
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import LatentCodec
from latentdiff.pipeline import checks
from latentdiff.pipeline.cfg_denoiser import Prediction
from latentdiff.pipeline.schedulers import predicted_z0

MAX_COLUMNS = 8
PREVIEW_SIZE = 32  # in latent pixels

StepFunction: TypeAlias = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]

TENSORS = (
    "latents",  # (B, C, h, w) after the step
    "prompt_embeds",  # (B, L, D), or (2B, L, D) under guidance with the negative prompts first
    "negative_prompt_embeds",  # (B, L, D), None without guidance
    "add_text_embeds",  # of SDXL, (B, P) or (2B, P), the pooled embeddings
    "add_time_ids",  # of SDXL, (B, 6) or (2B, 6), the sizes
    "predicted_z0",  # (B, C, h, w), the clean latents that the step predicts
    "cfg_delta",  # (B, C, h, w), conditional minus unconditional; None without guidance
)
OF_SDXL = ("add_text_embeds", "add_time_ids")


@dataclass(frozen=True)
class StepEndCallback:
    """A caller's `callback(pipe, i, t, tensors) -> tensors` and the names of the tensors it takes.

    Latents, prompt_embeds, negative_prompt_embeds, add_text_embeds and add_time_ids that it returns
    replace the old ones.
    """

    function: StepFunction | None
    names: tuple[str, ...]

    @classmethod
    def checked(
        cls, function: StepFunction | None, names: object, *, known: Sequence[str] = TENSORS
    ) -> StepEndCallback:
        """Return the callback; ValueError where it cannot be called or a tensor is unknown."""
        return cls(function, tuple(checks.callback(function, names, known=known)))

    def __call__(
        self,
        pipe: Any,
        i: int,
        t: Tensor,
        *,
        latents: Tensor,
        conditioning: Conditioning,
        xt: Tensor,
        prediction: Prediction,
    ) -> tuple[Tensor, Conditioning]:
        """Return latents and conditioning for the next step."""
        if self.function is None:
            return latents, conditioning
        embeds = conditioning.prompt_embeds
        assert embeds is not None
        negative = embeds.chunk(2)[0] if len(embeds) == 2 * len(latents) else None
        values: dict[str, Tensor | None] = {
            "latents": latents,
            "prompt_embeds": embeds,
            "negative_prompt_embeds": negative,
            "add_text_embeds": conditioning.pooled_embeds,
            "add_time_ids": conditioning.time_ids,
            "cfg_delta": prediction.cfg_delta,
        }
        if "predicted_z0" in self.names:
            values["predicted_z0"] = predicted_z0(pipe.scheduler, prediction.output, xt, t)
        changed = self.function(pipe, i, t, {name: values[name] for name in self.names}) or {}
        embeds = changed.get("prompt_embeds", embeds)
        negative_now = changed.get("negative_prompt_embeds")
        if negative_now is not None and negative_now is not negative:
            embeds = torch.cat([negative_now, embeds[-len(latents) :]])
        others = Conditioning(
            pooled_embeds=changed.get("add_text_embeds", conditioning.pooled_embeds),
            time_ids=changed.get("add_time_ids", conditioning.time_ids),
            class_labels=conditioning.class_labels,
            condition=conditioning.condition,
            control=conditioning.control,
        )[-len(embeds) :]  # where a callback has ended guidance, the prompt's alone
        return changed.get("latents", latents), replace(others, prompt_embeds=embeds)


@torch.no_grad()
def preview_images(
    vae: AutoencoderKL | AutoencoderTiny, z0: Tensor, *, max_side: int = PREVIEW_SIZE
) -> list[Image.Image]:
    """Return small images of latents z0 (B, C, h, w), cheap enough for every step.

    vae: one of the same latent space; a small one such as TAESD is many times faster. Latents of
    more than max_side latent pixels along a side are shrunk before decoding.
    """
    longest = max(z0.shape[-2:])
    if longest > max_side:
        size = [max(1, side * max_side // longest) for side in z0.shape[-2:]]
        z0 = F.interpolate(z0, size=size, mode="area")
    pixels = LatentCodec(vae).decode(z0.to(vae.device))
    return [to_pil(one) for one in pixels]


@dataclass
class Trace:
    """A step callback that keeps the chain for `grid`; pass it as callback_on_step_end."""

    tensor_inputs: tuple[str, ...] = ("latents", "predicted_z0", "cfg_delta")
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, pipe: Any, i: int, t: Tensor, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Keep one step's tensors on the CPU."""
        kept = {name: None if v is None else v.cpu() for name, v in tensors.items()}
        self.steps.append(kept | {"t": float(t)})
        return {}

    def grid(self, vae: AutoencoderKL | AutoencoderTiny, *, image: int = 0) -> Image.Image:
        """Return one image's chain: a row each for xt after the step, predicted x0, guidance.

        Guidance is the norm of cfg_delta over channels, dark to bright in each panel on its own.
        At most eight steps are shown, evenly spaced, the last one always.
        """
        if not self.steps:
            raise ValueError("nothing was traced; pass the trace as callback_on_step_end")
        chosen = np.linspace(0, len(self.steps) - 1, min(MAX_COLUMNS, len(self.steps)))
        shown = [self.steps[round(index)] for index in chosen]
        panels: list[Image.Image] = []
        labels: list[str] = []
        for name, title in (("latents", "xt"), ("predicted_z0", "x0")):
            latents = torch.stack([step[name][image] for step in shown])
            panels += _decoded(vae, latents)
            labels += [f"{title}, t={step['t']:.0f}" for step in shown]
        if all(step["cfg_delta"] is not None for step in shown):
            size = panels[0].size
            panels += [_norm(step["cfg_delta"][image], size=size) for step in shown]
            labels += [f"guidance, t={step['t']:.0f}" for step in shown]
        return draw_grid(panels, labels, columns=len(shown))


@torch.no_grad()
def _decoded(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> list[Image.Image]:
    pixels = LatentCodec(vae).decode(latents.to(vae.device), chunk_size=1)
    return [to_pil(one) for one in pixels]


def _norm(cfg_delta: Tensor, *, size: tuple[int, int]) -> Image.Image:
    norm = cfg_delta.float().norm(dim=0)
    shares = (norm / norm.max().clamp(min=1e-12) * 255).round().byte().numpy()
    return Image.fromarray(shares).resize(size, Image.Resampling.NEAREST).convert("RGB")
