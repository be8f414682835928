"""Section of `--bound`: the variational bound of a model on held-out images, plotted and tabled.

Next to it, sheets of the predicted x0 along the reverse chain and of interpolations. Ho et al.
2020, Sec. 4.3 and 4.4; Nichol & Dhariwal 2021, Sec. 3.1 for the learned variance.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.atomic import atomic_file
from latentdiff.config.options import BoundOptions
from latentdiff.config.validation import check_ranges
from latentdiff.diffusion.bound import TimestepPlan, difference, estimate
from latentdiff.diffusion.ddpm import randn_like
from latentdiff.diffusion.theory.progressive_coding import interpolate, progressive_x0
from latentdiff.evaluation.eval_set import EvalModel
from latentdiff.evaluation.metrics.vlb import (
    LEARNED,
    Chain,
    TimestepBin,
    bound_samples,
    caption_bound,
    pilot_plan,
    summary,
    timestep_bins,
    to_json,
    unet_model,
)
from latentdiff.evaluation.report import plots
from latentdiff.evaluation.report.section import ReportRow, Section, row_value
from latentdiff.image_grid import draw_grid
from latentdiff.pipeline.output import decode

BOUND_IMAGES = ("bound_terms.png", "rate_distortion.png", "progressive.png", "interpolation.png")
NUM_SHOWN = 8  # predictions of a chain
DEPTHS = (0.1, 0.25, 0.5, 0.75, 1.0)
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def bound_report(eval_model: EvalModel, out: Path, options: BoundOptions) -> dict[str, Any]:
    """Estimate the bound, write plots and images into `out`, return the figures as JSON values.

    Writes bound_terms.png, rate_distortion.png, progressive.png and interpolation.png. ValueError
    for options out of range.
    """
    chain = bound_chain(eval_model, options)
    latents, batch_size, seed = eval_model.latents, eval_model.batch_size, eval_model.seed
    plan = pilot_plan(
        chain,
        latents,
        num_draws=options.draws,
        num_pilot=options.pilot,
        batch_size=batch_size,
        seed=seed,
    )
    bound = caption_bound(
        chain, latents, plan=plan, repeats=options.repeats, batch_size=batch_size, seed=seed
    )
    num_timesteps = chain.schedule.num_timesteps
    along = timestep_bins(bound, num_timesteps)
    plots.plot_terms(along, out / "bound_terms.png")
    plots.plot_rate_distortion(along, out / "rate_distortion.png")
    if options.image_steps:
        _write_sheets(eval_model, options, out)
    z0 = latents.z0
    draws = num_timesteps - 1 if plan is None else options.draws
    figures = summary(bound, num_dims=z0[0].numel()) | {
        "num_images": len(z0),
        "latent_shape": list(z0.shape[1:]),
        "num_timesteps": num_timesteps,
        "variance_type": chain.variance_type,
        "prediction_type": chain.prediction_type,
        "draws": draws,
        "repeats": options.repeats,
        "along_the_chain": [_bin_json(one) for one in along],
    }
    if options.compare_variance:
        figures["variance"] = compare_variances(eval_model, options)
    return figures


def bound_section(figures: dict[str, Any], out: Path) -> Section:
    """Show the figures and plots of `bound_report`."""
    num = figures["num_images"]
    estimates = (
        ("Bits per dimension with captions", figures["conditional"]["bits_per_dim"]),
        ("Bits per dimension without", figures["unconditional"]["bits_per_dim"]),
        ("Caption information, bits per dimension", figures["caption_bits_per_dim"]),
        ("Caption information, bits per image", figures["caption_bits_per_image"]),
    )
    rows = [ReportRow(label, row_value(estimate, num)) for label, estimate in estimates]
    shape = " x ".join(map(str, figures["latent_shape"]))
    notes = [
        f"The variational bound of latents of {shape} over {figures['num_timesteps']} steps: a "
        "density, so it may be negative and compares models of the same latents only."
    ]
    images = [out / name for name in BOUND_IMAGES if (out / name).is_file()]
    return Section("bound", "Variational bound", figures, rows, notes, plots=images)


def compare_variances(eval_model: EvalModel, options: BoundOptions) -> dict[str, Any]:
    """Bound the same images under the learned and the fixed variances, on shorter chains.

    All share the U-Net's mean and the noise, so "over_learned" is the cost of the variance alone.
    """
    figures: dict[str, Any] = {}
    for steps in options.compare_variance:
        chains = {
            name: Chain.of(eval_model.components, steps=steps, variance_type=name)
            for name in (LEARNED, "fixed_small", "fixed_large")
        }
        num_timesteps = chains[LEARNED].schedule.num_timesteps
        plan = None
        if num_timesteps - 1 > options.draws:
            plan = TimestepPlan.uniform(num_timesteps, num_draws=options.draws)
        samples = {
            name: bound_samples(
                chain,
                eval_model.latents.z0,
                eval_model.latents.conditioning,
                plan=plan,
                repeats=options.repeats,
                batch_size=eval_model.batch_size,
                seed=eval_model.seed,
            )
            for name, chain in chains.items()
        }
        figures[steps] = {
            name: {
                "bits_per_dim": to_json(estimate(s.total())),
                "over_learned": to_json(estimate(difference(s, samples[LEARNED]))),
            }
            for name, s in samples.items()
        }
    return figures


def check_bound(options: BoundOptions) -> None:
    """Raise ValueError for options out of range, or where matplotlib is missing."""
    check_ranges(options)
    plots.check_matplotlib()


def bound_chain(eval_model: EvalModel, options: BoundOptions) -> Chain:
    """Return the chain to bound; ValueError before any work for options that cannot be used."""
    check_bound(options)
    for steps in options.compare_variance:
        Chain.of(eval_model.components, steps=steps, variance_type=LEARNED)
    return Chain.of(eval_model.components, steps=options.chain, variance_type=options.variance_type)


def _write_sheets(eval_model: EvalModel, options: BoundOptions, out: Path) -> None:
    full = Chain.of(eval_model.components, variance_type=options.variance_type)
    steps = min(options.image_steps, full.schedule.num_timesteps)
    chain = Chain.of(eval_model.components, steps=str(steps), variance_type=options.variance_type)
    _save(progressive_sheet(chain, eval_model), out / "progressive.png")
    if len(eval_model.latents) > 1:
        _save(interpolation_sheet(chain, eval_model), out / "interpolation.png")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG")


def _bin_json(one: TimestepBin) -> dict[str, Any]:
    return {
        "t": [one.first, one.last],
        "unconditional": to_json(one.unconditional),
        "conditional": to_json(one.conditional),
        "caption": to_json(one.caption),
        "x0_rmse": one.x0_rmse if math.isfinite(one.x0_rmse) else None,
        "rate": one.rate,
    }


@torch.no_grad()
def progressive_sheet(chain: Chain, eval_model: EvalModel, *, num_images: int = 6) -> Image.Image:
    """Show the predicted x0 along one reverse chain for some captions, noisiest first.

    chain: a re-spaced one saves time; no guidance.
    """
    latents = eval_model.latents.select(varied_indices(eval_model.latents.captions, num_images))
    num_timesteps = chain.schedule.num_timesteps
    ends = torch.linspace(num_timesteps - 1, 0, min(NUM_SHOWN, num_timesteps))
    shown = [int(t) for t in ends.round()]
    generator = eval_model.generator()
    xt = torch.randn(latents.z0.shape, generator=generator).to(eval_model.device)
    x0 = progressive_x0(
        chain.schedule.to(eval_model.device),
        unet_model(eval_model.components.unet, latents.conditioning, num_outputs=chain.num_outputs),
        xt,
        generator=generator,
        prediction_type=chain.prediction_type,
        variance_type=chain.variance_type,
        shown=shown,
    )
    timesteps = chain.schedule.timesteps[shown].tolist()
    labels = [
        f"t = {timesteps[k]:.0f}" + (f", {caption}" if k == 0 else "")
        for caption in latents.captions
        for k in range(len(shown))
    ]
    return _sheet(eval_model, x0.transpose(0, 1).flatten(0, 1), labels, columns=len(shown))


@torch.no_grad()
def interpolation_sheet(chain: Chain, eval_model: EvalModel) -> Image.Image:
    """Show two images mixed at several depths, a row each, with their prompt embeds mixed alike.

    Takes two images of unlike captions if there are; ValueError where there is only one image.
    """
    if len(eval_model.latents) < 2:
        raise ValueError("interpolation needs two images, and num_heldout leaves one; raise it")
    latents = eval_model.latents.select(varied_indices(eval_model.latents.captions, 2))
    first, second = (z0.expand(len(SHARES), -1, -1, -1).to(eval_model.device) for z0 in latents.z0)
    share = torch.tensor(SHARES)
    conditioning = latents.conditioning[:1].lerp(latents.conditioning[1:], share)
    schedule = chain.schedule.to(eval_model.device)
    rows, labels = [], []
    for depth in DEPTHS:
        step = round(depth * (schedule.num_timesteps - 1))
        generators = [eval_model.generator() for _ in SHARES]  # one noise for all
        mixed = interpolate(
            schedule,
            unet_model(eval_model.components.unet, conditioning, num_outputs=chain.num_outputs),
            (first, second),
            eps=randn_like(first, generator=generators),
            depth=step,
            share=share.view(-1, 1, 1, 1).to(eval_model.device),
            generator=generators,
            prediction_type=chain.prediction_type,
            variance_type=chain.variance_type,
        )
        rows.append(mixed)
        t = float(schedule.timesteps[step])
        labels += [f"t = {t:.0f}, {part:.0%}" for part in SHARES]
    return _sheet(eval_model, torch.cat(rows), labels, columns=len(SHARES))


def varied_indices(captions: Sequence[str], count: int) -> list[int]:
    """Return up to `count` indices, evenly spaced over the first images of each caption.

    Over all images where there are too few captions.
    """
    first = {caption: i for i, caption in reversed(list(enumerate(captions)))}.values()
    found = sorted(first) if len(first) >= count else list(range(len(captions)))
    count = min(count, len(found))
    return [found[round(k * (len(found) - 1) / max(1, count - 1))] for k in range(count)]


def _sheet(eval_model: EvalModel, z0: Tensor, labels: list[str], *, columns: int) -> Image.Image:
    vae, images = eval_model.components.vae, []
    for part in z0.float().split(eval_model.batch_size):
        shown, _ = decode(
            part, vae=vae, safety_checker=None, feature_extractor=None, output_type="pil"
        )
        images += shown
    return draw_grid(images, labels, columns=columns)
