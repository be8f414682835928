"""Faults around a run: signals, dying workers, full disks, bad numbers, spoilt files."""

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from fakes_faults import Child, ForkedProcess, assert_same_state, fork, sheet, start, tensors_at
from fakes_training import arguments, make_config, make_world, read_metrics
from kill_runs import kill_text_to_image_runs

from latentdiff.training.checkpoint import newest_valid
from latentdiff.training.inputs.dataset import LatentDataset
from latentdiff.training.inputs.sources import read_data
from latentdiff.training.metrics_log import MetricsLog
from latentdiff.training.text_to_image import train_t2i as text_to_image
from latentdiff.training.text_to_image.preview import write_sheet
from latentdiff.training.text_to_image.train_step import TrainStep
from latentdiff.training.text_to_image.train_t2i import train

STEPS = 12
OFTEN = {"train__checkpoint_every_steps": 1, "train__keep_checkpoints": 100}
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A run that nothing stopped, with the state after each of its steps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(make_config(world, world / "whole", train__max_steps=STEPS, **OFTEN)) == 0
    return world / "whole"


def newest_step(run: Path) -> int:
    found, _ = newest_valid(run / "checkpoints")
    assert found is not None
    return int(found.name.removeprefix("step-").removesuffix(".replaced"))


def assert_goes_on_exactly(world: Path, run: Path, whole: Path) -> None:
    """Resume for a step and compare with the run that nothing stopped."""
    step = newest_step(run) + 1
    assert train(make_config(world, run, train__max_steps=step)) == 0
    if step > STEPS:
        whole = run.with_name("whole")
        assert train(make_config(world, whole, train__max_steps=step)) == 0
    assert_same_state(run, whole, step=step)


def slowly(seconds: float, *, from_step: int = 0) -> Callable[[], None]:
    """Plant steps that take long."""
    fast = TrainStep.step

    def slow(self: TrainStep, batches: Any, *, step: int, **others: Any) -> Any:
        if step >= from_step:
            time.sleep(seconds)  # in C: signals wait for nothing
        return fast(self, batches, step=step, **others)

    return lambda: setattr(TrainStep, "step", slow)


def reading(index: int, what: Callable[[], object], *, epoch: int) -> Callable[[], None]:
    """Plant something that happens when a sample is read in an epoch."""
    clean = LatentDataset.__getitem__

    def dirty(self: LatentDataset, key: Any) -> dict[str, torch.Tensor]:
        if (key.index, key.epoch) == (index, epoch):
            what()
        return clean(self, key)

    return lambda: setattr(LatentDataset, "__getitem__", dirty)


def signalled(child: Child, run: Path, send: Callable[[], None]) -> int:
    """Signal a trainer that is some steps on its way; return its exit status."""
    child.when((run / "checkpoints" / "step-000000002").exists)
    send()
    return child.wait()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_to_all_processes_of_a_run_spares_its_data_workers(
    world: Path, whole: Path, tmp_path: Path, number: int, status: int
) -> None:
    """As torchrun, systemd and Ctrl-C send it."""
    run = tmp_path / "run"
    settings = {"train__max_steps": 4000, "data__num_workers": 2, **OFTEN}
    child = start(world, run, plant=slowly(0.05), **settings)
    assert signalled(child, run, lambda: os.killpg(child.pid, number)) == status, child.output()
    assert_goes_on_exactly(world, run, whole)


def test_notice_shorter_than_a_step_leaves_the_last_checkpoint(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    child = start(world, run, plant=slowly(600, from_step=3), train__max_steps=9, **OFTEN)
    child.when((run / "checkpoints" / "step-000000003").exists)
    os.kill(child.pid, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert newest_step(run) == 3
    assert_goes_on_exactly(world, run, whole)


def test_signal_before_the_first_step_ends_the_run_at_once(world: Path, tmp_path: Path) -> None:
    def plant() -> None:
        text_to_image.setup = lambda *_, **__: time.sleep(600)  # encoding a large folder

    child = start(world, tmp_path / "run", plant=plant)
    child.when((tmp_path / "run" / ".lock").exists)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_sigterm_to_accelerate_launch_saves_and_goes_on_exactly(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    """The launcher is forked, and so is the trainer, its child."""
    assert ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0) == 0  # orphans are ours to wait for
    run, script = tmp_path / "run", Path(__file__).parents[2] / "scripts" / "train_t2i.py"
    options = arguments(world, run, train__max_steps=4000, train__checkpoint_every_steps=2)

    def launch() -> None:
        from accelerate.commands.launch import main

        subprocess.Popen = ForkedProcess
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        sys.argv = ["accelerate-launch", "--cpu", "--num_cpu_threads_per_process=1", str(script)]
        sys.argv += [f"--config={world / 'config.json'}", *options]
        main()

    launcher = fork(launch, tmp_path / "launcher.log")
    launcher.when((run / "checkpoints" / "step-000000002").exists)
    trainer = Child(int((run / ".lock").read_text().split()[1]), launcher.log)
    os.kill(launcher.pid, signal.SIGTERM)
    assert launcher.wait() == -signal.SIGTERM
    assert trainer.wait() == 143, trainer.output()
    ctypes.CDLL(None).prctl(SUBREAPER, 0, 0, 0, 0)
    assert_goes_on_exactly(world, run, whole)


def infinite_gradients(*, at: range) -> Callable[[], None]:
    """Plant an Inf in one gradient of some steps; the loss stays finite."""
    clean = TrainStep.step

    def dirty(self: TrainStep, batches: Any, *, step: int, **others: Any) -> Any:
        parameter = next(iter(self.parameters.values()))
        hook = parameter.register_hook(lambda g: g * torch.inf if step in at else g)
        try:
            return clean(self, batches, step=step, **others)
        finally:
            hook.remove()

    return lambda: setattr(TrainStep, "step", dirty)


def test_infinite_gradient_skips_the_update_and_too_many_stop_the_run(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = {"train__max_steps": 9, "train__max_skipped_steps": 3, **OFTEN}
    child = start(world, run, plant=infinite_gradients(at=range(4, 9)), **settings)
    assert child.wait() == 1
    assert read_metrics(run, "skipped_updates") == {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1}
    assert "3 updates in a row, last at step 7 with" in child.output()
    assert ".png" in child.output().splitlines()[-1]
    before = tensors_at(run, 4)
    assert all(torch.equal(before[name], x) for name, x in tensors_at(run, 6).items())
    assert newest_step(run) == 6
    assert not (run / "pipeline").exists()
    assert_same_state(run, whole, step=4)


@pytest.mark.parametrize(
    "death", [lambda: os._exit(0), lambda: os.kill(os.getpid(), signal.SIGKILL)]
)
def test_dead_data_worker_ends_the_run_and_names_the_sample(
    world: Path, whole: Path, tmp_path: Path, death: Callable[[], object]
) -> None:
    run = tmp_path / "run"
    child = start(world, run, plant=reading(3, death, epoch=2), data__num_workers=2, **OFTEN)
    assert child.wait() == 1
    name = read_data(make_config(world, run).data)[0].ids[3]
    assert f"a data worker died while it read {name} (" in child.output()
    assert newest_step(run) >= 1
    assert_goes_on_exactly(world, run, whole)


def test_full_disk_is_told_and_keeps_what_was_saved(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(make_config(world, run, train__max_steps=6)) == 0
    kept = tensors_at(run, 6)
    step = slowly(0.02)

    def fill_the_disk() -> None:
        """Leave room for less than a line of the log once training is under way."""
        step()
        slow = TrainStep.step

        def filled(self: TrainStep, batches: Any, **others: Any) -> Any:
            size = (run / "metrics.jsonl").stat().st_size + 300
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            TrainStep.step = slow
            return slow(self, batches, **others)

        TrainStep.step = filled

    child = start(world, run, plant=fill_the_disk, train__max_steps=8, **OFTEN)
    assert child.wait() == 2, child.output()
    assert "a checkpoint could not be saved" in child.output()
    assert "no line for step 8 in metrics.jsonl yet" in child.output()
    assert "the last checkpoint could not be saved" in child.output().splitlines()[-1]
    assert newest_step(run) == 6
    assert all(torch.equal(x, kept[name]) for name, x in tensors_at(run, 6).items())
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-000000006"}

    child = start(world, run, plant=fill_the_disk, train__max_steps=STEPS, **OFTEN)
    child.when(lambda: "a checkpoint could not be saved" in child.output())
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert child.wait() == 0, child.output()
    assert_same_state(run, whole, step=STEPS)
    assert sheet(run, STEPS) == sheet(whole, STEPS)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_resume_falls_back_over_spoilt_checkpoints_to_one_being_replaced(
    world: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    assert train(make_config(world, run, train__max_steps=8, **OFTEN)) == 0
    checkpoints = run / "checkpoints"
    flip_a_bit(checkpoints / "step-000000008" / "model.safetensors")
    empty(checkpoints / "step-000000007" / "optimizer.safetensors")
    truncate(checkpoints / "step-000000006" / "ema.safetensors")
    flip_a_bit(checkpoints / "step-000000005" / "manifest.json")
    whole_one = checkpoints / "step-000000004"
    whole_one.rename(checkpoints / "step-000000004.replaced")  # killed between two renames
    caplog.set_level("INFO")
    assert train(make_config(world, run, train__max_steps=STEPS)) == 0
    reasons = [r.getMessage() for r in caplog.records if "checkpoint skipped" in r.getMessage()]
    files = ("model.safetensors was", "optimizer.safetensors is", "ema.safetensors is", "manifest")
    assert len(reasons) == 4
    assert all(file in reason for file, reason in zip(files, reasons, strict=True))
    assert "resumed after step 4 from" in caplog.text
    assert_same_state(run, whole, step=STEPS)
    assert sheet(run, STEPS) == sheet(whole, STEPS)
    assert not list(checkpoints.glob("*.replaced"))


def test_killed_runs_lose_nothing(tmp_path: Path) -> None:
    """A hundred kills and more: python tests/fakes/kill_runs.py 100."""
    figures = kill_text_to_image_runs(3, tmp_path, num_steps=8)
    assert figures["kills"] == 3
    assert figures["runs"] >= 1


def test_sheet_that_a_kill_prevented_is_made_by_the_resumed_run(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = {"train__max_steps": STEPS, **OFTEN}

    def die(*args: Any, **others: Any) -> dict[str, float]:
        if args[2].name == f"step-{STEPS:09d}.png":  # not the one before the first step
            os.kill(os.getpid(), signal.SIGKILL)
        return write_sheet(*args, **others)

    child = start(world, run, plant=lambda: setattr(text_to_image, "write_sheet", die), **settings)
    assert child.wait() == -signal.SIGKILL
    assert newest_step(run) == STEPS - 1
    assert train(make_config(world, run, **settings)) == 0
    assert_same_state(run, whole, step=STEPS)
    assert sheet(run, STEPS) == sheet(whole, STEPS)
    assert (run / "pipeline").is_dir()


def test_no_evaluation_or_sheet_is_made_twice_and_skipped_ones_are_made_up_for(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out losses and sheets of every other step, over a stop at step 4 and a second end."""
    settings = {"train__max_steps": 6, "eval__every_steps": 2, "preview__every_steps": 2, **OFTEN}
    assert train(make_config(world, tmp_path / "whole", **settings)) == 0
    run, clean, made = tmp_path / "run", TrainStep.step, []

    def stopping(self: TrainStep, batches: Any, *, step: int, **others: Any) -> Any:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return clean(self, batches, step=step, **others)

    def counting(*args: Any, **others: Any) -> dict[str, float]:
        made.append(args[2].name)
        return write_sheet(*args, **others)

    monkeypatch.setattr(text_to_image, "write_sheet", counting)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "step", stopping)
        assert train(make_config(world, run, **settings)) == 143
    assert list(read_metrics(run, "heldout_loss")) == [0, 2]
    for _ in range(2):  # the second time at the end
        assert train(make_config(world, run, **settings)) == 0
    assert read_metrics(run, "heldout_loss") == read_metrics(tmp_path / "whole", "heldout_loss")
    lines = (run / "metrics.jsonl").read_text()
    assert lines.count('"heldout_loss":') == 4
    assert made == [f"step-{step:09d}.png" for step in (0, 2, 4, 6)]
    assert_same_state(run, tmp_path / "whole", step=6)


def test_log_line_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, is_main=True, first_step=0)
    log.write(1, {"loss": float("nan"), "skipped_updates": 1.0})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": null, "skipped_updates": 1.0}\n'
    )
