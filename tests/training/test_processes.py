"""Two processes share caching, held-out figures and sheets, and get what one gets."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fakes_training import arguments, make_config, make_world, read_metrics
from PIL import Image
from safetensors.torch import load_file

from latentdiff.models.components import load_components
from latentdiff.training.text_to_image.preview import write_sheet
from latentdiff.training.text_to_image.train_t2i import train

# Timesteps by their losses, of which the history is full after some twelve steps.
SETTINGS = {
    "train__max_steps": 20,
    "train__batch_size": 8,
    "model__unet__dropout": 0.0,
    "diffusion__timestep_sampling": "loss_aware",
    "diffusion__num_timesteps": 4,
    "eval__num_heldout": 21,
}
PROMPTS = ["a red star", "a blue ring", "a red ring", "a green star", "a black square"]
PATHS = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "fakes")]
PROGRAM = """
import os, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import test_processes
from latentdiff.config.io import load_config
from latentdiff.cli.command import quieten_libraries
from latentdiff.training.text_to_image.train_t2i import train
quieten_libraries()
assert os.environ["WORLD_SIZE"] == "2"
config = load_config(sys.argv[1], sys.argv[3:])
assert train(config) == 0
test_processes.write_sample_sheet(Path(sys.argv[2]), Path(config.output_dir) / "sheet.png")
"""


def write_sample_sheet(model: Path, path: Path) -> None:
    """Write a sheet of images of the given model, in as many processes as there are."""
    components = load_components(model)
    accelerator = Accelerator(cpu=True)
    write_sheet(
        components,
        PROMPTS,
        path,
        accelerator=accelerator,
        seed=0,
        num_steps=2,
        guidance_scale=3.0,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """One run in one process and one in two, each with its own cache; the output of the latter."""
    world = make_world(tmp_path_factory.mktemp("world"))
    one, two = world / "one", world / "two"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(make_config(world, one, **SETTINGS)) == 0
    write_sample_sheet(one / "pipeline", one / "sheet.png")
    program = world / "program.py"
    program.write_text(PROGRAM.format(paths=PATHS))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += ["--master_port=29563", str(program), str(world / "config.json")]
    command += [str(one / "pipeline"), *arguments(world, two, **SETTINGS)]
    command += [f"--data.cache_dir={world / 'cache of two'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return one, two, done.stderr


@pytest.mark.slow
def test_both_processes_encode_their_share(runs: tuple[Path, Path, str]) -> None:
    caches = [runs[0].parent / name / "latents" for name in ("cache", "cache of two")]
    rows = [[len(load_file(f)["rows"]) for f in c.glob("*.safetensors")] for c in caches]
    assert sorted(rows[0]) == [4, 10]  # held out, training
    assert sum(rows[1]) == 14
    assert len(rows[1]) >= 3


@pytest.mark.slow
def test_losses_and_heldout_figures_are_those_of_one_process(
    runs: tuple[Path, Path, str],
) -> None:
    one, two, _ = runs
    names = ["loss", "heldout_loss", "heldout_se", "caption_use", "caption_match"]
    for name in [*names, "heldout_loss/t0-0", "heldout_se/t3-3", "num_heldout"]:
        figures, expected = read_metrics(two, name), read_metrics(one, name)
        assert figures.keys() == expected.keys()
        assert len(expected) >= 1
        assert list(figures.values()) == pytest.approx(list(expected.values()), rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_history_of_losses_is_that_of_one_process(runs: tuple[Path, Path, str]) -> None:
    file = "checkpoints/step-000000020/timesteps.safetensors"
    expected, history = (load_file(run / file) for run in runs[:2])
    assert expected["counts"].min() >= 10  # timesteps were no longer sampled evenly
    assert expected["counts"].sum() == 100
    assert torch.equal(history["counts"], expected["counts"])
    torch.testing.assert_close(history["losses"], expected["losses"], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_resume_takes_the_history_up_and_continues_bitwise(
    runs: tuple[Path, Path, str], tmp_path: Path
) -> None:
    one, run = runs[0], tmp_path / "run"
    for last in (15, 20):  # 15: within an epoch, timesteps already sampled by their losses
        AcceleratorState._reset_state(reset_partial_state=True)
        settings = SETTINGS | {"train__max_steps": last}
        assert train(make_config(one.parent, run, **settings)) == 0
    assert read_metrics(run) == read_metrics(one)
    for part in ("model", "ema", "timesteps"):
        file = f"checkpoints/step-000000020/{part}.safetensors"
        resumed, expected = load_file(run / file), load_file(one / file)
        assert resumed.keys() == expected.keys()
        assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_the_sheet_has_the_same_pixels(runs: tuple[Path, Path, str]) -> None:
    one, two = (np.asarray(Image.open(run / "sheet.png")) for run in runs[:2])
    assert np.array_equal(one, two)


@pytest.mark.slow
def test_the_plan_knows_the_memory_of_every_part(runs: tuple[Path, Path, str]) -> None:
    assert "not known" not in runs[2]


def test_the_libraries_say_nothing(runs: tuple[Path, Path, str]) -> None:
    assert "Loading weights" not in runs[2]
    assert "Writing model shards" not in runs[2]
