"""Is a distilled student worse than its teacher? Both get the same captions and seeds.

Scores are losses, teacher less student, so that the upper end of their interval is what the student
is not worse by: of captions of the shapes world, whose images a geometric judge reads; of the CLIP
score; and, always, the distance between the two images of a caption, with that of two captions'
images by the teacher as its unit. FD and KID have no verdict. KID wants independent sets, so it is
that of the student's images of every second caption to the teacher's of the others.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.evaluation.generate import GeneratedImages, generate
from latentdiff.evaluation.metric_nets import MetricNets
from latentdiff.evaluation.metrics.bootstrap import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    proportion,
)
from latentdiff.evaluation.metrics.clip import Clip
from latentdiff.evaluation.metrics.fd_kid import frechet_distance, kernel_distance
from latentdiff.evaluation.metrics.features import embed_in_batches
from latentdiff.evaluation.metrics.shapes_judge import follows, judge_image
from latentdiff.evaluation.report.prompt_following import is_scene, scene_of
from latentdiff.image_grid import from_uint8, to_pil
from latentdiff.pipeline import LatentDiffPipeline


@dataclass(frozen=True)
class Score:
    """What a student loses by one score, and the most that it may lose."""

    name: str
    loss: Interval
    allowed: float
    unit: str = ""
    teacher: float | None = None
    student: float | None = None

    @property
    def is_worse(self) -> bool:
        """Whether a loss above the allowed one cannot be excluded."""
        return self.loss.high > self.allowed

    def __str__(self) -> str:
        """Return the verdict in a line."""
        interval = _interval_text(self.loss)
        before = "" if self.teacher is None else f"{self.teacher:.3g} -> {self.student:.3g}, "
        if self.is_worse:
            return f"{self.name}: worse, {before}loss {interval}, allowed {self.allowed:g}"
        bound = f"{max(self.loss.high, 0):.3g}{self.unit}"
        return f"{self.name}: not worse by more than {bound}, {before}loss {interval}"


@dataclass(frozen=True)
class StudentReport:
    """The scores of a student, at 95 %; fd, kid: to the teacher's images, by features if given.

    kid_of_teacher: of the teacher's own images of those captions.
    """

    scores: tuple[Score, ...]
    num_images: int
    fd: float | None = None
    fd_caution: str = ""
    kid: Interval | None = None
    kid_of_teacher: Interval | None = None

    @property
    def is_worse(self) -> bool:
        """Whether any score is."""
        return any(score.is_worse for score in self.scores)

    def lines(self) -> list[str]:
        """Return the verdict of each score, FD and KID."""
        lines = [str(score) for score in self.scores]
        if self.fd is None or self.kid is None or self.kid_of_teacher is None:
            return lines
        kid, own = map(_interval_text, (self.kid, self.kid_of_teacher))
        kids = f"KID to the teacher's images of other captions: {kid}, the teacher's own {own}"
        return [*lines, f"FD: {self.fd:.4g} ({self.fd_caution})", kids]

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self) | {"is_worse": self.is_worse, "text": self.lines()}


def generate_and_save(
    pipe: LatentDiffPipeline,
    captions: Sequence[str],
    folder: Path,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    batch_size: int,
) -> GeneratedImages:
    """Generate an image of each caption, its number being its seed; keep them in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return generate(
        pipe,
        captions,
        per_caption=1,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        first_seed=0,
        batch_size=batch_size,
        folder=folder,
    )


def compare_student(
    teacher: GeneratedImages,
    student: GeneratedImages,
    *,
    nets: MetricNets,
    max_accuracy_loss: float,
    max_clip_loss: float,
    max_distance: float,
    batch_size: int = 16,
    device: torch.device | None = None,
) -> StudentReport:
    """Compare images of the same captions and seeds. ValueError where they are not the same.

    batch_size: images that a network reads at once, on the device of the nets, by default the CPU.
    """
    if (teacher.captions, teacher.first_seed) != (student.captions, student.first_seed):
        raise ValueError("teacher and student drew other captions or seeds, expected the same")
    device = device or torch.device("cpu")
    images = [one.flat.float() / 255 for one in (teacher, student)]  # (N, 3, H, W) each
    scores = [_distance(*images, allowed=max_distance)]
    if all(map(is_scene, teacher.captions)):
        right = [_right(one) for one in (teacher, student)]
        scores.append(_score("right images", *right, allowed=max_accuracy_loss))
    if nets.clip is not None:
        cosines = [_cosines(nets.clip, one, batch_size, device) for one in (teacher, student)]
        scores.append(_score("CLIP score", *cosines, allowed=max_clip_loss))
    report = StudentReport(tuple(scores), len(teacher.captions))
    if nets.features is None:
        return report
    first, second = (
        embed_in_batches(nets.features.embed, one.flat, size=batch_size, device=device)
        for one in (teacher, student)
    )
    fd, others = frechet_distance(first, second), first[::2]
    kid, own = (kernel_distance(one[1::2], others) for one in (second, first))
    return replace(report, fd=fd.value, fd_caution=fd.caution, kid=kid, kid_of_teacher=own)


def _distance(teacher: Tensor, student: Tensor, *, allowed: float) -> Score:
    """Root mean square distance of each pair, over the mean of the teacher's to its next image."""
    apart = _rms(teacher - teacher.roll(1, 0)).mean().clamp(min=1e-6)
    ratio = bootstrap_mean(_rms(teacher - student) / apart)
    return Score("distance of images", ratio, allowed, unit=" of that of unlike captions")


def _score(name: str, teacher: Tensor, student: Tensor, *, allowed: float) -> Score:
    loss = bootstrap_difference(teacher, student)
    if teacher.dtype == torch.bool and loss.low == loss.high:  # all pairs alike is no certainty
        width = proportion(0, loss.num_samples).high
        loss = replace(loss, low=loss.low - width, high=loss.high + width)
    means = [one.double().mean().item() for one in (teacher, student)]
    return Score(name, loss, allowed, teacher=means[0], student=means[1])


def _cosines(
    clip: Clip, generated: GeneratedImages, batch_size: int, device: torch.device
) -> Tensor:
    """Return the cosine of each image to its caption, (N,) on the CPU."""
    starts = range(0, len(generated.captions), batch_size)
    parts = zip(generated.flat.split(batch_size), starts, strict=True)
    return torch.cat(
        [
            clip.score(
                from_uint8(part.to(device)), generated.captions[start : start + batch_size]
            ).cpu()
            for part, start in parts
        ]
    )


def _right(generated: GeneratedImages) -> Tensor:
    """Tell of each image whether it shows all of its scene, (N,) bool."""
    pairs = zip(generated.flat, generated.captions, strict=True)
    return torch.tensor(
        [follows(judge_image(to_pil(image)), scene_of(text))["all"] for image, text in pairs]
    )


def _interval_text(interval: Interval) -> str:
    return f"{interval.estimate:.3g} [{interval.low:.3g}, {interval.high:.3g}]"


def _rms(difference: Tensor) -> Tensor:
    return difference.flatten(1).square().mean(1).sqrt()
