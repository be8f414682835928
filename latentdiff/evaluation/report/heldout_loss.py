"""The held-out loss on fixed triples, and the model's use of captions, for a report.

Every image is measured at several timesteps, stratified over the chain, under its own caption,
another image's and none (metrics/heldout_loss.py). Intervals are over images.
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
from latentdiff.evaluation.metrics.vlb import Chain, unet_model
from latentdiff.evaluation.report.section import PairedScore, ReportRow, Section, interval_json
from latentdiff.models.conditioning import Conditioning

MIN_TRIPLES = 512


def heldout_loss_section(
    eval_model: EvalModel, *, is_heldout: bool = True
) -> tuple[Section, PairedScore]:
    """Measure the loss on the model's images; FloatingPointError where a loss is not finite.

    is_heldout: whether the images are a held-out split, and are called so.
    """
    title = "Held-out loss" if is_heldout else "Loss on these images"
    chain = Chain.of(eval_model.components)
    num_timesteps = chain.schedule.num_timesteps
    triples = fixed_triples(eval_model, num_timesteps=num_timesteps)
    losses = _losses(chain, eval_model, triples)
    num = len(eval_model.latents)
    true, shuffled, null = (losses[name].view(-1, num).mean(0) for name in CAPTIONS)  # (N,) each
    intervals = {
        "loss": bootstrap_mean(true),
        "caption_use": bootstrap_mean((null - true) / null.mean()),
        "caption_match": bootstrap_mean((shuffled - true) / shuffled.mean()),
    }
    labels = (
        (title, f"{len(triples)} triples"),
        ("Caption use, against no caption", "share of the loss that the caption saves"),
        ("Caption match, against another caption", "0 for a model that ignores captions"),
    )
    rows = [
        ReportRow(label, interval, note, is_share=name != "loss")
        for (name, interval), (label, note) in zip(intervals.items(), labels, strict=True)
    ]
    by_timestep, some = _by_timestep(losses, triples.t, num_timesteps)
    figures: dict[str, Any] = {name: interval_json(x) for name, x in intervals.items()}
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
    section = Section("heldout", f"{title} and use of captions", figures, rows + some, notes)
    return section, PairedScore(title[0].lower() + title[1:], true, higher_is_better=False)


def _losses(chain: Chain, eval_model: EvalModel, triples: Triples) -> dict[str, Tensor]:
    """Return each triple's loss under each caption, (n,) float64 on the CPU."""

    def denoise(zt: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        unet = eval_model.components.unet
        return unet_model(unet, conditioning, num_outputs=chain.channels)(zt, t)

    losses = triple_losses(
        denoise,
        chain.schedule.to(eval_model.device),
        triples,
        prediction_type=chain.prediction_type,
        device=eval_model.device,
    )
    if not all(bool(values.isfinite().all()) for values in losses.values()):
        raise FloatingPointError("the held-out loss became NaN or Inf; is the folder damaged?")
    return {name: values.double().cpu() for name, values in losses.items()}


def fixed_triples(eval_model: EvalModel, *, num_timesteps: int) -> Triples:
    """Return every image as often as makes MIN_TRIPLES, with its own timesteps and noise."""
    latents = eval_model.latents
    repeats = -(-MIN_TRIPLES // len(latents))
    z0 = latents.z0.repeat(repeats, 1, 1, 1)
    eps = torch.randn(z0.shape, generator=eval_model.generator())
    t = stratified_timesteps(len(z0), num_timesteps)
    conditioning = Conditioning.cat([latents.conditioning] * repeats)
    return Triples(z0, eps, t, conditioning, latents.null_conditioning)


def comparable(first: EvalModel, second: EvalModel) -> str:
    """Return why two models' losses do not compare; empty where they do."""
    a, b = (Chain.of(one.components) for one in (first, second))
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
) -> tuple[dict[str, Any], list[ReportRow]]:
    """Return the loss, and the part that the caption saves, by quarter of the chain."""
    figures: dict[str, Any] = {}
    rows = []
    true, null = losses["true"], losses["null"]
    bucket = t * NUM_BUCKETS // num_timesteps
    for b, label in enumerate(bucket_labels(num_timesteps)):
        here = bucket == b
        if here.sum() < 2:
            continue
        loss = bootstrap_mean(true[here])
        saved = bootstrap_difference(null[here], true[here])
        figures[label] = {"loss": interval_json(loss), "caption": interval_json(saved)}
        note = f"the caption saves {saved.estimate:.3g} [{saved.low:.3g}, {saved.high:.3g}]"
        rows.append(ReportRow(f"Loss at {label}", loss, note))
    return figures, rows
