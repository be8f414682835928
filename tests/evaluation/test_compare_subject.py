"""Similarity to photographs, and drift, from features and from models."""

from __future__ import annotations

import json

import pytest
import torch
from fakes_training import make_world

from latentdiff.config.options import CompareSubjectOptions
from latentdiff.evaluation.compare_subject import compare_subject, measure_subject
from latentdiff.evaluation.metric_nets import load_mobilenet


def features(seed: int, num: int) -> torch.Tensor:
    return torch.randn(num, 32, generator=torch.Generator().manual_seed(seed)).abs()


def test_images_moved_towards_the_photographs_are_nearer():
    real, before, other = features(0, 6), features(1, 16), features(2, 12)
    after = before + 0.5 * real.mean(0)
    report = measure_subject([real, before, other, after, other])
    assert report.gain.verdict == "better"
    assert report.gain.difference.low > 0
    assert report.similarity_after > report.similarity_before
    assert report.drift.estimate == pytest.approx(0, abs=1e-6)
    moved = measure_subject([real, before, other, after, other.roll(1, 0)])
    assert moved.drift.estimate == pytest.approx(moved.unlike)


def test_the_same_model_gains_nothing_and_does_not_drift(shared_dir, sd_folder, tmp_path):
    world = make_world(tmp_path)
    options = CompareSubjectOptions(
        prompt="a red circle",
        unrelated=("a green square", "two small yellow triangles"),
        num_seeds=2,
        num_inference_steps=2,
    )
    report = compare_subject(
        str(sd_folder),
        str(sd_folder),
        str(world / "data"),
        tmp_path / "out",
        features=str(shared_dir / "weights" / "mobilenet-v1-025-imagenet"),
        options=options,
    )
    assert report.gain.difference.estimate == 0
    assert report.drift.estimate == pytest.approx(0, abs=1e-6)
    figures = json.loads((tmp_path / "out" / "subject.json").read_text())
    assert figures["num_photos"] == 14
    assert (tmp_path / "out" / "subject.png").stat().st_size > 1000


def test_features_are_those_of_the_networks_own_reader(shared_dir):
    import importlib.util

    folder = shared_dir / "weights" / "mobilenet-v1-025-imagenet"
    spec = importlib.util.spec_from_file_location("reader", folder / "mobilenet_features.py")
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    pixels = torch.rand(2, 3, 65, 80) * 2 - 1
    expected = reader.MobileNetTF(str(folder)).features(pixels)
    torch.testing.assert_close(load_mobilenet(folder)(pixels), expected)


def test_folder_without_a_network_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"arch\.json"):
        load_mobilenet(tmp_path)
