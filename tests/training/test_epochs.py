"""train.max_epochs: resolved to steps once, stored, planned, and the same in a resumed run."""

import logging
from pathlib import Path
from typing import Any

import pytest
from fakes_training import make_config, make_world, read_metrics

from latentdiff.config.io import load_config
from latentdiff.config.text_to_image import Config
from latentdiff.training.checkpoint import checkpoint_folders
from latentdiff.training.text_to_image.train_t2i import train

QUICK = {"preview__num_nearest": 0, "eval__num_heldout": 1, "train__checkpoint_every_steps": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))  # ten images, three steps an epoch


def stored(run: Path) -> tuple[int, float]:
    config: Config = load_config(run / "config.yaml")
    return config.train.max_steps, config.train.max_epochs


def test_epochs_become_steps_in_place_of_max_steps_and_are_stored_so(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = tmp_path / "run"
    config = make_config(world, run, **QUICK, train__max_steps=100, train__max_epochs=1.5)
    assert train(config) == 0
    assert stored(run) == (5, 0)  # half of three steps is two
    assert max(read_metrics(run)) == 5
    assert "max_epochs=1.5 become max_steps=5, 3 steps an epoch" in caplog.text
    assert "steps 0 to 5, 4 images a step, " in caplog.text
    assert "1.7 epochs" in caplog.text


def test_more_epochs_continue_a_run_beyond_max_steps_of_the_command(
    world: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    given: dict[str, Any] = QUICK | {"train__max_steps": 1}  # which the epochs stand in for
    assert train(make_config(world, run, **given, train__max_epochs=1)) == 0
    assert train(make_config(world, run, **given, train__max_epochs=1)) == 0  # done already
    assert stored(run) == (3, 0)
    assert train(make_config(world, run, **given, train__max_epochs=2)) == 0
    assert train(make_config(world, whole, **given, train__max_epochs=2)) == 0
    assert stored(run) == stored(whole) == (6, 0)
    assert read_metrics(run) == read_metrics(whole)


def test_fewer_epochs_than_a_run_has_are_refused_in_steps(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(make_config(world, run, **QUICK, train__max_epochs=2)) == 0
    before = [path.name for path in checkpoint_folders(run / "checkpoints")]
    with pytest.raises(ValueError, match=r"train.max_steps=3 is less than the 6 steps"):
        train(make_config(world, run, **QUICK, train__max_epochs=1))
    assert [path.name for path in checkpoint_folders(run / "checkpoints")] == before
