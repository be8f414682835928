"""`evaluate.py --bound`: the bound of a model on held-out pictures, its tables, plots and pictures.

Ho et al. 2020, Sec. 4.3 and 4.4; Nichol & Dhariwal 2021, Sec. 3.1 for the learned variance.
"""

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.diffusion.bound import TimestepPlan, difference, estimate
from latentdiff.evaluation import plots
from latentdiff.evaluation.bound import (
    LEARNED,
    Chain,
    Stretch,
    caption_bound,
    conditional_bound,
    pilot_plan,
    plain,
    stretches,
    summary,
)
from latentdiff.evaluation.bound_data import Subject
from latentdiff.evaluation.bound_pictures import interpolation_sheet, progressive_sheet
from latentdiff.evaluation.options import BoundOptions
from latentdiff.whole_file import whole_file, write_text


def bound_report(subject: Subject, out: Path, options: BoundOptions) -> dict[str, Any]:
    """Estimate the bound, write plots and pictures into `out`, return the figures as JSON values.

    Writes bound_terms.png, rate_distortion.png, progressive.png and interpolation.png. ValueError
    for options out of range.
    """
    chain = _checked(subject, options)
    plan = pilot_plan(chain, subject, num_draws=options.draws, num_pilot=options.pilot)
    bound = caption_bound(chain, subject, plan=plan, repeats=options.repeats)
    num_timesteps = chain.schedule.num_timesteps
    along = stretches(bound, num_timesteps)
    plots.plot_terms(along, out / "bound_terms.png")
    plots.plot_rate_distortion(along, out / "rate_distortion.png")
    if options.picture_steps:
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


def compare_variances(subject: Subject, options: BoundOptions) -> dict[str, Any]:
    """Bound the same pictures under the learned and the fixed variances, on shorter chains.

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
                "bits_per_dim": plain(estimate(s.total())),
                "over_learned": plain(estimate(difference(s, samples[LEARNED]))),
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


def _checked(subject: Subject, options: BoundOptions) -> Chain:
    """Return the chain to bound; ValueError before any work for what cannot be done."""
    for name, least in (("draws", 1), ("repeats", 1), ("pilot", 1), ("picture_steps", 0)):
        if (value := getattr(options, name)) < least:
            raise ValueError(f"{name}={value}, expected at least {least}")
    plots.check_matplotlib()
    for steps in options.compare_variance:
        Chain.of(subject.components, steps=steps, variance_type=LEARNED)
    return Chain.of(subject.components, steps=options.chain, variance_type=options.variance_type)


def _draw(subject: Subject, options: BoundOptions, out: Path) -> None:
    full = Chain.of(subject.components, variance_type=options.variance_type)
    steps = min(options.picture_steps, full.schedule.num_timesteps)
    chain = Chain.of(subject.components, steps=str(steps), variance_type=options.variance_type)
    _save(progressive_sheet(chain, subject), out / "progressive.png")
    if len(subject.latents) > 1:
        _save(interpolation_sheet(chain, subject), out / "interpolation.png")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG")


def _row(stretch: Stretch) -> dict[str, Any]:
    return {
        "t": [stretch.first, stretch.last],
        "unconditional": plain(stretch.unconditional),
        "conditional": plain(stretch.conditional),
        "caption": plain(stretch.caption),
        "x0_rmse": stretch.x0_rmse if math.isfinite(stretch.x0_rmse) else None,
        "rate": stretch.rate,
    }
