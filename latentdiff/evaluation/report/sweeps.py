"""Sweeps of the guidance scale and of the number of sampling steps, and their sections.

Fidelity to the caption against diversity (Ho & Salimans 2022, Sec. 4). Fidelity is how many bits an
image's caption is worth to the unguided model itself (its implicit classifier, in nats the log of
p(z0 | caption) / p(z0)), and CLIP's cosine where a CLIP is given. Diversity is the distance between
images of one caption.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.config.options import SweepOptions
from latentdiff.config.validation import check_ranges
from latentdiff.diffusion.bound import TimestepPlan, difference, estimate
from latentdiff.evaluation.eval_set import EvalModel
from latentdiff.evaluation.metrics.clip import Clip
from latentdiff.evaluation.metrics.vlb import CaptionedLatents, Chain, caption_bound, to_json
from latentdiff.evaluation.report import plots
from latentdiff.evaluation.report.section import ReportRow, Section, row_value
from latentdiff.models.latents import LatentCodec

NUM_DRAWS = 32  # timesteps an image for its fidelity


def check_sweep(options: SweepOptions) -> None:
    """Raise ValueError for options out of range, or where matplotlib is missing."""
    check_ranges(options)
    plots.check_matplotlib()


def guidance_report(
    eval_model: EvalModel, out: Path, options: SweepOptions, *, clip: Clip | None = None
) -> dict[str, Any]:
    """Sweep the scales, write guidance_sweep.png into `out`, return the figures as JSON values.

    clip: for a second fidelity.
    """
    check_sweep(options)
    points = guidance_sweep(
        eval_model,
        options.guidance_sweep,
        num_captions=options.sweep_captions,
        images_per_caption=options.sweep_images,
        num_steps=options.sweep_steps,
        clip=clip,
    )
    plots.plot_guidance(points, out / "guidance_sweep.png")
    return {
        "captions": min(options.sweep_captions, len(eval_model.latents)),
        "images_per_caption": options.sweep_images,
        "num_steps": options.sweep_steps,
        "points": points,
    }


def guidance_section(figures: dict[str, Any], out: Path) -> Section:
    """Show the figures and the plot of `guidance_report`."""
    rows = _sweep_rows(figures, "guidance_scale", "guidance {:g}")
    notes = [
        "Fidelity: bits that an image's caption is worth to the unguided model. Diversity: root "
        "mean square distance between latents of a caption."
    ]
    images = [out / "guidance_sweep.png"]
    return Section(
        "guidance", "Guidance scale", figures, rows, notes, plots=images, has_headline=False
    )


def guidance_sweep(
    eval_model: EvalModel,
    scales: Sequence[float],
    *,
    num_captions: int,
    images_per_caption: int,
    num_steps: int,
    clip: Clip | None = None,
) -> list[dict[str, Any]]:
    """Sample the same captions from the same noise at each scale and measure the images.

    Returns one JSON object a scale: guidance_scale, fidelity (bits per image), diversity (root
    mean square distance of latents), each with its interval over captions, and clip_score.
    """
    chosen = subsample_captions(eval_model, num_captions, images_per_caption=images_per_caption)
    points = []
    for scale in scales:
        generated = sample_latents(eval_model, chosen, guidance_scale=scale, num_steps=num_steps)
        figures = measure_generated(
            eval_model, generated, per_caption=images_per_caption, clip=clip
        )
        points.append({"guidance_scale": scale} | figures)
    return points


def subsample_captions(
    eval_model: EvalModel, num_captions: int, *, images_per_caption: int
) -> CaptionedLatents:
    """Take captions evenly spaced over the images', each `images_per_caption` times."""
    spaced = torch.linspace(
        0, len(eval_model.latents) - 1, min(num_captions, len(eval_model.latents))
    )
    indices = spaced.round().long().repeat_interleave(images_per_caption)
    return eval_model.latents.select(indices.tolist())


def measure_generated(
    eval_model: EvalModel, generated: CaptionedLatents, *, per_caption: int, clip: Clip | None
) -> dict[str, Any]:
    """Return fidelity, diversity and clip_score of generated latents as JSON values."""
    by_caption = generated.z0.unflatten(0, (-1, per_caption))
    figures = {
        "fidelity": to_json(estimate(_caption_bits(eval_model, generated).view(-1, per_caption))),
        "diversity": to_json(estimate(pair_distance(by_caption)[:, None])),
    }
    if clip is not None:
        cosine = _clip_score(eval_model, generated, clip).view(-1, per_caption)
        figures["clip_score"] = to_json(estimate(cosine.double()))
    return figures


def pair_distance(z0: Tensor) -> Tensor:
    """Return the root mean square distance between images of a caption, (M, P, ...) -> (M,)."""
    flat = z0.double().flatten(2)  # (M, P, D)
    squared = 2 * flat.var(1).mean(1)  # the mean over ordered pairs is twice the variance
    return squared.sqrt()


def sample_latents(
    eval_model: EvalModel,
    captioned: CaptionedLatents,
    *,
    guidance_scale: float,
    num_steps: int,
) -> CaptionedLatents:
    """Sample latents for each caption from its own seed, the same at every call."""
    pipe, z0 = eval_model.pipeline(), []
    for start in range(0, len(captioned), eval_model.batch_size):
        captions = list(captioned.captions[start : start + eval_model.batch_size])
        sampled, _ = pipe(
            captions,
            prompt_weighting=False,
            seed=eval_model.seed + start,
            guidance_scale=guidance_scale,
            num_inference_steps=num_steps,
            output_type="latent",
            return_dict=False,
        )
        z0.append(sampled.cpu())
    return replace(captioned, z0=torch.cat(z0))


def _caption_bits(eval_model: EvalModel, generated: CaptionedLatents) -> Tensor:
    """Return how many bits each image's caption is worth, (N,)."""
    chain = Chain.of(eval_model.components)
    num_timesteps = chain.schedule.num_timesteps
    plan = TimestepPlan.uniform(num_timesteps, num_draws=min(NUM_DRAWS, num_timesteps - 1))
    bound = caption_bound(
        chain,
        generated,
        plan=plan,
        repeats=1,
        batch_size=eval_model.batch_size,
        seed=eval_model.seed,
    )
    bits = difference(bound.unconditional, bound.conditional)[:, 0]
    return bits * generated.z0[0].numel()


@torch.no_grad()
def _clip_score(eval_model: EvalModel, generated: CaptionedLatents, clip: Clip) -> Tensor:
    codec, scores = LatentCodec(eval_model.components.vae), []
    for start in range(0, len(generated), eval_model.batch_size):
        part = generated.select(range(start, min(start + eval_model.batch_size, len(generated))))
        pixels = codec.decode(part.z0.to(eval_model.device))
        scores.append(clip.score(pixels, part.captions).cpu())
    return torch.cat(scores)


def step_report(
    eval_model: EvalModel,
    out: Path,
    steps: Sequence[int],
    *,
    options: SweepOptions,
    guidance_scale: float,
    clip: Clip | None = None,
) -> dict[str, Any]:
    """Sample the same captions from the same noise with each number of steps, and measure.

    Writes step_sweep.png into `out`. A point has fidelity, diversity and clip_score as those of the
    guidance sweep, and "to_most_steps", the root mean square distance of an image's latents to
    those with the most steps.
    """
    check_sweep(options)
    captioned = subsample_captions(
        eval_model, options.sweep_captions, images_per_caption=options.sweep_images
    )
    rising = sorted(set(steps))
    generated = [
        sample_latents(eval_model, captioned, guidance_scale=guidance_scale, num_steps=num)
        for num in rising
    ]
    points = []
    for num, one in zip(rising, generated, strict=True):
        apart = (one.z0 - generated[-1].z0).double().square().flatten(1).mean(1).sqrt()
        figures = measure_generated(eval_model, one, per_caption=options.sweep_images, clip=clip)
        figures["to_most_steps"] = to_json(estimate(apart.view(-1, options.sweep_images)))
        points.append({"num_steps": num} | figures)
    plots.plot_steps(points, out / "step_sweep.png")
    return {
        "captions": min(options.sweep_captions, len(eval_model.latents)),
        "images_per_caption": options.sweep_images,
        "guidance_scale": guidance_scale,
        "points": points,
    }


def steps_section(figures: dict[str, Any], out: Path) -> Section:
    """Show the figures and the plot of `step_report`."""
    rows = _sweep_rows(figures, "num_steps", "{} steps")
    notes = [f"At guidance {figures['guidance_scale']:g}, from the same noise each time."]
    images = [out / "step_sweep.png"]
    return Section(
        "steps", "Sampling steps", figures, rows, notes, plots=images, has_headline=False
    )


def _sweep_rows(figures: dict[str, Any], key: str, label: str) -> list[ReportRow]:
    names = ("fidelity", "diversity", "clip_score", "to_most_steps")
    return [
        ReportRow(
            f"{label.format(point[key])}: {name.replace('_', ' ')}", row_value(point[name], num)
        )
        for num in [figures["captions"]]
        for point in figures["points"]
        for name in names
        if name in point
    ]
