"""Sheets of what the reverse chain shows on its way (Ho et al. 2020, Sec. 4.3 and 4.4)."""

import torch
from PIL import Image
from torch import Tensor

from latentdiff.diffusion.ddpm import standard_normal
from latentdiff.diffusion.progressive import interpolate, progressive_x0
from latentdiff.evaluation.bound import Chain, denoiser
from latentdiff.evaluation.bound_data import Subject
from latentdiff.pipeline.decode import decode
from latentdiff.pipeline.sheet import draw_sheet

NUM_SHOWN = 8  # predictions of a chain
DEPTHS = (0.1, 0.25, 0.5, 0.75, 1.0)
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@torch.no_grad()
def progressive_sheet(chain: Chain, subject: Subject, *, num_images: int = 6) -> Image.Image:
    """Draw the clean latents predicted along one walk for some captions, noisiest first.

    chain: a re-spaced one saves time; nothing is guided.
    """
    latents = subject.latents.select(range(min(num_images, len(subject.latents))))
    num_timesteps = chain.schedule.num_timesteps
    ends = torch.linspace(num_timesteps - 1, 0, min(NUM_SHOWN, num_timesteps))
    shown = [int(t) for t in ends.round()]
    generator = subject.generator()
    xt = torch.randn(latents.z0.shape, generator=generator).to(subject.device)
    x0 = progressive_x0(
        chain.schedule.to(subject.device),
        denoiser(subject.components.unet, latents.text, num_outputs=chain.num_outputs),
        xt,
        generator=generator,
        prediction_type=chain.prediction_type,
        variance_type=chain.variance_type,
        shown=shown,
    )
    told = chain.schedule.timesteps[shown].tolist()
    labels = [
        caption if k == 0 else f"t = {told[k]:.0f}"
        for caption in latents.captions
        for k in range(len(shown))
    ]
    return _sheet(subject, x0.transpose(0, 1).flatten(0, 1), labels, columns=len(shown))


@torch.no_grad()
def interpolation_sheet(chain: Chain, subject: Subject) -> Image.Image:
    """Draw two pictures mixed at several depths, a row each, their text states mixed alike.

    The first of the pictures and the one in the middle; ValueError where there is only one.
    """
    if len(subject.latents) < 2:
        raise ValueError("interpolation needs two pictures, and num_images leaves one; raise it")
    latents = subject.latents.select([0, len(subject.latents) // 2])
    first, second = (z0.expand(len(SHARES), -1, -1, -1).to(subject.device) for z0 in latents.z0)
    share = torch.tensor(SHARES).view(-1, 1, 1)
    text = torch.lerp(latents.text[:1], latents.text[1:], share)  # (shares, L, D)
    schedule = chain.schedule.to(subject.device)
    rows, labels = [], []
    for depth in DEPTHS:
        step = round(depth * (schedule.num_timesteps - 1))
        generators = [subject.generator() for _ in SHARES]  # one noise for all
        mixed = interpolate(
            schedule,
            denoiser(subject.components.unet, text, num_outputs=chain.num_outputs),
            (first, second),
            eps=standard_normal(first, generator=generators),
            depth=step,
            share=share[..., None].to(subject.device),
            generator=generators,
            prediction_type=chain.prediction_type,
            variance_type=chain.variance_type,
        )
        rows.append(mixed)
        told = float(schedule.timesteps[step])
        labels += [f"t = {told:.0f}, {part:.0%}" for part in SHARES]
    return _sheet(subject, torch.cat(rows), labels, columns=len(SHARES))


def _sheet(subject: Subject, z0: Tensor, labels: list[str], *, columns: int) -> Image.Image:
    vae, pictures = subject.components.vae, []
    for part in z0.float().split(subject.batch_size):
        shown, _ = decode(
            part, vae=vae, safety_checker=None, feature_extractor=None, output_type="pil"
        )
        pictures += shown
    return draw_sheet(pictures, labels, columns=columns)
