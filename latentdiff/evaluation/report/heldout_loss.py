"""The held-out loss of fixed triples, and what the model makes of captions, for a report.

Every image is measured at several timesteps, stratified over the chain, under its own caption,
another image's and none (heldout.py). Intervals are over images.
"""

from typing import Any

import torch
from torch import Tensor

from latentdiff.evaluation.eval_set import EvalModel
from latentdiff.evaluation.metrics.bootstrap import bootstrap_difference, bootstrap_mean
from latentdiff.evaluation.metrics.heldout_loss import (
    CAPTIONS,
    NUM_BUCKETS,
    Triples,
    bucket_labels,
    stratified_timesteps,
    triple_losses,
)
from latentdiff.evaluation.metrics.vlb import Chain, denoiser
from latentdiff.evaluation.report.section import Row, Score, Section, plain_interval

FEWEST_TRIPLES = 512


def loss_section(subject: EvalModel) -> tuple[Section, Score]:
    """Measure the model on its subject's images; FloatingPointError where a loss is no number."""
    chain = Chain.of(subject.components)
    num_timesteps = chain.schedule.num_timesteps
    triples = fixed_triples(subject, num_timesteps=num_timesteps)
    losses = _losses(chain, subject, triples)
    num = len(subject.latents)
    true, shuffled, null = (losses[name].view(-1, num).mean(0) for name in CAPTIONS)  # (N,) each
    intervals = {
        "loss": bootstrap_mean(true),
        "caption_use": bootstrap_mean((null - true) / null.mean()),
        "caption_match": bootstrap_mean((shuffled - true) / shuffled.mean()),
    }
    told = (
        ("Held-out loss", f"{len(triples)} triples"),
        ("Worth of the caption against none", "share of the loss without one that it saves"),
        ("Worth of the right caption against another", "0 for a model that ignores captions"),
    )
    rows = [
        Row(label, interval, note, is_share=name != "loss")
        for (name, interval), (label, note) in zip(intervals.items(), told, strict=True)
    ]
    by_timestep, some = _by_timestep(losses, triples.t, num_timesteps)
    figures: dict[str, Any] = {name: plain_interval(x) for name, x in intervals.items()}
    figures |= {
        "by_timestep": by_timestep,
        "prediction_type": chain.prediction_type,
        "num_images": num,
        "num_triples": len(triples),
    }
    notes = [
        "Squared errors of the model's own prediction at fixed timesteps and noise: they compare "
        "between models of the same latents and the same prediction type."
    ]
    section = Section("heldout", "Held-out loss and use of captions", figures, rows + some, notes)
    return section, Score("held-out loss", true, higher_is_better=False)


def _losses(chain: Chain, subject: EvalModel, triples: Triples) -> dict[str, Tensor]:
    """Return each triple's loss under each caption, (n,) float64 on the CPU."""

    def denoise(zt: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return denoiser(subject.components.unet, text, num_outputs=chain.channels)(zt, t)

    losses = triple_losses(
        denoise,
        chain.schedule.to(subject.device),
        triples,
        prediction_type=chain.prediction_type,
        device=subject.device,
    )
    if not all(bool(values.isfinite().all()) for values in losses.values()):
        raise FloatingPointError("the held-out loss became NaN or Inf; is the folder damaged?")
    return {name: values.double().cpu() for name, values in losses.items()}


def fixed_triples(subject: EvalModel, *, num_timesteps: int) -> Triples:
    """Return every image as often as makes FEWEST_TRIPLES, with its own timesteps and noise."""
    latents = subject.latents
    repeats = -(-FEWEST_TRIPLES // len(latents))
    z0 = latents.z0.repeat(repeats, 1, 1, 1)
    eps = torch.randn(z0.shape, generator=subject.generator())
    t = stratified_timesteps(len(z0), num_timesteps)
    return Triples(z0, eps, t, latents.text.repeat(repeats, 1, 1), latents.null_text)


def comparable(first: EvalModel, second: EvalModel) -> str:
    """Say why two models' losses do not compare; empty where they do."""
    a, b = (Chain.of(subject.components) for subject in (first, second))
    if a.prediction_type != b.prediction_type:
        return f"one predicts {a.prediction_type}, the other {b.prediction_type}"
    if not torch.equal(a.schedule.alphas_cumprod, b.schedule.alphas_cumprod):
        return "their noise schedules differ"
    x, y = first.latents.z0, second.latents.z0
    if x.shape != y.shape or not torch.equal(x, y):
        return "their VAEs give different latents"
    return ""


def _by_timestep(
    losses: dict[str, Tensor], t: Tensor, num_timesteps: int
) -> tuple[dict[str, Any], list[Row]]:
    """Return the loss, and what the caption saves of it, by quarter of the chain."""
    figures: dict[str, Any] = {}
    rows = []
    true, null = losses["true"], losses["null"]
    bucket = t * NUM_BUCKETS // num_timesteps
    for b, label in enumerate(bucket_labels(num_timesteps)):
        here = bucket == b
        if here.sum() < 2:
            continue
        loss = bootstrap_mean(true[here])
        worth = bootstrap_difference(null[here], true[here])
        figures[label] = {"loss": plain_interval(loss), "caption": plain_interval(worth)}
        note = f"the caption saves {worth.estimate:.3g} [{worth.low:.3g}, {worth.high:.3g}]"
        rows.append(Row(f"Loss at {label}", loss, note))
    return figures, rows
