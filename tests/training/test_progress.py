"""What a person sees of a run: lines in a log, a bar in a terminal, the notice of a signal."""

import io
import json
import logging
import os
import signal
import sys
from pathlib import Path

import pytest
from fakes_training import make_config, make_world

from latentdiff.program import program
from latentdiff.training.progress import LOG_INTERVAL_S, Progress, duration_text
from latentdiff.training.run_log import read_log
from latentdiff.training.stop_signals import StopSignals
from latentdiff.training.text_to_image.train_t2i import train

FIGURES = {"loss": 0.25, "images_per_second": 12.0, "memory_gb": 1.5}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_run_tells_what_it_writes_and_what_to_type_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    world, run = make_world(tmp_path), tmp_path / "run"
    settings = {"eval__every_steps": 2, "train__max_steps": 3, "data__heldout_fraction": 0.3}
    assert train(make_config(world, run, **settings | {"train__max_steps": 2})) == 0
    first = (run / "samples" / "step-000000000.png").stat().st_mtime_ns
    caplog.clear()
    assert train(make_config(world, run, **settings)) == 0
    assert (run / "samples" / "step-000000000.png").stat().st_mtime_ns == first
    assert f"checkpoint saved: {run / 'checkpoints' / 'step-000000003'}" in caplog.text
    assert f"samples written: {run / 'samples' / 'step-000000003.png'}" in caplog.text
    assert " since step 2)" in caplog.text
    assert f"\n  {run / 'pipeline'}\n" in caplog.text
    assert f"{program()} sample {run / 'pipeline'} '" in caplog.text
    assert f"--out {run / 'evaluation'} --heldout_fraction 0.3\n" in caplog.text + "\n"
    assert f"report {run}\n" in caplog.text
    assert "epoch 1.0 of 1.0" in caplog.text
    assert "checkpoint saved" in (run / "log.txt").read_text()
    assert read_log(run)[-1].session == 1
    assert json.loads((run / "plan.json").read_text())["steps"]["images_per_step"] == 10 / 3
    caplog.clear()
    assert train(make_config(world, run, **settings)) == 0
    assert "already trained to step 3: max_steps above that trains on" in caplog.text
    stderr = capfd.readouterr().err
    assert "encoding:" not in stderr  # no bar, whose carriage returns fill a log
    assert "/3 " not in stderr


def test_a_log_gets_the_first_line_the_last_and_one_every_so_often(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    clock = iter([100.0, 101.0, 100.0 + LOG_INTERVAL_S, 101.0 + LOG_INTERVAL_S, 132.0])
    monkeypatch.setattr("latentdiff.training.progress.time.monotonic", lambda: next(clock))
    progress = Progress(0, 50, steps_per_epoch=10, is_main=True)
    for step in range(10, 60, 10):
        progress.show(step, FIGURES, seconds=20.0)
    steps = [message.split(",")[0] for message in caplog.messages]
    assert steps == ["step 10 of 50", "step 30 of 50", "step 50 of 50"]
    assert caplog.messages[0] == (
        "step 10 of 50, 01:20 left, loss 0.2500, 12 img/s, 1.5 GB, epoch 1.0 of 5.0"
    )


@pytest.mark.parametrize(
    ("steps_per_epoch", "expected"),
    [(0, ""), (0.5, ""), (1, ""), (2, "epoch 20 of 1,000"), (100, "epoch 0.4 of 20.0")],
)
def test_epochs_are_shown_where_they_say_more_than_the_steps(
    steps_per_epoch: float, expected: str
) -> None:
    progress = Progress(0, 2000, steps_per_epoch=steps_per_epoch, is_main=False)
    progress.show(40, FIGURES, seconds=1.0)
    assert progress.text().partition(" GB")[2].removeprefix(", ") == expected


def test_the_time_left_counts_sheets_and_evaluation_to_come() -> None:
    progress = Progress(0, 40, steps_per_epoch=0, is_main=False)
    progress.show(10, FIGURES, seconds=10.0, paused=20.0)
    assert progress.text().startswith("01:30 left")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(17, "17 s"), (185, "3 min 5 s"), (7800, "2 h 10 min"), (3599.7, "1 h 0 min")],
)
def test_a_duration_is_in_words(seconds: float, expected: str) -> None:
    assert duration_text(seconds) == expected


@pytest.mark.parametrize("is_main", [True, False])
def test_a_terminal_has_one_bar_of_the_main_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_main: bool
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    progress = Progress(0, 4, steps_per_epoch=0, is_main=is_main)
    progress.show(1, FIGURES, seconds=2.0)
    progress.show_heldout(1, 0.5, before=(0, 0.75))
    for _ in range(3):
        progress.advance()
    assert progress.text().startswith("00:00 left, loss 0.2500, held-out 0.5000")
    progress.close()
    assert ("3/4, 00:00 left, loss" in terminal.getvalue()) == is_main
    assert ("-0.2500 since step 0" in caplog.text) == is_main


@pytest.mark.parametrize("announces", [True, False])
def test_the_first_signal_is_answered_at_once(
    capfd: pytest.CaptureFixture[str], announces: bool
) -> None:
    with StopSignals(announces=announces):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # as a launcher passes it on
        found = capfd.readouterr().err
    assert found.count("finishing this step and saving") == announces
