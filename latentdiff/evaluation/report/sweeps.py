"""What guidance buys and costs: fidelity to the caption against diversity, by scale.

Ho & Salimans 2022, Sec. 4. Fidelity is how many bits an image's caption is worth to the unguided
model itself (its implicit classifier, in nats the log of p(z0 | caption) / p(z0)), and CLIP's
cosine where one is given. Diversity is the distance between images of one caption.

What sampling steps buy: fidelity, diversity, and how far the image still is from the last.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.config.evaluation import SweepOptions
from latentdiff.diffusion.bound import TimestepPlan, difference, estimate
from latentdiff.evaluation.eval_set import CaptionedLatents, EvalModel
from latentdiff.evaluation.metrics.clip import Clip
from latentdiff.evaluation.metrics.vlb import Chain, caption_bound, to_json
from latentdiff.evaluation.report import plots
from latentdiff.models.latents import LatentCodec

DRAWS = 32  # timesteps an image for its fidelity


def check_sweep(options: SweepOptions) -> None:
    """Raise ValueError for options out of range, or where nothing can draw the plots."""
    for name, least in (("sweep_captions", 1), ("sweep_images", 2), ("sweep_steps", 1)):
        if (value := getattr(options, name)) < least:
            raise ValueError(f"{name}={value}, expected at least {least}")
    plots.check_matplotlib()


def sweep_report(
    subject: EvalModel, out: Path, options: SweepOptions, *, clip: Clip | None = None
) -> dict[str, Any]:
    """Sweep the scales, write guidance_sweep.png into `out`, return the figures as JSON values.

    clip: for a second fidelity.
    """
    check_sweep(options)
    points = guidance_sweep(
        subject,
        options.guidance_sweep,
        num_captions=options.sweep_captions,
        images_per_caption=options.sweep_images,
        num_steps=options.sweep_steps,
        clip=clip,
    )
    plots.plot_sweep(points, out / "guidance_sweep.png")
    return {
        "captions": min(options.sweep_captions, len(subject.latents)),
        "images_per_caption": options.sweep_images,
        "num_steps": options.sweep_steps,
        "points": points,
    }


def guidance_sweep(
    subject: EvalModel,
    scales: Sequence[float],
    *,
    num_captions: int,
    images_per_caption: int,
    num_steps: int,
    clip: Clip | None = None,
) -> list[dict[str, Any]]:
    """Draw the same captions from the same noise at each scale and measure the images.

    Returns one JSON object a scale: guidance_scale, fidelity (bits per image), diversity (root
    mean square distance of latents), each with its interval over captions, and clip_score.
    """
    asked = spread_captions(subject, num_captions, images_per_caption=images_per_caption)
    points = []
    for scale in scales:
        drawn = sample_latents(subject, asked, guidance_scale=scale, num_steps=num_steps)
        figures = measure_scale(subject, drawn, per_caption=images_per_caption, clip=clip)
        points.append({"guidance_scale": scale} | figures)
    return points


def spread_captions(
    subject: EvalModel, num_captions: int, *, images_per_caption: int
) -> CaptionedLatents:
    """Take captions evenly spread over the subject's, each `images_per_caption` times."""
    spread = torch.linspace(0, len(subject.latents) - 1, min(num_captions, len(subject.latents)))
    places = spread.round().long().repeat_interleave(images_per_caption)
    return subject.latents.select(places.tolist())


def measure_scale(
    subject: EvalModel, drawn: CaptionedLatents, *, per_caption: int, clip: Clip | None
) -> dict[str, Any]:
    """Return fidelity, diversity and clip_score of drawn latents as JSON values."""
    by_caption = drawn.z0.unflatten(0, (-1, per_caption))
    figures = {
        "fidelity": to_json(estimate(_caption_bits(subject, drawn).view(-1, per_caption))),
        "diversity": to_json(estimate(pair_distance(by_caption)[:, None])),
    }
    if clip is not None:
        cosine = _clip_score(subject, drawn, clip).view(-1, per_caption)
        figures["clip_score"] = to_json(estimate(cosine.double()))
    return figures


def pair_distance(z0: Tensor) -> Tensor:
    """Return the root mean square distance between images of a caption, (M, P, ...) -> (M,)."""
    flat = z0.double().flatten(2)  # (M, P, D)
    squared = 2 * flat.var(1).mean(1)  # the mean over ordered pairs is twice the variance
    return squared.sqrt()


def sample_latents(
    subject: EvalModel, asked: CaptionedLatents, *, guidance_scale: float, num_steps: int
) -> CaptionedLatents:
    """Draw an image for each caption from its own seed, the same at every call."""
    pipe, z0 = subject.pipeline(), []
    for start in range(0, len(asked), subject.batch_size):
        captions = list(asked.captions[start : start + subject.batch_size])
        drawn = pipe(
            captions,
            seed=subject.seed + start,
            guidance_scale=guidance_scale,
            num_inference_steps=num_steps,
            output_type="latent",
            return_dict=False,
        )
        z0.append(drawn[0].cpu())
    return CaptionedLatents(asked.captions, torch.cat(z0), asked.text, asked.null_text)


def _caption_bits(subject: EvalModel, drawn: CaptionedLatents) -> Tensor:
    """Return how many bits each image's caption is worth, (N,)."""
    chain = Chain.of(subject.components)
    num_timesteps = chain.schedule.num_timesteps
    plan = TimestepPlan.uniform(num_timesteps, num_draws=min(DRAWS, num_timesteps - 1))
    bound = caption_bound(chain, subject, plan=plan, repeats=1, latents=drawn)
    bits = difference(bound.unconditional, bound.conditional)[:, 0]
    return bits * drawn.z0[0].numel()


@torch.no_grad()
def _clip_score(subject: EvalModel, drawn: CaptionedLatents, clip: Clip) -> Tensor:
    codec, scores = LatentCodec(subject.components.vae), []
    for start in range(0, len(drawn), subject.batch_size):
        part = drawn.select(range(start, min(start + subject.batch_size, len(drawn))))
        pixels = codec.decode(part.z0.to(subject.device))
        scores.append(clip.score(pixels, part.captions).cpu())
    return torch.cat(scores)


def step_report(
    subject: EvalModel,
    out: Path,
    steps: Sequence[int],
    *,
    options: SweepOptions,
    guidance_scale: float,
    clip: Clip | None = None,
) -> dict[str, Any]:
    """Draw the same captions from the same noise with each number of steps, and measure.

    Writes step_sweep.png into `out`. A point has fidelity, diversity and clip_score as those of the
    guidance sweep, and "to_most_steps", the root mean square distance of an image's latents to
    those with the most steps.
    """
    check_sweep(options)
    asked = spread_captions(
        subject, options.sweep_captions, images_per_caption=options.sweep_images
    )
    chosen = sorted(set(steps))
    drawn = [
        sample_latents(subject, asked, guidance_scale=guidance_scale, num_steps=num)
        for num in chosen
    ]
    points = []
    for num, one in zip(chosen, drawn, strict=True):
        apart = (one.z0 - drawn[-1].z0).double().square().flatten(1).mean(1).sqrt()
        figures = measure_scale(subject, one, per_caption=options.sweep_images, clip=clip)
        figures["to_most_steps"] = to_json(estimate(apart.view(-1, options.sweep_images)))
        points.append({"num_steps": num} | figures)
    plots.plot_steps(points, out / "step_sweep.png")
    return {
        "captions": min(options.sweep_captions, len(subject.latents)),
        "images_per_caption": options.sweep_images,
        "guidance_scale": guidance_scale,
        "points": points,
    }
