"""Held-out loss that means something, and how much the model uses its captions.

A fixed set of (picture, timestep, noise) triples, timesteps stratified over the chain, is measured
again and again, so two figures differ by the model alone. The same triples under shuffled and null
captions show what a caption is worth: a model that ignores captions has a caption use of 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.diffusion.ddpm import Schedule, q_sample
from latentdiff.diffusion.objectives import per_sample_loss, target

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
NUM_BUCKETS = 4


@dataclass(frozen=True)
class Triples:
    """n fixed triples: z0, eps (n, C, h, w), t (n,) int64, text (n, ...) ids or states."""

    z0: Tensor
    eps: Tensor
    t: Tensor
    text: Tensor
    null_text: Tensor  # (1, ...)

    def __len__(self) -> int:
        return len(self.t)


def stratified_timesteps(n: int, num_timesteps: int) -> Tensor:
    """Return n timesteps, the middles of n equal strata, in an order without pattern. (n,) int64.

    Triple i has stratum (i g) mod n for a g near n / golden ratio and coprime to n, so any first
    part of the triples covers the chain evenly.
    """
    step = next(g for g in range(max(1, round(n * 0.618)), 2 * n + 2) if _coprime(g, n))
    strata = torch.arange(n) * step % n
    return ((strata + 0.5) * num_timesteps / n).long()


@torch.no_grad()
def triple_losses(
    denoise: Denoiser,
    schedule: Schedule,
    triples: Triples,
    *,
    prediction_type: str,
    batch_size: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the loss of each triple, (n,) float32 on the CPU, by caption: true, shuffled, null.

    Shuffled: each triple gets the caption of the next one.
    """
    losses: dict[str, list[Tensor]] = {"true": [], "shuffled": [], "null": []}
    shuffled = triples.text.roll(1, 0)
    for start in range(0, len(triples), batch_size):
        part = slice(start, start + batch_size)
        z0, eps, t = (x[part].to(device) for x in (triples.z0, triples.eps, triples.t))
        zt = q_sample(schedule, z0, t, eps)
        wanted = target(schedule, z0, eps, t, prediction_type=prediction_type)
        texts = {
            "true": triples.text[part],
            "shuffled": shuffled[part],
            "null": triples.null_text.expand_as(triples.text[part]),
        }
        for name, text in texts.items():
            output = denoise(zt, t, text.to(device))
            losses[name].append(per_sample_loss(output, wanted).cpu())
    return {
        name: torch.cat(values) if values else torch.empty(0) for name, values in losses.items()
    }


def summarise(losses: Mapping[str, Tensor], t: Tensor, *, num_timesteps: int) -> dict[str, float]:
    """Return the figures of a log line: loss with standard error, by timestep bucket, caption use.

    Paired by triple: caption_use is (null - true) / null, caption_match (shuffled - true) /
    shuffled.
    """
    true = losses["true"].double()
    figures = {"held_out_loss": true.mean().item(), "held_out_se": _standard_error(true)}
    for name, label in (("null", "caption_use"), ("shuffled", "caption_match")):
        other = losses[name].double()
        figures[label] = ((other - true).mean() / other.mean()).item()
        figures[f"{label}_se"] = _standard_error(other - true) / other.mean().item()
    bucket = t.cpu() * NUM_BUCKETS // num_timesteps
    for b in range(NUM_BUCKETS):
        if (here := bucket == b).any():
            low, high = (num_timesteps * k // NUM_BUCKETS for k in (b, b + 1))
            figures[f"held_out_loss/t{low}-{high - 1}"] = true[here].mean().item()
    figures["num_held_out"] = float(len(true))
    return figures


def _standard_error(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else float("nan")


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1
