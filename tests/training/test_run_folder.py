"""One run a folder; signals are noted, not died of."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from latentdiff.training import stop_signals
from latentdiff.training.run_folder import RunLock, open_run_folder
from latentdiff.training.stop_signals import StopSignals, die_with_parent


def test_second_run_is_refused_by_the_name_of_the_first(tmp_path: Path) -> None:
    with (
        RunLock(tmp_path),
        pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"),
        RunLock(tmp_path),
    ):
        pass
    with RunLock(tmp_path):
        pass


def test_a_refused_run_leaves_no_folder_that_it_made_and_every_other(tmp_path: Path) -> None:
    accelerator: Any = SimpleNamespace(is_main_process=True, num_processes=1)
    (tmp_path / "before").mkdir()

    def refuse(name: str, *files: str) -> None:
        with open_run_folder(f"{tmp_path / name}", accelerator) as folder:
            for file in files:
                (folder / file).touch()
            raise ValueError("bad input")

    for arguments in (("refused",), ("written", "plan.json"), ("before",)):
        with pytest.raises(ValueError, match="bad input"):
            refuse(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"before", "written"}


def test_lock_ends_with_a_killed_process_though_its_workers_live_on(tmp_path: Path) -> None:
    ready, writer = os.pipe()
    holder = os.fork()
    if holder == 0:
        with RunLock(tmp_path):
            if os.fork() == 0:
                os.write(writer, b"%8d" % os.getpid())  # the fork's hooks have run
                time.sleep(60)
                os._exit(0)
            time.sleep(60)
    worker = int(os.read(ready, 8))
    try:
        with pytest.raises(ValueError, match=f"process {holder}"), RunLock(tmp_path):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.close(ready)
        os.close(writer)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_is_noted_and_handlers_come_back(number: int, code: int) -> None:
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert signals.received is None
        assert signals.exit_code == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
        assert signals.exit_code == code
    assert signal.getsignal(number) == before
    assert signals.exit_code == code


def test_second_sigint_quits_and_a_launchers_echo_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(stop_signals, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with StopSignals(echo_s=1) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGINT
        now[0] += 1.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_shells_and_torchrun_are_no_parents_to_die_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert not die_with_parent()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert not die_with_parent()


TRAINER = """
import time
from latentdiff.training.stop_signals import StopSignals, die_with_parent
assert die_with_parent()
with StopSignals() as signals:
    print("ready", flush=True)
    for _ in range(200):
        time.sleep(0.05)
        if signals.received:
            print(signals.exit_code, flush=True)
            break
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_sigterm_to_an_accelerate_like_launcher_reaches_the_trainer() -> None:
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}
    environment.pop("TORCHELASTIC_RUN_ID", None)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, TRAINER],
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert launcher.stdout is not None
    with launcher:
        assert launcher.stdout.readline() == "ready\n"
        launcher.terminate()
        assert launcher.stdout.readline() == "143\n"
