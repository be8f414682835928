"""The same numbers however a run is cut up: in time, over workers, accumulation and processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from fakes_faults import (
    CUT_OUT,
    SCRIPT,
    ForkedProcess,
    assert_same_state,
    fork,
    sheet,
    start_ranks,
    tensors_at,
)
from fakes_training import arguments, make_config, make_world, read_metrics
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from latentdiff.training import distributed
from latentdiff.training.checkpoint import newest_valid
from latentdiff.training.distributed import single_process_accelerator, start_accelerator
from latentdiff.training.loop import Loop
from latentdiff.training.text_to_image.model import TextToImage
from latentdiff.training.text_to_image.train_step import TrainStep
from latentdiff.training.text_to_image.train_t2i import train

OFTEN = {"train__checkpoint_every_steps": 1, "train__keep_checkpoints": 100}
PLAIN = {
    "train__max_steps": 20,
    "train__batch_size": 8,  # of ten images: every other step is partial
    "train__learning_rate": 1e-4,
    "model__unet__dropout": 0.0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def plain(world: Path) -> Path:
    """Twenty steps in one process, without workers or accumulation."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(make_config(world, world / "plain", **PLAIN)) == 0
    return world / "plain"


@pytest.fixture(scope="module")
def wholes(world: Path) -> dict[str, Path]:
    """Eight steps with dropout that nothing stopped, by precision."""
    runs = {precision: world / precision for precision in ("fp32", "bf16")}
    for precision, run in runs.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        assert train(make_config(world, run, train__mixed_precision=precision)) == 0
    return runs


@pytest.mark.parametrize(
    "layout",  # workers, accumulation, processes: each alone, and all of them
    [(2, 1, 1), (0, 4, 1), (0, 1, 2), (2, 4, 2)],
    ids="{0[0]} workers, {0[1]} accumulated, {0[2]} processes".format,
)
def test_losses_of_twenty_steps_are_equal_on_each_layout(
    world: Path, plain: Path, tmp_path: Path, layout: tuple[int, int, int]
) -> None:
    workers, accumulation, processes = layout
    micro = 8 // accumulation // processes
    settings = PLAIN | {"data__num_workers": workers, "train__micro_batch_size": micro}
    if processes == 1:
        assert train(make_config(world, tmp_path / "run", **settings)) == 0
    else:
        child = start_ranks(world, tmp_path / "run", num=processes, **settings)
        assert child.wait() == 0, child.output()
        assert f"(2 processes x {micro} x {accumulation} accumulated)" in child.output()
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(plain)
    assert ours == pytest.approx(theirs, rel=0, abs=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pieces_are_the_whole_bit_for_bit(
    world: Path, wholes: dict[str, Path], tmp_path: Path, precision: str
) -> None:
    """Stops within an epoch, after its partial last batch, in the next; workers come and go."""
    run, whole = tmp_path / "run", wholes[precision]
    for piece, stop in enumerate((1, 3, 5, 8)):
        settings = {"train__mixed_precision": precision, "data__num_workers": 2 * (piece % 2)}
        assert train(make_config(world, run, train__max_steps=stop, **settings)) == 0
    assert_same_state(run, whole, step=8)
    assert sheet(run, 8) == sheet(whole, 8)


def fsdp_config() -> dict[str, Any]:
    """Return what configs/accelerate/fsdp2_8_gpus.yaml sets."""
    path = SCRIPT.parents[1] / "configs" / "accelerate" / "fsdp2_8_gpus.yaml"
    return yaml.safe_load(path.read_text())["fsdp_config"]


def spread_over_processes() -> None:
    """Do with torch's fully_shard on gloo what Accelerate does with it on GPUs."""

    def prepare(self: Accelerator, model: TextToImage) -> Any:
        mesh = init_device_mesh("cpu", (self.num_processes,))
        layers = fsdp_config()["fsdp_transformer_layer_cls_to_wrap"].split(",")
        blocks = [block for block in model.modules() if type(block).__name__ in layers]
        assert {type(block).__name__ for block in blocks} == set(layers)
        for block in reversed(blocks):  # the innermost first
            fully_shard(block, mesh=mesh)
        spread = fully_shard(model, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        return spread

    Accelerator.prepare = prepare


def save_again(loop: Loop, batches: object, *, first_step: int) -> bool:
    """Take the place of the training loop: save the loaded state elsewhere."""
    loop.checkpoints.root = loop.checkpoints.root.parent / "again" / "checkpoints"
    loop.checkpoints.save(loop.recipe, first_step)
    return False


def test_fsdp2_trains_to_the_same_losses_and_its_state_goes_both_ways(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, spread = tmp_path / "plain", tmp_path / "spread"
    settings = PLAIN | {"train__max_steps": 4, "train__channels_last": False}
    assert train(make_config(world, plain, **settings)) == 0
    child = start_ranks(world, spread, plant=spread_over_processes, **settings)
    assert child.wait() == 0, child.output()
    assert read_metrics(spread) == pytest.approx(read_metrics(plain), rel=0, abs=1e-6)
    heldout = read_metrics(spread, "heldout_loss")
    assert heldout == pytest.approx(read_metrics(plain, "heldout_loss"), rel=0, abs=1e-5)

    def plant() -> None:
        spread_over_processes()
        Loop.train_steps = save_again

    child = start_ranks(world, plain, plant=plant, **settings)
    assert child.wait() == 0, child.output()
    assert not (spread / "pipeline").exists()
    assert train(make_config(world, spread, **settings)) == 0
    assert (spread / "pipeline" / "unet").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "train_steps", save_again)
        assert train(make_config(world, spread, **settings)) == 0
    for run in (plain, spread):
        saved, again = tensors_at(run, 4), tensors_at(run / "again", 4)
        assert saved.keys() == again.keys()
        assert all(torch.equal(saved[name], again[name]) for name in saved)
        assert any(name.endswith("/exp_avg") for name in saved)
        assert any(name.startswith("ema/") for name in saved)

    settings |= {"train__max_steps": 6}
    assert train(make_config(world, plain, **settings)) == 0
    assert train(make_config(world, spread, **settings)) == 0
    assert read_metrics(spread) == pytest.approx(read_metrics(plain), rel=0, abs=1e-6)


def failing(rank: int, *, at: int) -> Callable[[], None]:
    """Plant an error in one rank's step."""
    clean = TrainStep.step

    def dirty(self: TrainStep, batches: Any, *, step: int, **others: Any) -> Any:
        if (self.accelerator.process_index, step) == (rank, at):
            raise RuntimeError("a fault of one")
        return clean(self, batches, step=step, **others)

    return lambda: setattr(TrainStep, "step", dirty)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_failing_rank_stops_the_others_and_is_named(
    world: Path, tmp_path: Path, rank: int
) -> None:
    run = tmp_path / "run"
    child = start_ranks(world, run, plant=failing(rank, at=3), **OFTEN)
    assert child.wait() != 0  # well before the other rank would give up waiting, after 30 minutes
    assert f"rank {rank} of 2 processes failed: a fault of one" in child.output()
    found, skipped = newest_valid(run / "checkpoints")
    assert (found, skipped) == (run / "checkpoints" / "step-000000003", [])


def test_sigterm_to_torchrun_saves_and_one_process_goes_on(world: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = PLAIN | {"data__num_workers": 2, **OFTEN}
    child = start_ranks(world, run, **settings | {"train__max_steps": 4000})
    child.when((run / "checkpoints" / "step-000000003").exists)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() != 0
    found, skipped = newest_valid(run / "checkpoints")
    assert found is not None
    assert not skipped
    step = int(found.name.removeprefix("step-")) + 2
    for folder in (run, whole):
        assert train(make_config(world, folder, **settings | {"train__max_steps": step})) == 0
    assert read_metrics(run) == pytest.approx(read_metrics(whole), rel=0, abs=1e-6)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            "was asked for several processes .* started one",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP needs GPUs"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "expected fsdp_version: 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for DeepSpeed, which"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "asked for --mixed_precision fp16 .*=fp32"),
    ],
)
def test_what_was_asked_for_and_is_not_there_is_refused(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    message: str,
) -> None:
    for name in CUT_OUT:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        start_accelerator(make_config(world, tmp_path / "run"))


def test_fsdp_refuses_the_layout_that_it_cannot_spread(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engaged = SimpleNamespace(
        num_processes=1, distributed_type=DistributedType.FSDP, device=torch.device("cpu")
    )
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: engaged)
    for name in CUT_OUT:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"add --train\.channels_last=false"):
        start_accelerator(make_config(world, tmp_path / "run", train__channels_last=True))
    config = make_config(world, tmp_path / "run", train__channels_last=False)
    assert start_accelerator(config) is engaged


def test_ranks_that_ask_for_fsdp_on_the_cpu_exit_2(world: Path, tmp_path: Path) -> None:
    def plant() -> None:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

    child = start_ranks(world, tmp_path / "run", plant=plant)
    assert child.wait() != 0
    assert "asks for FSDP and Accelerate trains as" in child.output()
    assert "exitcode  : 2" in child.output()


def test_accelerate_launch_that_starts_one_process_of_two_exits_2(
    world: Path, tmp_path: Path
) -> None:
    def launch() -> None:
        from accelerate.commands.launch import main

        subprocess.Popen = ForkedProcess
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        sys.argv = ["accelerate-launch", "--cpu", "--num_processes=2", str(SCRIPT)]
        sys.argv += [f"--config={world / 'config.json'}", *arguments(world, tmp_path / "run")]
        main()

    child = fork(launch, tmp_path / "log")
    assert child.wait() == 1  # the launcher's, whose message has the trainer's
    assert "was asked for several processes" in child.output()
    assert "returned non-zero exit status 2" in child.output()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("asked", "name"), [("no", "bf16"), ("bf16", "bf16"), ("no", "fp32")])
def test_precision_that_accelerate_launch_agrees_with_is_trained_in(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, name: str
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    config = make_config(world, tmp_path / "run", train__mixed_precision=name)
    assert start_accelerator(config).mixed_precision == ("no" if name == "fp32" else name)


def test_one_process_recipes_refuse_another_precision_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match=r"--mixed_precision bf16 and the config .*=fp16"):
        single_process_accelerator("fp16")
