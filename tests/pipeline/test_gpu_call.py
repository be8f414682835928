"""A call on a GPU that is not there: every tensor on it, and no wait of the host within a step.

The scheduler's own step is diffusers', whose host reads timesteps; a plain one is in its place.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from fakes_gpu import CUDA, HostSyncs, fake_gpu
from fakes_pipeline import ddim, tiny_pipeline, tiny_unet
from fakes_sdxl import sdxl_pipeline
from test_sampling_by_image import CASES as KINDS
from test_sampling_by_image import INPAINT, controlnet_of, photo, pipeline_of
from torch import Tensor

from latentdiff.models.latents import LatentCodec
from latentdiff.models.unet.guidance_embedding import add_guidance_embedding
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.cfg_denoiser import CFGDenoiser


class PlainScheduler(DDIMScheduler):
    """Takes a part of each prediction off, whatever the timestep."""

    def step(self, output: Tensor, t: Tensor, latents: Tensor, **_: Any) -> tuple[Tensor]:
        return (latents - 0.1 * output[:, : latents.shape[1]],)


def plain(pipe: LatentDiffPipeline) -> LatentDiffPipeline:
    pipe.scheduler = PlainScheduler.from_config(pipe.scheduler.config)
    return pipe


def with_controlnet(pipe: LatentDiffPipeline) -> LatentDiffPipeline:
    pipe.load_controlnet(controlnet_of(pipe.unet, 0))
    return pipe


def student() -> LatentDiffPipeline:
    return tiny_pipeline(unet=add_guidance_embedding(tiny_unet()), scheduler=ddim())


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": (tiny_pipeline, {"guidance_rescale": 0.5}),
    "image and mask": (tiny_pipeline, INPAINT | {"strength": 0.7}),
    "windows": (tiny_pipeline, {"height": 32, "width": 64, "window_size": 32}),
    "sdxl": (sdxl_pipeline, {}),
    "student": (student, {}),
    "controlnet": (lambda: with_controlnet(tiny_pipeline()), {"condition": photo(1)}),
    "inpaint": (lambda: pipeline_of("inpaint"), INPAINT),
    **{kind: (lambda kind=kind: pipeline_of(kind), own) for kind, (own, _) in KINDS.items()},
}


@pytest.mark.parametrize("case", CALLS)
def test_call_stays_on_the_gpu_and_no_step_waits(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, options = CALLS[case]
    pipe, syncs, predict = plain(make()), HostSyncs(), CFGDenoiser.__call__

    def watched(denoiser: CFGDenoiser, xt: Tensor, t: Tensor) -> Any:
        assert {xt.device, t.device} == {CUDA}
        with syncs:
            return predict(denoiser, xt, t)

    def moved(pipe: LatentDiffPipeline, *args: Any, **kwargs: Any) -> Any:
        """Take the pipeline to the GPU once the arguments are read, which the host does."""
        stack.enter_context(fake_gpu(monkeypatch))
        for part in (pipe, *pipe.controlnets):
            part.to(CUDA)
        return chain(pipe, *args, **kwargs)

    def decoded(latents: Tensor, *, vae: AutoencoderKL, **_: object) -> tuple[Tensor, None]:
        """Decode without the look at the numbers that ends a call."""
        return LatentCodec(vae).decode(latents), None

    chain = LatentDiffPipeline._chain
    monkeypatch.setattr("latentdiff.pipeline.call_steps.decode", decoded)
    # a digest of the weights, taken once
    monkeypatch.setattr("latentdiff.pipeline.pipeline.generation_metadata", lambda *_, **__: [])
    monkeypatch.setattr(LatentDiffPipeline, "_chain", moved)
    monkeypatch.setattr(CFGDenoiser, "__call__", watched)
    call = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt", "seed": 4}
    with ExitStack() as stack:
        images = pipe("a cat", negative_prompt="sea", **call | options).images
    assert images.device == CUDA
    assert syncs.found == []


def test_prompts_left_on_the_cpu_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = plain(tiny_pipeline())
    embeds = pipe.encode_prompt("a cat", torch.device("cpu"), 1, False)[0]
    with fake_gpu(monkeypatch):
        pipe.to(CUDA)
        with pytest.raises(RuntimeError, match="same device"):
            pipe.unet(torch.randn(1, 4, 8, 8, device=CUDA), 5, encoder_hidden_states=embeds)
