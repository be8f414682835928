"""The held-out loss on fixed triples, and how much the model uses its captions and conditions.

A fixed set of (image, timestep, noise) triples, timesteps stratified over the chain, is measured
again and again, so two figures differ by the model alone. The same triples under shuffled and null
captions show the worth of a caption: a model that ignores captions has a caption use of 0, and one
that ignores its image conditions, under another image's or none, a condition use of 0. Triples
of training images with the same timesteps show overfitting as a gap. All figures are squared
errors, whatever the training loss is, so that runs compare.
Several processes share the work in batches that do not depend on their number.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from latentdiff.diffusion.ddpm import q_sample
from latentdiff.diffusion.losses import per_sample_loss
from latentdiff.diffusion.prediction import target
from latentdiff.diffusion.schedules import Schedule
from latentdiff.models.conditioning import Conditioning

DenoiseFn = Callable[[Tensor, Tensor, Conditioning], Tensor]
RankOfProcesses = tuple[int, int]  # (rank, number of processes)
CAPTIONS = ("true", "shuffled", "null")
CONDITIONS = ("other_condition", "no_condition")  # instead of the true one, under true captions
USES = {
    "null": "caption_use",
    "shuffled": "caption_match",
    "no_condition": "condition_use",
    "other_condition": "condition_match",
}
NUM_BUCKETS = 4
BATCH_SIZE = 8  # under three captions each; a constant, so that no layout changes the figures
PIXELS_AT_ONCE = 65536  # of latents in a pass: 4 images of 1024 px, 16 of 512, at a VAE factor of 8


@dataclass(frozen=True)
class Triples:
    """n fixed triples: z0, eps n times (C, h, w), t (n,) int64, and their conditioning.

    mask: n times (1, h, w) in [0, 1] where only a part of each image is trained on. Latents
    differ in size between aspect-ratio buckets; keep latents of one size together. condition: n
    times (k, h, w) where the model reads an image, uint8 (3, H, W) of a ControlNet;
    null_condition: one that tells nothing of it, None where it is not measured.
    """

    z0: Tensor | Sequence[Tensor]
    eps: Tensor | Sequence[Tensor]
    t: Tensor
    text: Conditioning
    null_text: Conditioning  # of one null prompt
    mask: Sequence[Tensor] | None = None
    condition: Sequence[Tensor] | None = None
    null_condition: Sequence[Tensor] | None = None
    condition_field: Literal["condition", "control"] = "condition"  # of the conditioning
    images: Tensor | None = None  # (n,) int64, which image each triple is of

    def __len__(self) -> int:
        return len(self.t)

    @property
    def order(self) -> Tensor:
        """Indices of the triples by rising timestep, which pair the triples of two sets."""
        return self.t.argsort(stable=True)


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
    denoise: DenoiseFn,
    schedule: Schedule,
    triples: Triples,
    *,
    prediction_type: str,
    device: torch.device,
    shard: RankOfProcesses = (0, 1),
    captions: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Return the loss of each triple, (n,) float32 on the device, under each of `captions`.

    captions: by default CAPTIONS, and CONDITIONS where triples have a condition. Shuffled: each
    triple gets the caption of the triple before it; other_condition: the condition of one before
    it of the same size, with its noise level. shard: this process among those
    that share the work; it leaves 0 where another one measures, so their sum is the result.
    """
    if captions is None:
        captions = CAPTIONS if triples.condition is None else CAPTIONS + CONDITIONS
    losses = torch.zeros(len(captions), len(triples), device=device)
    variants = _variants(triples)
    names_at_once, batch_size = _at_once(triples, len(captions))
    batches = _batches(triples, batch_size)
    groups = [captions[k : k + names_at_once] for k in range(0, len(captions), names_at_once)]
    passes = [
        (index, counts, names)
        for index, counts in rank_batches(len(batches), shard)
        for names in groups
    ]
    for index, counts, names in passes:
        part, n = batches[index], len(names)
        z0, eps = (torch.stack(tuple(x[part])).to(device) for x in (triples.z0, triples.eps))
        t = triples.t[part].to(device)
        field = triples.condition_field
        given = [_conditioning(variants[name], part, field) for name in names]
        text = Conditioning.cat(given).to(device)  # of n b images
        wanted = target(schedule, z0, eps, t, prediction_type=prediction_type)
        zt, t, wanted = (torch.cat([x] * n) for x in (q_sample(schedule, z0, t, eps), t, wanted))
        mask = None
        if triples.mask is not None:
            mask = torch.cat([torch.stack(tuple(triples.mask[part])).to(device)] * n)
        measured = per_sample_loss(denoise(zt, t, text), wanted, mask=mask)  # (n b,)
        if counts:
            first = captions.index(names[0])
            losses[first : first + n, part] = measured.view(n, -1)
    return dict(zip(captions, losses, strict=True))


_Variant = tuple[Conditioning, Sequence[Tensor] | None]  # of n images, and their conditions


def _variants(triples: Triples) -> dict[str, _Variant]:
    """Return by name what triples are measured under."""
    text, condition = triples.text, triples.condition
    variants: dict[str, _Variant] = {
        "true": (text, condition),
        "shuffled": (text.with_text(text.map(lambda x: x.roll(1, 0))), condition),
        "null": (text.with_text(triples.null_text), condition),
    }
    if condition is not None:
        before = _one_before(condition)
        labels = text.class_labels
        moved = text if labels is None else replace(text, class_labels=labels[before])
        variants["other_condition"] = moved, [condition[k] for k in before]
        variants["no_condition"] = text, triples.null_condition
    return variants


def _conditioning(
    variant: _Variant, part: slice, field: Literal["condition", "control"]
) -> Conditioning:
    text, condition = variant
    if condition is None:
        return text[part]
    stacked = torch.stack(tuple(condition[part]))
    if field == "control":
        return replace(text[part], control=stacked.float() / 255)
    return replace(text[part], condition=stacked)


def _one_before(conditions: Sequence[Tensor]) -> list[int]:
    """Return for each condition the index of the one before it of its size, in a circle."""
    by_size: dict[torch.Size, list[int]] = {}
    for k, condition in enumerate(conditions):
        by_size.setdefault(condition.shape, []).append(k)
    before = {k: same[i - 1] for same in by_size.values() for i, k in enumerate(same)}
    return [before[k] for k in range(len(conditions))]


def _at_once(triples: Triples, num_captions: int) -> tuple[int, int]:
    """Return how many captions and triples a pass has, the same in all passes of all processes.

    Large latents are measured under one caption after another, few at once, to fit where one
    image at a time is trained on.
    """
    images = PIXELS_AT_ONCE // max(z0[0].numel() for z0 in triples.z0)
    if images >= num_captions * BATCH_SIZE:
        return num_captions, BATCH_SIZE
    return 1, max(1, min(BATCH_SIZE, images))


def _batches(triples: Triples, batch_size: int) -> list[slice]:
    """Split triples into batches of one latent size, of batch_size at most."""
    batches, start = [], 0
    for end in range(1, len(triples) + 1):
        full = end == len(triples) or end - start == batch_size
        if full or triples.z0[end].shape != triples.z0[start].shape:
            batches.append(slice(start, end))
            start = end
    return batches


def rank_batches(num: int, shard: RankOfProcesses) -> Iterator[tuple[int, bool]]:
    """Deal out batches 0 .. num - 1: yield each of this rank's, and whether it counts.

    Every rank gets equally many, as passes through sharded weights need; where there are too few, a
    batch is repeated and does not count.
    """
    rank, num_processes = shard
    for first in range(0, num, num_processes):
        yield min(first + rank, num - 1), first + rank < num


def summarize_losses(
    losses: Mapping[str, Tensor], t: Tensor, *, num_timesteps: int
) -> dict[str, float]:
    """Return the figures of a log line: loss by timestep bucket, caption use, standard errors.

    Paired by triple: caption_use is (null - true) / null, caption_match (shuffled - true) /
    shuffled; condition_use and condition_match are the same of conditions. Standard errors are
    those of plain sampling; with stratified timesteps the true ones are smaller.
    """
    losses = {name: values.double().cpu() for name, values in losses.items()}
    true = losses["true"]
    figures = _estimate(true, "heldout_loss", "heldout_se")
    for name, label in USES.items():
        if name not in losses:
            continue
        shares = (losses[name] - true) / losses[name].mean()
        figures |= _estimate(shares, label, f"{label}_se")
    bucket = t.cpu() * NUM_BUCKETS // num_timesteps
    for b, label in enumerate(bucket_labels(num_timesteps)):
        if (here := bucket == b).any():
            names = f"heldout_loss/{label}", f"heldout_se/{label}"
            figures |= _estimate(true[here], *names)
    return figures | {"num_heldout": float(len(true))}


def summarize_gap(heldout: Tensor, trained: Tensor) -> dict[str, float]:
    """Return the loss of training triples and the gap to the held-out one, for the log.

    heldout, trained: (n,) losses, in the order of one set of timesteps, which pairs them. The gap
    is zero for a model that does as well on unseen images, and grows with overfitting.
    """
    heldout, trained = heldout.double().cpu(), trained.double().cpu()
    figures = _estimate(trained, "train_loss_fixed", "train_se_fixed")
    return figures | _estimate(heldout - trained, "heldout_gap", "heldout_gap_se")


def bucket_labels(num_timesteps: int) -> list[str]:
    """Name the buckets t NUM_BUCKETS // T by their timesteps: "t0-249", "t250-499", ..."""
    edges = [-(-num_timesteps * b // NUM_BUCKETS) for b in range(NUM_BUCKETS + 1)]
    return [f"t{low}-{high - 1}" for low, high in pairwise(edges)]


def _estimate(values: Tensor, mean_name: str, error_name: str) -> dict[str, float]:
    """Return the mean of independent values (n,) and, from two on, its standard error."""
    figures = {mean_name: values.mean().item()}
    if len(values) > 1:
        figures[error_name] = (values.std() / len(values) ** 0.5).item()
    return figures


def _coprime(a: int, b: int) -> bool:
    while b:
        a, b = b, a % b
    return a == 1
