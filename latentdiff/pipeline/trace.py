"""How an image came about: the chain's xt, predicted x0 and guidance, as a strip of columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import Tensor

from latentdiff.image_grid import draw_grid, to_pil
from latentdiff.models.latents import LatentCodec

MAX_COLUMNS = 8


@dataclass
class Trace:
    """A step callback that keeps what `draw` shows; pass it as callback_on_step_end."""

    tensor_inputs: tuple[str, ...] = ("latents", "predicted_z0", "guidance_difference")
    steps: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, pipe: Any, i: int, t: Tensor, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Keep one step's tensors on the CPU."""
        kept = {name: None if v is None else v.cpu() for name, v in tensors.items()}
        self.steps.append(kept | {"t": float(t)})
        return {}

    def draw(self, vae: AutoencoderKL | AutoencoderTiny, *, image: int = 0) -> Image.Image:
        """Draw one image's chain: a row each for xt after the step, predicted x0, guidance.

        Guidance is the difference's norm over channels, dark to bright in each panel on its own.
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
        if all(step["guidance_difference"] is not None for step in shown):
            size = panels[0].size
            panels += [_norm(step["guidance_difference"][image], size=size) for step in shown]
            labels += [f"guidance, t={step['t']:.0f}" for step in shown]
        return draw_grid(panels, labels, columns=len(shown))


@torch.no_grad()
def _decoded(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> list[Image.Image]:
    pixels = LatentCodec(vae).decode(latents.to(vae.device), chunk_size=1)
    return [to_pil(one) for one in pixels]


def _norm(difference: Tensor, *, size: tuple[int, int]) -> Image.Image:
    norm = difference.float().norm(dim=0)
    shares = (norm / norm.max().clamp(min=1e-12) * 255).round().byte().numpy()
    return Image.fromarray(shares).resize(size, Image.Resampling.NEAREST).convert("RGB")
