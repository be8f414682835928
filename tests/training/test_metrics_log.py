"""A run's figures: in metrics.jsonl and in TensorBoard."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentdiff.training import metrics_log
from latentdiff.training.metrics_log import MetricsLog, Stopwatch
from latentdiff.training.text_to_image.step_results import StepResults
from latentdiff.training.text_to_image.train_step import StepResult
from latentdiff.training.trackers import Trackers

NAN = float("nan")
FIGURES = {
    "loss",
    "grad_norm",
    "learning_rate",
    "skipped_updates",
    "loss/t0-249",
    "loss/t500-749",
}


@pytest.fixture
def results() -> StepResults:
    AcceleratorState._reset_state(reset_partial_state=True)
    return StepResults(Accelerator(cpu=True), max_skipped_steps=3, num_timesteps=1000)


def result(loss: float, norm: float, sums: list[float], counts: list[float]) -> StepResult:
    return StepResult(
        loss=torch.tensor(loss),
        grad_norm=torch.tensor(norm),
        ok=torch.isfinite(torch.tensor(norm)),
        bucket_losses=torch.tensor(sums),
        bucket_counts=torch.tensor(counts),
        indices=torch.arange(4),
    )


def test_figures_are_means_over_the_window(results: StepResults) -> None:
    results.add(result(1.0, 2.0, [2.0, 0, 1, 0], [2.0, 0, 1, 0]))
    results.add(result(3.0, 4.0, [4.0, 0, 0, 0], [1.0, 0, 0, 0]))
    figures, skipped = results.close(2, list("abcd"), learning_rate=0.5)
    assert figures.keys() == FIGURES
    assert figures["loss"] == 2
    assert figures["grad_norm"] == 3
    assert figures["learning_rate"] == 0.5
    assert figures["loss/t0-249"] == 2
    assert figures["loss/t500-749"] == 1
    assert skipped == 0


def test_a_bad_step_spoils_neither_means_nor_buckets(results: StepResults) -> None:
    results.add(result(1.0, 2.0, [2.0, 0, 1, 0], [2.0, 0, 1, 0]))
    results.add(result(NAN, NAN, [NAN, 0, 3, 0], [2.0, 0, 1, 0]))
    figures, skipped = results.close(2, list("abcd"), learning_rate=0.5)
    assert skipped == figures["skipped_updates"] == 1
    assert (figures["loss"], figures["grad_norm"]) == (1, 2)
    assert figures["loss/t0-249"] == 1
    assert figures["loss/t500-749"] == 2


def test_speed_and_wait_are_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(metrics_log, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    watch = Stopwatch(torch.device("cpu"))
    watch.add(100, waited=0.1)
    now[0] += 0.2  # the steps took this long
    with watch.paused():
        now[0] += 0.3
    figures = watch.close()
    assert figures["images_per_second"] == pytest.approx(500)
    assert figures["data_wait"] == pytest.approx(0.5)
    assert figures["memory_gb"] > 0


def open_log(folder: Path, *, first_step: int) -> MetricsLog:
    board = Trackers("tensorboard", folder, project="", settings={}, first_step=first_step)
    return MetricsLog(folder, is_main=True, first_step=first_step, trackers=board)


def test_both_logs_hold_every_figure_and_a_resumed_run_drops_later_ones(tmp_path: Path) -> None:
    Accelerator(cpu=True)
    log = open_log(tmp_path, first_step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step, "loss/t0-249": 2.0})
    log.close()
    again = open_log(tmp_path, first_step=2)
    again.write(3, {"loss": 9.0})
    again.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 9.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"loss", "loss/t0-249"}
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, is_main=False, first_step=0)
    log.write(1, {"loss": 1.0})
    log.close()
    assert list(tmp_path.iterdir()) == []
