"""Runs on several sources with repeats: the same on every layout, and however they are cut up."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from fakes_faults import assert_same_state, sheet, start_ranks
from fakes_training import make_config, make_world, read_metrics

from latentdiff.data.shapes import write_shapes
from latentdiff.training.text_to_image.train_t2i import train

STEPS = 10  # of seven an epoch


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images with a weight of 3, and five in a repeat folder with a weight of 2."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    write_shapes(folder / "more/2_shape", num_train=5, num_test=0, size_px=32, seed=3)
    return folder


def with_sources(world: Path) -> dict[str, Any]:
    sources = [
        {"root": str(world / "data"), "weight": 3},
        {"root": str(world / "more"), "weight": 2, "caption_prefix": "a drawing of "},
    ]
    return {
        "data__root": "",
        "data__sources": json.dumps(sources),
        "data__repeat_folders": "true",
        "data__wildcards": "true",  # prompts are encoded at every step
        "train__max_steps": STEPS,
        "model__unet__dropout": 0.0,
    }


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(make_config(world, world / "whole", **with_sources(world))) == 0
    return world / "whole"


def test_pieces_with_workers_are_the_whole_bit_for_bit(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    run, settings = tmp_path / "run", with_sources(world)
    for stop, workers in ((3, 2), (8, 0), (STEPS, 2)):
        changes = {"train__max_steps": stop, "data__num_workers": workers}
        assert train(make_config(world, run, **settings | changes)) == 0
    assert_same_state(run, whole, step=STEPS)
    assert sheet(run, STEPS) == sheet(whole, STEPS)


def test_two_processes_train_on_the_same_samples_as_one(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    settings = with_sources(world) | {"train__micro_batch_size": 1}
    child = start_ranks(world, tmp_path / "run", **settings)
    assert child.wait() == 0, child.output()
    assert "an epoch has 25 samples: 15 of" in child.output()
    assert read_metrics(tmp_path / "run") == pytest.approx(read_metrics(whole), rel=0, abs=1e-6)


def test_plan_has_a_row_for_each_source(world: Path, whole: Path) -> None:
    rows = json.loads((whole / "plan.json").read_text())["data"]["sources"]
    assert [row["root"] for row in rows] == [str(world / "data"), str(world / "more")]
    assert [(row["train"], row["samples_per_epoch"]) for row in rows] == [(10, 15), (5, 10)]
    assert [row["held out"] for row in rows][1] == 0
