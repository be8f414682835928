"""The denoiser of one call: the U-Net, its inputs and guidance in one object, made once a call.

Classifier-free guidance (Ho & Salimans 2022) is applied here and nowhere else in the pipeline.
Does not answer for: the gradient of a score (gradient_guidance.py), the scheduler's step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from latentdiff.cpu.fast_sampling import FastCPU
from latentdiff.diffusion.guidance import (
    ScoreFunction,
    classifier_free,
    instruct_pix2pix,
    is_guided,
    rescale,
)
from latentdiff.diffusion.windows import Window, average_windows
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.unet.guidance_embedding import guidance_features, has_guidance_embedding
from latentdiff.pipeline import checks
from latentdiff.pipeline.conditioning.image_condition import ControlNets
from latentdiff.pipeline.gradient_guidance import apply_score_guidance
from latentdiff.pipeline.initial_latents import InpaintState
from latentdiff.pipeline.lora_scale import apply_lora_scale

MAX_GUIDANCE = 1000.0
MAX_SCORE_SCALE = 1e6


@dataclass(frozen=True)
class Guidance:
    """Guidance of one call. scale: of classifier-free guidance, 1 is none.

    rescale: in [0, 1], how far the guided prediction's standard deviation is pulled back. interval:
    the part of the chain that is guided, from 0 (pure noise) to 1 (clean). score_fn: a score of the
    predicted clean latents; its gradient guides too, times score_scale (gradient_guidance.py).
    image_scale: of guidance by the image to edit, 1 is none.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    score_fn: ScoreFunction | None = None
    score_scale: float = 1.0
    image_scale: float = 1.0

    @classmethod
    def checked(
        cls,
        scale: object,
        rescale: object,
        interval: object,
        *,
        score: tuple[Any, object],
        image_scale: object = 1.0,
    ) -> Guidance:
        """Return the guidance; ValueError for a bad value. score: (score_fn, score_scale)."""
        score_fn, score_scale = score
        if score_fn is not None and not callable(score_fn):
            raise ValueError(
                "score_fn must be a function (z0, t) -> scores, one an image, got "
                f"{checks.kind(score_fn)}"
            )
        return cls(
            checks.in_range("guidance_scale", scale, low=0.0, high=MAX_GUIDANCE),
            checks.in_range("guidance_rescale", rescale, low=0.0, high=1.0),
            checks.interval("guidance_interval", interval),
            score_fn,
            checks.in_range("score_scale", score_scale, low=-MAX_SCORE_SCALE, high=MAX_SCORE_SCALE),
            checks.in_range("image_guidance_scale", image_scale, low=1.0, high=MAX_GUIDANCE),
        )

    def is_active(self, t: Tensor, *, num_timesteps: int) -> bool:
        """Return whether a timestep is guided."""
        start, end = self.interval
        is_whole = (start, end) == (0.0, 1.0)
        return is_whole or is_guided(int(t), start=start, end=end, num_timesteps=num_timesteps)


class Prediction(NamedTuple):
    """The U-Net's prediction at one step, guided, float32."""

    output: Tensor  # (B, C, h, w), or (B, 2C, h, w) with learned variance
    cfg_delta: Tensor | None  # (B, C, h, w), conditional minus unconditional; None without guidance


class CFGDenoiser:
    """The U-Net of one call with all it needs to predict from xt at a timestep, guided.

    conditioning: of B images, or of 2B with the negative prompts first, then classifier-free
    guidance applies. It and the guidance may be replaced between steps. windows: of a large canvas,
    in which the U-Net predicts one by one; factor: of the VAE.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        inputs: InpaintState,
        guidance: Guidance,
        *,
        conditioning: Conditioning,
        scheduler: Any,
        fast_cpu: FastCPU,
        lora_scale: float | None = None,
        controlnets: ControlNets | None = None,
        windows: list[Window] | None = None,
        factor: int = 8,
    ) -> None:
        self.unet, self.inputs, self.guidance = unet, inputs, guidance
        self.conditioning, self.lora_scale = conditioning, lora_scale
        self.scheduler, self.fast_cpu = scheduler, fast_cpu
        self.controlnets, self.windows = controlnets or ControlNets(), windows or []
        self.factor = factor
        self.num_channels = inputs.noise.shape[1]
        self.dtype = unet.dtype  # read once: diffusers walks over all parameters for it
        self._features: dict[tuple[int, float], Tensor] = {}  # of the same price

    def __call__(self, xt: Tensor, t: Tensor) -> Prediction:
        """Predict from xt (B, C, h, w) at timestep t (), guided where t lies in the interval."""
        guidance = self.guidance
        num_timesteps = self.scheduler.config.num_train_timesteps
        if not guidance.is_active(t, num_timesteps=num_timesteps):
            return self._predict(xt, t, self.conditioning[-len(xt) :], scale=1.0)
        if guidance.score_fn is None:
            return self._predict(xt, t, self.conditioning)
        guided = apply_score_guidance(
            guidance.score_fn,
            lambda x: self._predict(x, t, self.conditioning),
            xt=xt,
            t=t,
            scale=guidance.score_scale,
            scheduler=self.scheduler,
        )
        return Prediction(*guided)

    def _predict(
        self, xt: Tensor, t: Tensor, conditioning: Conditioning, *, scale: float | None = None
    ) -> Prediction:
        """Run the U-Net once, for both prompts at once, with classifier-free guidance.

        scale: of a U-Net that reads it, by default the guidance's. Guidance by an image to edit
        takes a third prediction, without that image. Of a learned variance (outputs after the first
        C) the conditional one is kept: guidance extrapolates predictions only.
        """
        is_guided = len(conditioning) == 2 * len(xt)
        if is_guided and self.guidance.image_scale > 1:
            conditioning = _without_image_first(conditioning, len(xt))
        x = self.inputs.unet_input(xt).to(self.dtype)
        if (num := len(conditioning) // len(xt)) > 1:
            x = torch.cat([x] * num)
        if conditioning.condition is not None:
            x = torch.cat([x, conditioning.condition.to(x)], dim=1)  # (B, C + k, h, w)
        output = self._output(x, t, conditioning, scale=scale)
        if not is_guided:
            return Prediction(output, None)
        parts = output.chunk(num)
        cond, variance = parts[-1][:, : self.num_channels], parts[-1][:, self.num_channels :]
        others = [part[:, : self.num_channels] for part in parts[:-1]]
        if num == 3:
            scales = self.guidance.scale, self.guidance.image_scale
            guided = instruct_pix2pix(others[0], others[1], cond, *scales)
        else:
            guided = classifier_free(others[0], cond, self.guidance.scale)
        if self.guidance.rescale > 0:
            guided = rescale(guided, cond, self.guidance.rescale)
        return Prediction(torch.cat([guided, variance], dim=1), cond - others[-1])

    def _output(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, *, scale: float | None
    ) -> Tensor:
        """Return the U-Net's output in float32; in windows, the mean of theirs."""
        if not self.windows:
            return self._pass(x, t, conditioning, scale=scale)
        control = conditioning.control

        def predict(window: Window) -> Tensor:
            part = None if control is None else window.crop(control, factor=self.factor)
            return self._pass(
                window.crop(x).contiguous(), t, replace(conditioning, control=part), scale=scale
            )

        return average_windows(predict, self.windows, size=(x.shape[-2], x.shape[-1]))

    def _pass(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, *, scale: float | None
    ) -> Tensor:
        known = conditioning.to(dtype=self.dtype)
        added = self.controlnets.residuals(x, t, known, num_images=len(self.inputs.noise))
        with apply_lora_scale(self.unet, self.lora_scale), self.fast_cpu.speed_up(self.unet, x):
            output = self.unet(
                x,
                t,
                timestep_cond=self._guidance_features(len(x), scale),
                return_dict=False,
                **known.unet_kwargs(),
                **added,
            )[0]
        copied: Tensor = output.to(torch.float32, copy=True)  # ordinary, whatever the pass was
        return copied

    def _guidance_features(self, num: int, scale: float | None) -> Tensor | None:
        """Return the scale as a distilled U-Net reads it, (num, D), else None."""
        if not has_guidance_embedding(self.unet):
            return None
        key = num, self.guidance.scale if scale is None else scale
        if key not in self._features:
            self._features[key] = guidance_features(self.unet, key[1], num=num)
        return self._features[key]


def _without_image_first(conditioning: Conditioning, num: int) -> Conditioning:
    """Return the conditioning of 3 B images: the negative prompts' without an image comes first.

    conditioning: of 2 B, the negative prompts' first; num: B.
    """
    negative = conditioning[:num]
    assert negative.condition is not None
    alone = replace(negative, condition=torch.zeros_like(negative.condition))
    return Conditioning.cat([alone, conditioning])
