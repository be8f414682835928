"""Verdicts by generated images, where nothing is held out, of LoRA and textual inversion."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes_finetune import finetuning
from PIL import Image
from torch import Tensor

from latentdiff.evaluation.metrics.features import Features, thumbnail_features
from latentdiff.training.stopping.sample_costs import SampleCosts
from latentdiff.training.text_to_image import nearest_images
from latentdiff.training.text_to_image.nearest_images import NearestImage
from latentdiff.training.text_to_image.train_t2i import train

PROMPTS = ("a photo of sks shape",)


@pytest.fixture
def with_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any folder hold a network."""
    network = Features(lambda pixels: thumbnail_features(pixels) + 0.01, "thumbnails", "")
    monkeypatch.setattr(nearest_images, "load_features", lambda folder, device: network)


def settings(world: Path, **changes: Any) -> dict[str, Any]:
    return {
        "data__root": world / "data" / "train",  # nothing is held out
        "finetune__method": "lora",
        "finetune__instance_prompts": list(PROMPTS),
        "train__stop": "auto",
        "train__max_steps": 4,
        "train__lr_warmup_steps": 0,
        "train__checkpoint_every_steps": 2,
        "eval__every_steps": 1,
        "eval__num_samples": 4,
        "eval__unrelated_prompts": ["a red circle", "a blue square"],
        "preview__features": world,
        "preview__num_steps": 1,
        **changes,
    }


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "similarity" in row]


def check_rows(run: Path) -> None:
    found = rows(run)
    assert [row["step"] for row in found] == list(range(len(found)))
    assert found[0]["drift"] == pytest.approx(0, abs=1e-6)  # from itself
    assert "verdict" not in found[0]
    assert {row["verdict_measure"] for row in found[1:]} == {"unlikeness to the subject"}
    assert all(row["num_pairs"] == 4 for row in found[1:])
    assert all("samples_nearest_score" in row for row in found)
    assert (run / "pipeline").is_dir()


def test_textual_inversion_without_held_out_images_goes_by_likeness_and_drift(
    world: Path, tmp_path: Path, with_network: None
) -> None:
    changes = {
        "finetune__method": "textual_inversion",
        "finetune__token": "<thing>",
        "finetune__initializer_token": "circle",
        "finetune__instance_prompts": ["a photo of <thing>"],
    }
    assert train(finetuning(world, tmp_path / "run", **settings(world, **changes))) == 0
    check_rows(tmp_path / "run")


def test_a_resumed_lora_measures_drift_from_the_same_images(
    world: Path, tmp_path: Path, with_network: None
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run, ends in ((whole, (6,)), (cut, (4, 6))):
        for end in ends:
            given = settings(world, train__max_steps=end, train__stop="never")
            assert train(finetuning(world, run, **given)) == 0
    check_rows(whole)
    assert rows(cut) == rows(whole)


def test_nothing_to_measure_is_refused_with_what_to_set(world: Path, tmp_path: Path) -> None:
    given = settings(world, eval__num_samples=0, eval__unrelated_prompts=[], preview__features="")
    with pytest.raises(ValueError, match=r"eval.num_samples=8 and preview.features=DIR"):
        train(finetuning(world, tmp_path / "run", **given))


class FakeImages:
    """Colours as features: an image's is its own."""

    def embed(self, samples: Sequence[Image.Image]) -> Tensor:
        pixels = torch.tensor([sample.getpixel((0, 0)) for sample in samples]).float()
        return torch.nn.functional.normalize(pixels, dim=1)

    def similarities(self, samples: Sequence[Image.Image]) -> Tensor:
        return self.embed(samples)[:, 0]  # the subject is red

    def find(self, samples: Sequence[Image.Image]) -> list[NearestImage]:
        return [NearestImage("one", sample, 0.5, 0.5, k == 0) for k, sample in enumerate(samples)]


def test_costs_are_unlikeness_and_drift_is_from_the_first_evaluation() -> None:
    images: Any = FakeImages()
    costs = SampleCosts(["a", "b"], num_samples=4, unrelated=["c", "d"], images=images)
    assert costs.prompts == ["a", "b", "a", "b", "c", "d"]
    assert len(set(costs.seeds)) == 6
    red, green = Image.new("RGB", (1, 1), (255, 0, 0)), Image.new("RGB", (1, 1), (0, 255, 0))
    first = costs.measure_images([red] * 2 + [green] * 2 + [red, green])
    assert first.costs == pytest.approx([0, 0, 1, 1])
    assert first.drift == pytest.approx([0, 0])
    assert first.figures["similarity"] == pytest.approx(0.5)
    assert first.figures["samples_copies"] == pytest.approx(0.25)
    again = SampleCosts(["a", "b"], num_samples=4, unrelated=["c", "d"], images=images)
    assert again.load(json.loads(json.dumps(costs.to_json())))
    assert again.measure_images([red] * 4 + [green, green]).drift == pytest.approx([1, 0])
    assert not SampleCosts(["b"], num_samples=4, unrelated=[], images=images).load(costs.to_json())
