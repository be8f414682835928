"""Trainers that may be hurt: whole runs of scripts/train_t2i.py in forks of a warm parent.

A fresh interpreter spends seconds on imports; a fork spends none, and dies as truly.
"""

import contextlib
import dataclasses
import logging
import os
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.state import AcceleratorState
from fakes_training import arguments, read_metrics
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_t2i.py"
CUT_OUT = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "MASTER_ADDR", "WORLD_SIZE")
Plant = Callable[[], None]


@dataclasses.dataclass
class Child:
    """A forked trainer, in a process group of its own."""

    pid: int
    log: Path
    status: int | None = None

    def ended(self) -> bool:
        """Return whether it is over."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def wait(self, timeout_s: float = 300) -> int:
        """Return the exit status, negative for a signal; kill it when it takes too long."""
        deadline = time.monotonic() + timeout_s
        while not self.ended():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"still running after {timeout_s} s\n{self.output()}")
            time.sleep(0.005)
        assert self.status is not None
        return self.status

    def kill(self) -> bool:
        """Kill it and what it started; False when it was over before."""
        if self.ended():
            return False
        with contextlib.suppress(ProcessLookupError):  # not a group of its own yet
            os.killpg(self.pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        return self.wait() == -signal.SIGKILL

    def output(self) -> str:
        """Return what it wrote to its standard streams so far."""
        return self.log.read_text() if self.log.exists() else ""

    def when(self, seen: Callable[[], object], timeout_s: float = 300) -> None:
        """Return once `seen` is true."""
        deadline = time.monotonic() + timeout_s
        while not seen():
            assert time.monotonic() < deadline, f"never seen\n{self.output()}"
            time.sleep(0.005)


def fork(task: Callable[[], object], log: Path) -> Child:
    """Run a task in a forked child, as a script is run; status 0 unless it exits or raises."""
    log.unlink(missing_ok=True)

    def begin() -> None:
        os.setsid()
        _own_streams(log)
        for name in CUT_OUT:
            os.environ.pop(name, None)

    return Child(_fork(begin, task), log)


class ForkedProcess:
    """Takes the place of subprocess.Popen in a launcher, for a script: a fork has imported all."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        [place] = [place for place, word in enumerate(command) if word.endswith(".py")]

        def begin() -> None:
            os.environ.clear()
            os.environ.update(env)

        script, options = Path(command[place]), command[place + 1 :]
        self.pid, self.returncode = _fork(begin, lambda: run_command(script, options)), 0

    def wait(self) -> int:
        """Return the exit status, negative for a signal."""
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


def _fork(begin: Callable[[], object], task: Callable[[], object]) -> int:
    """Return the id of a forked child that does both and exits."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        begin()
        AcceleratorState._reset_state(reset_partial_state=True)
        task()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(status)


def run_script(world: Path, run: Path, **overrides: object) -> None:
    """Run scripts/train_t2i.py in this process; SystemExit tells its status."""
    config = f"--config={world / 'config.json'}"
    run_command(SCRIPT, [config, *arguments(world, run, **overrides)])


def run_command(script: Path, options: Sequence[str]) -> None:
    """Run a script with options in this process; SystemExit tells its status."""
    sys.argv = [str(script), *options]
    runpy.run_path(str(script), run_name="__main__")


def start(world: Path, run: Path, *, plant: Plant | None = None, **overrides: object) -> Child:
    """Start a trainer; plant: what is to go wrong, done in the child before it trains."""

    def task() -> None:
        if plant is not None:
            plant()
        run_script(world, run, **overrides)

    return fork(task, run.with_name(f"{run.name}.log"))


def start_ranks(
    world: Path, run: Path, *, num: int = 2, plant: Plant | None = None, **overrides: object
) -> Child:
    """Start torchrun's agent with `num` forked ranks."""

    def rank() -> None:
        _own_streams(run.with_name(f"{run.name}.log"))
        if plant is not None:
            plant()
        run_script(world, run, **overrides)

    return fork(lambda: launch_ranks(rank, num=num), run.with_name(f"{run.name}.log"))


def launch_ranks(rank: Callable[[], object], *, num: int = 2) -> None:
    """Do what `torchrun --nproc_per_node=num` does, but fork."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num,
        start_method="fork",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
    )
    elastic_launch(config, rank)()


def tensors_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint by part and name."""
    folder = run / "checkpoints" / f"step-{step:09d}"
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_state(run: Path, other: Path, *, step: int) -> None:
    """Losses up to `step` and the whole state after it are equal, bit for bit."""
    ours, theirs = read_metrics(run), read_metrics(other)
    assert {k: v for k, v in ours.items() if k <= step} == {
        k: v for k, v in theirs.items() if k <= step
    }
    state, expected = tensors_at(run, step), tensors_at(other, step)
    assert state.keys() == expected.keys()
    different = [name for name in state if not torch.equal(state[name], expected[name])]
    assert not different


def sheet(run: Path, step: int) -> bytes:
    """Return the sample sheet of a step, as it lies on the disk."""
    return (run / "samples" / f"step-{step:09d}.png").read_bytes()


def _leave(status: int) -> NoReturn:
    """Exit as an interpreter does, without the handlers that belong to the parent."""
    try:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _own_streams(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    logging.getLogger().handlers.clear()  # the test runner's
