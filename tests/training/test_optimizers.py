"""Runs with Prodigy, schedule-free AdamW and Lion: exact resume, exported weights, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from fakes_faults import assert_same_state
from fakes_training import make_config, make_world, read_metrics
from safetensors.torch import load_file

from latentdiff.models.components import load_components
from latentdiff.training.text_to_image.train_t2i import train

STEPS = 4
SETTINGS = {
    "train__max_steps": STEPS,
    "train__learning_rate": 0,
    "train__ema": "false",
    "preview__num_nearest": 0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def run(world: Path, folder: Path, **changes: object) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(make_config(world, folder, **(SETTINGS | changes))) == 0
    return folder


@pytest.mark.parametrize("name", ["prodigy", "schedule_free_adamw", "lion"])
def test_resume_continues_bitwise_whatever_is_evaluated(
    world: Path, tmp_path: Path, name: str
) -> None:
    often = {"eval__every_steps": 1, "preview__every_steps": 3}
    whole = run(world, tmp_path / "whole", train__optimizer=name, **often)
    run(world, tmp_path / "run", train__optimizer=name, train__max_steps=2)
    run(world, tmp_path / "run", train__optimizer=name)
    assert_same_state(tmp_path / "run", whole, step=STEPS)
    losses = read_metrics(whole, "heldout_loss")
    assert len(set(losses.values())) == STEPS + 1  # each of other weights
    if name == "prodigy":
        found = read_metrics(whole, "prodigy_d")
        assert list(found) == list(range(1, STEPS + 1))
        assert found == read_metrics(tmp_path / "run", "prodigy_d")


def test_schedule_free_exports_the_average_and_keeps_the_training_point(
    world: Path, tmp_path: Path
) -> None:
    folder = run(world, tmp_path / "run", train__optimizer="schedule_free_adamw")
    checkpoint = folder / "checkpoints" / f"step-{STEPS:09d}"
    y, state = (load_file(checkpoint / f"{part}.safetensors") for part in ("model", "optimizer"))
    name = "conv_in.weight"
    z = state[f"unet.{name}/z"]
    x = (y[f"unet.{name}"] - 0.1 * z) / 0.9
    exported = load_components(folder / "pipeline").unet.state_dict()[name]
    torch.testing.assert_close(exported, x)
    assert (exported - y[f"unet.{name}"]).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": "prodigy", "learning_rate": 1e-4}, "set train.learning_rate=1"),
        (
            {"optimizer": "prodigy", "text_learning_rate": 0.5, "train_text_encoder": "true"},
            "text_learning_rate=0",
        ),
        ({"optimizer": "schedule_free_adamw", "ema": "true"}, "train.ema=false"),
        ({"optimizer": "schedule_free_adamw", "lr_schedule": "cosine"}, "lr_schedule=constant"),
        ({"optimizer": "lion", "beta2": 0.9}, "lion has no second moment"),
    ],
)
def test_settings_that_an_optimizer_has_no_use_for_are_refused(
    world: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    overrides = {f"train__{name}": value for name, value in changes.items()}
    with pytest.raises(ValueError, match=said):
        make_config(world, tmp_path / "run", **(SETTINGS | overrides))


def test_each_optimizer_has_a_learning_rate_of_its_own(world: Path, tmp_path: Path) -> None:
    rates = {"adamw": 1e-4, "prodigy": 1.0, "schedule_free_adamw": 3e-4, "lion": 3e-5}
    for name, rate in rates.items():
        config = make_config(world, tmp_path, **(SETTINGS | {"train__optimizer": name}))
        assert config.train.learning_rate == rate
    assert make_config(world, tmp_path, train__learning_rate=0.5).train.learning_rate == 0.5
