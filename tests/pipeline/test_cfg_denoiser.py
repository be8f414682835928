"""The denoiser of a call is the U-Net with classifier-free guidance, and nothing more."""

import torch
from fakes_pipeline import ddim, tiny_unet

from latentdiff.cpu.fast_sampling import FastCPU
from latentdiff.models.conditioning import Conditioning
from latentdiff.pipeline.cfg_denoiser import CFGDenoiser, Guidance
from latentdiff.pipeline.initial_latents import InpaintState


def denoiser(guidance: Guidance, prompt_embeds: torch.Tensor, **changes):
    unet = tiny_unet(**changes)
    inputs = InpaintState(torch.zeros(2, 4, 8, 8))
    scheduler = ddim()
    return CFGDenoiser(
        unet,
        inputs,
        guidance,
        conditioning=Conditioning(prompt_embeds),
        scheduler=scheduler,
        fast_cpu=FastCPU(),
    )


@torch.no_grad()
def test_guidance_extrapolates_from_the_negative_to_the_prompt():
    generator = torch.Generator().manual_seed(0)
    xt, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor(500)
    negative, embeds = torch.randn(2, 2, 16, 16, generator=generator)
    predict = denoiser(Guidance(scale=3.0), torch.cat([negative, embeds]))
    uncond, cond = (predict.unet(xt, t, one, return_dict=False)[0] for one in (negative, embeds))
    output, cfg_delta = predict(xt, t)
    torch.testing.assert_close(output, uncond + 3.0 * (cond - uncond), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cfg_delta, cond - uncond, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_outside_of_its_interval_the_prompt_alone_predicts():
    generator = torch.Generator().manual_seed(0)
    xt = torch.randn(2, 4, 8, 8, generator=generator)
    negative, embeds = torch.randn(2, 2, 16, 16, generator=generator)
    predict = denoiser(Guidance(scale=3.0, interval=(0.5, 1.0)), torch.cat([negative, embeds]))
    early, late = torch.tensor(900), torch.tensor(100)
    assert predict(xt, early).cfg_delta is None
    assert torch.equal(
        predict(xt, early).output, predict.unet(xt, early, embeds, return_dict=False)[0]
    )
    assert predict(xt, late).cfg_delta is not None


@torch.no_grad()
def test_learned_variance_is_the_conditional_one():
    generator = torch.Generator().manual_seed(0)
    xt, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor(500)
    negative, embeds = torch.randn(2, 2, 16, 16, generator=generator)
    predict = denoiser(Guidance(scale=3.0), torch.cat([negative, embeds]), out_channels=8)
    cond = predict.unet(xt, t, embeds, return_dict=False)[0]
    torch.testing.assert_close(predict(xt, t).output[:, 4:], cond[:, 4:], atol=1e-5, rtol=1e-5)
