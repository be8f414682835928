"""A student's images against its teacher's: the same, nearly the same, and spoilt ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.data.shapes import all_scenes, render
from latentdiff.evaluation.compare_student import StudentReport, compare_student
from latentdiff.evaluation.generate import GeneratedImages
from latentdiff.evaluation.metric_nets import MetricNets
from latentdiff.evaluation.metrics.clip import Clip
from latentdiff.evaluation.metrics.features import Features

SCENES = all_scenes()[::17][:24]
CAPTIONS = tuple(scene.caption for scene in SCENES)
MARGINS = {"max_accuracy_loss": 0.2, "max_clip_loss": 0.02, "max_distance": 0.5}


def drawn() -> Tensor:
    rng = np.random.default_rng(0)
    images = [np.asarray(render(scene, rng, size_px=64)) for scene in SCENES]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def compared(teacher: Tensor, student: Tensor, captions: tuple[str, ...]) -> StudentReport:
    both = (GeneratedImages(captions, one[:, None], 0) for one in (teacher, student))
    return compare_student(*both, nets=MetricNets(None, None), **MARGINS)


def test_equal_images_lose_nothing_but_a_bound_that_the_number_of_images_gives() -> None:
    report = compared(drawn(), drawn(), CAPTIONS)
    distance, right = report.scores
    assert not report.is_worse
    assert distance.loss.estimate == right.loss.estimate == 0
    assert (right.teacher, right.student) == (1, 1)
    assert 0.05 < right.loss.high < 0.2  # 24 images prove no more
    assert "not worse by more than 0.1" in str(right)


def test_a_spoilt_student_is_worse_by_every_score() -> None:
    images = drawn()
    report = compared(images, images.roll(1, 0), CAPTIONS)
    assert [score.is_worse for score in report.scores] == [True, True]
    assert report.scores[0].loss.estimate == pytest.approx(1)
    assert all("worse, " in line for line in report.lines())


def test_captions_of_another_world_are_judged_by_distance_alone() -> None:
    images = drawn()
    near = (images.int() + 3).clamp(0, 255).to(torch.uint8)
    report = compared(images, near, tuple(f"photo {k}" for k in range(24)))
    assert [score.name for score in report.scores] == ["distance of images"]
    assert not report.is_worse


def test_other_captions_are_refused() -> None:
    first = GeneratedImages(CAPTIONS, drawn()[:, None], 0)
    second = GeneratedImages(CAPTIONS[::-1], drawn()[:, None], 0)
    with pytest.raises(ValueError, match="other captions or seeds"):
        compare_student(first, second, nets=MetricNets(None, None), **MARGINS)


def test_networks_score_images_in_batches_and_tell_a_spoilt_student() -> None:
    """A CLIP of mean colours, whose text is the mean colour of the scene's own image."""
    images = drawn()
    seen: list[int] = []

    def colour_of(pixels: Tensor) -> Tensor:
        seen.append(len(pixels))
        return F.normalize(pixels.mean((2, 3)) + 1.01, dim=1)

    wanted = dict(zip(CAPTIONS, colour_of(images.float() / 127.5 - 1), strict=True))
    clip = Clip(colour_of, lambda texts: torch.stack([wanted[text] for text in texts]))
    nets = MetricNets(clip, Features(colour_of, "mean colour", "0"))

    def scored(student: Tensor) -> StudentReport:
        both = (GeneratedImages(CAPTIONS, one[:, None], 0) for one in (images, student))
        return compare_student(*both, nets=nets, batch_size=10, **MARGINS)

    same, spoilt = scored(images), scored(images.roll(1, 0))
    assert set(seen[1:]) == {10, 4}
    assert same.scores[-1].name == "CLIP score"
    assert same.scores[-1].loss.estimate == pytest.approx(0, abs=1e-6)
    assert same.scores[-1].teacher == pytest.approx(1, abs=1e-4)
    assert spoilt.scores[-1].is_worse
    assert same.fd == pytest.approx(0, abs=1e-3)
    inverted = scored(255 - images)
    assert inverted.fd is not None
    assert inverted.fd > 0.001
    assert same.kid == same.kid_of_teacher == inverted.kid_of_teacher
    blue = scored(images // torch.tensor([4, 4, 1], dtype=torch.uint8).view(3, 1, 1))
    assert blue.kid is not None
    assert blue.kid_of_teacher is not None
    assert blue.kid.low > blue.kid_of_teacher.high
    assert "KID to the teacher's images of other captions: " in blue.lines()[-1]
