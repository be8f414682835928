"""The benchmark of attribution trains as `latentdiff twin` does, bit for bit."""

import sys
from pathlib import Path

import pytest
import torch
from fakes_training import make_config, make_world
from safetensors.torch import load_file

from latentdiff.audit.twin import train_twin
from latentdiff.training.inputs.sources import find_images
from latentdiff.training.text_to_image.train_t2i import train

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_benchmark_trains_as_latentdiff_twin_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs one after the other in a process, from the same weights and with the same batches."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from attribution import Trainer

    world = make_world(tmp_path)
    quick = {"train__max_steps": 4, "preview__num_nearest": 0, "eval__num_heldout": 1}
    config = make_config(world, world / "run", train__optimizer="muon", **quick)
    assert train(config) == 0
    trainer = Trainer(config, world / "run")
    name = trainer.run.train_data.train[2].id
    assert train_twin(world / "run", [name], world / "twin") == 0
    trainer = Trainer(config, world / "run")
    found = []
    for without in ((), find_images(trainer.run.train_data.train, [name]), ()):
        trainer.train(without)
        parts = trainer.train_step.tensors()
        found.append({part: {n: x.clone() for n, x in parts[part].items()} for part in parts})
    folders = world / "run", world / "twin", world / "run"
    for parts, folder in zip(found, folders, strict=True):
        for part in ("model", "ema"):
            saved = load_file(folder / f"checkpoints/step-000000004/{part}.safetensors")
            assert all(torch.equal(saved[n], x) for n, x in parts[part].items()), (folder, part)
    assert sys.modules.pop("attribution", None)
