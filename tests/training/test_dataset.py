"""One training sample: a function of its key, its caption edited and its sides never mirrored."""

from pathlib import Path
from typing import Any

import torch

from latentdiff.data.captions import CaptionTransform
from latentdiff.data.folder.folder import Record
from latentdiff.training.inputs.dataset import LatentDataset
from latentdiff.training.inputs.randomness import SampleKey


class Zeros:
    """Latents that record how they were asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bool, float]] = []

    def shape(self, index: int) -> tuple[int, int, int]:
        return (2, 3, 4)

    def inputs(
        self, index: int, noise: torch.Tensor, *, flipped: bool, crop: float
    ) -> dict[str, torch.Tensor]:
        self.asked.append((index, flipped, crop))
        return {"z0": noise}


def make_dataset(
    transform: CaptionTransform, **settings: Any
) -> tuple[LatentDataset, Zeros, list[str]]:
    captions = [("red, small, round", "a ball"), ("to the left",), ("blue, large, flat",)]
    records = [Record(f"{i}", Path(f"{i}"), c, 8, 8, "train") for i, c in enumerate(captions)]
    latents, asked = Zeros(), []

    def text(caption: str) -> dict[str, torch.Tensor]:
        asked.append(caption)
        return {"prompt_embeds": torch.zeros(1)}

    settings = {"seed": 5, "caption_dropout": 0.5, "random_flip": True} | settings
    return (
        LatentDataset(latents, records, encode_caption=text, transform=transform, **settings),
        latents,
        asked,
    )


def test_draws_depend_on_epoch_sample_and_index_in_epoch_and_not_on_the_stratum() -> None:
    dataset, latents, asked = make_dataset(CaptionTransform(shuffle_tags=True))
    first = dataset[SampleKey(0, 1, 9, 0, 1.0)]
    again = dataset[SampleKey(0, 1, 9, 3, 0.0)]
    other = dataset[SampleKey(0, 2, 9, 0, 1.0)]
    for name in ("z0", "eps", "offset", "u", "dropped"):
        assert torch.equal(first[name], again[name])
    assert not torch.equal(first["eps"], other["eps"])
    assert not torch.equal(first["z0"], first["eps"])
    assert latents.asked[0] == latents.asked[1] != latents.asked[2]
    assert asked[0] == asked[1]
    assert (int(again["stratum"]), float(again["weight"])) == (3, 0.0)
    assert first["offset"].shape == (2, 1, 1)


def test_captions_are_edited_and_sides_never_mirrored() -> None:
    transform = CaptionTransform(
        shuffle_tags=True, keep_tags=1, trigger_word="sks", suffix=", photo"
    )
    dataset, latents, asked = make_dataset(transform)
    for place in range(60):
        dataset[SampleKey(place % 3, 0, place, 0, 1.0)]
    assert {caption.split(", ")[1] for caption in asked[2::3]} == {"blue"}
    assert set(asked[2::3]) == {
        f"sks, blue, {rest}, photo" for rest in ("large, flat", "flat, large")
    }
    assert {"sks, a ball, photo"} < set(asked[0::3])
    assert not any(flipped for index, flipped, _ in latents.asked if index == 1)
    assert {flipped for index, flipped, _ in latents.asked if index == 2} == {False, True}
    crops = [crop for _, _, crop in latents.asked]
    assert len(set(crops)) == 60
    assert 0 <= min(crops) < 0.2
    assert 0.8 < max(crops) < 1
