"""`evaluate.py --bound`: the bound of a model on held-out images, its tables, plots and images.

Ho et al. 2020, Sec. 4.3 and 4.4; Nichol & Dhariwal 2021, Sec. 3.1 for the learned variance.

Sheets of what the reverse chain shows on its way (Ho et al. 2020, Sec. 4.3 and 4.4).
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from latentdiff.atomic import atomic_file, write_text
from latentdiff.config.evaluation import BoundOptions
from latentdiff.diffusion.bound import TimestepPlan, difference, estimate
from latentdiff.diffusion.ddpm import standard_normal
from latentdiff.diffusion.theory.progressive_coding import interpolate, progressive_x0
from latentdiff.evaluation.eval_set import EvalModel
from latentdiff.evaluation.metrics.vlb import (
    LEARNED,
    Chain,
    TimestepBin,
    caption_bound,
    conditional_bound,
    denoiser,
    pilot_plan,
    summary,
    timestep_bins,
    to_json,
)
from latentdiff.evaluation.report import plots
from latentdiff.image_grid import draw_grid
from latentdiff.pipeline.output import decode


def bound_report(subject: EvalModel, out: Path, options: BoundOptions) -> dict[str, Any]:
    """Estimate the bound, write plots and images into `out`, return the figures as JSON values.

    Writes bound_terms.png, rate_distortion.png, progressive.png and interpolation.png. ValueError
    for options out of range.
    """
    chain = _checked(subject, options)
    plan = pilot_plan(chain, subject, num_draws=options.draws, num_pilot=options.pilot)
    bound = caption_bound(chain, subject, plan=plan, repeats=options.repeats)
    num_timesteps = chain.schedule.num_timesteps
    along = timestep_bins(bound, num_timesteps)
    plots.plot_terms(along, out / "bound_terms.png")
    plots.plot_rate_distortion(along, out / "rate_distortion.png")
    if options.image_steps:
        _draw(subject, options, out)
    z0 = subject.latents.z0
    draws = num_timesteps - 1 if plan is None else options.draws
    figures = summary(bound, num_dims=z0[0].numel()) | {
        "num_images": len(z0),
        "latent_shape": list(z0.shape[1:]),
        "num_timesteps": num_timesteps,
        "variance_type": chain.variance_type,
        "prediction_type": chain.prediction_type,
        "draws": draws,
        "repeats": options.repeats,
        "along_the_chain": [_row(stretch) for stretch in along],
    }
    if options.compare_variance:
        figures["variance"] = compare_variances(subject, options)
    return figures


def compare_variances(subject: EvalModel, options: BoundOptions) -> dict[str, Any]:
    """Bound the same images under the learned and the fixed variances, on shorter chains.

    The mean is the same U-Net's, the noise too, so "over_learned" is what the variance alone costs.
    """
    figures: dict[str, Any] = {}
    for steps in options.compare_variance:
        chains = {
            name: Chain.of(subject.components, steps=steps, variance_type=name)
            for name in (LEARNED, "fixed_small", "fixed_large")
        }
        num_timesteps = chains[LEARNED].schedule.num_timesteps
        plan = None
        if num_timesteps - 1 > options.draws:
            plan = TimestepPlan.uniform(num_timesteps, num_draws=options.draws)
        samples = {
            name: conditional_bound(chain, subject, plan=plan, repeats=options.repeats)
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


def write_metrics(out: Path, metrics: dict[str, Any]) -> Path:
    """Put sections of figures into out/metrics.json beside those that are there; return its path.

    Those of another model or other data are left out. ValueError where the file is no JSON object.
    """
    path = out / "metrics.json"
    known: Any = {}
    if path.is_file():
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}; delete it") from error
    if not isinstance(known, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(known).__name__}; delete it")
    if any(known.get(name) != metrics.get(name) for name in ("model", "data")):
        known = {}
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(known | metrics, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")
    return path


def _checked(subject: EvalModel, options: BoundOptions) -> Chain:
    """Return the chain to bound; ValueError before any work for what cannot be done."""
    for name, least in (("draws", 1), ("repeats", 1), ("pilot", 1), ("image_steps", 0)):
        if (value := getattr(options, name)) < least:
            raise ValueError(f"{name}={value}, expected at least {least}")
    plots.check_matplotlib()
    for steps in options.compare_variance:
        Chain.of(subject.components, steps=steps, variance_type=LEARNED)
    return Chain.of(subject.components, steps=options.chain, variance_type=options.variance_type)


def _draw(subject: EvalModel, options: BoundOptions, out: Path) -> None:
    full = Chain.of(subject.components, variance_type=options.variance_type)
    steps = min(options.image_steps, full.schedule.num_timesteps)
    chain = Chain.of(subject.components, steps=str(steps), variance_type=options.variance_type)
    _save(progressive_sheet(chain, subject), out / "progressive.png")
    if len(subject.latents) > 1:
        _save(interpolation_sheet(chain, subject), out / "interpolation.png")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG")


def _row(stretch: TimestepBin) -> dict[str, Any]:
    return {
        "t": [stretch.first, stretch.last],
        "unconditional": to_json(stretch.unconditional),
        "conditional": to_json(stretch.conditional),
        "caption": to_json(stretch.caption),
        "x0_rmse": stretch.x0_rmse if math.isfinite(stretch.x0_rmse) else None,
        "rate": stretch.rate,
    }


NUM_SHOWN = 8  # predictions of a chain
DEPTHS = (0.1, 0.25, 0.5, 0.75, 1.0)
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@torch.no_grad()
def progressive_sheet(chain: Chain, subject: EvalModel, *, num_images: int = 6) -> Image.Image:
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
def interpolation_sheet(chain: Chain, subject: EvalModel) -> Image.Image:
    """Draw two images mixed at several depths, a row each, their text states mixed alike.

    The first of the images and the one in the middle; ValueError where there is only one.
    """
    if len(subject.latents) < 2:
        raise ValueError("interpolation needs two images, and num_images leaves one; raise it")
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


def _sheet(subject: EvalModel, z0: Tensor, labels: list[str], *, columns: int) -> Image.Image:
    vae, images = subject.components.vae, []
    for part in z0.float().split(subject.batch_size):
        shown, _ = decode(
            part, vae=vae, safety_checker=None, feature_extractor=None, output_type="pil"
        )
        images += shown
    return draw_grid(images, labels, columns=columns)
