"""Runs that end by their verdict, in every recipe that measures one; what they keep and export."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes_faults import assert_same_state, start_ranks
from fakes_training import make_config, make_world, read_metrics

from latentdiff.pipeline.files.model_info import read_model_info
from latentdiff.training.report.report import run_report_html
from latentdiff.training.report.run_record import read_run
from latentdiff.training.report.verdicts import verdict_facts
from latentdiff.training.stopping import heldout
from latentdiff.training.stopping.heldout import image_losses
from latentdiff.training.stopping.verdicts import RunVerdicts
from latentdiff.training.text_to_image.train_t2i import train

AUTO = {
    "train__stop": "auto",
    "train__max_steps": 12,
    "train__lr_warmup_steps": 0,
    "train__log_every_steps": 4,
    "train__checkpoint_every_steps": 2,
    "train__keep_checkpoints": 1,
    "eval__every_steps": 1,
    "model__unet__dropout": 0.0,
    "preview__num_nearest": 0,
    "preview__num_steps": 1,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@contextmanager
def rising_costs() -> Iterator[None]:
    """Let costs fall for three evaluations and rise from then on, whatever was measured."""
    add = RunVerdicts.add

    def fake(self: RunVerdicts, step: int, costs: Any, *, drift: Any = ()) -> None:
        level = abs(step - 3) + 1.0
        add(self, step, [level, 1.01 * level, 0.99 * level], drift=drift)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunVerdicts, "add", fake)
        yield


@pytest.fixture
def worse_after_three() -> Iterator[None]:
    with rising_costs():
        yield


@pytest.fixture(scope="module")
def ended(world: Path) -> Path:
    """A run of at most twelve steps that its verdicts ended."""
    with rising_costs():
        assert train(make_config(world, world / "ended", **AUTO)) == 0
    return world / "ended"


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def checkpoint_steps(run: Path) -> list[int]:
    return sorted(int(path.name[-9:]) for path in (run / "checkpoints").glob("step-*"))


def test_a_run_that_overfits_ends_there_and_exports_its_best(ended: Path) -> None:
    verdicts = [row["verdict"] for row in rows(ended) if "verdict" in row]
    assert verdicts == ["gaining", "gaining", "gaining", "overfitting", "overfitting"]
    assert checkpoint_steps(ended) == [3, 5]  # the best, and that it ended with
    assert read_model_info(ended / "pipeline").steps == 3
    assert (ended / "samples" / "step-000000005.png").is_file()
    record = read_run(ended, "run")
    assert record.status == "finished by its verdict after step 5 of 12"
    assert verdict_facts(record) == {
        "verdict": "overfitting, after step 5",
        "stop here": "step 3, known at 5",
        "regret of it": "0.0000 [+0.0000, +0.0000], nothing measured after it",
    }
    html = run_report_html([record])
    assert "After step 5 the verdicts said stop, and step 3 was the best" in html


def test_a_run_that_is_stopped_and_resumed_ends_where_the_whole_one_does(
    world: Path, tmp_path: Path, ended: Path, worse_after_three: None
) -> None:
    cut = tmp_path / "cut"
    assert train(make_config(world, cut, **{**AUTO, "train__max_steps": 4})) == 0
    assert train(make_config(world, cut, **AUTO)) == 0
    assert_same_state(ended, cut, step=5)
    for name in ("verdict", "change", "change_low", "best_step", "stop_step"):
        assert read_metrics(cut, name) == read_metrics(ended, name)
    assert [row["step"] for row in rows(cut) if "verdict" in row] == [1, 2, 3, 4, 5]


def test_a_run_that_ended_by_its_verdict_stays_so_until_told_to_go_on(
    world: Path, tmp_path: Path, ended: Path, worse_after_three: None
) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    assert train(make_config(world, run, **AUTO)) == 0
    assert checkpoint_steps(run)[-1] == 5
    assert read_model_info(run / "pipeline").steps == 3
    settings = {**AUTO, "train__stop": "never", "train__max_steps": 7}
    assert train(make_config(world, run, **settings)) == 0
    assert checkpoint_steps(run)[-1] == 7
    last = [row for row in rows(run) if "verdict" in row][-1]
    assert last["stop_step"] == 5
    assert last["regret"] == pytest.approx(0)  # nothing later was better than step 3


def test_verdicts_are_logged_where_nothing_stops(
    world: Path, tmp_path: Path, worse_after_three: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    settings = {**AUTO, "train__stop": "never", "train__max_steps": 6}
    assert train(make_config(world, tmp_path / "run", **settings)) == 0
    assert caplog.text.count("training could stop here") == 1
    assert "overfitting, held-out loss +1.0000 [" in caplog.text
    assert read_model_info(tmp_path / "run" / "pipeline").steps == 6


def differ_by_rank() -> None:
    """Let the main process measure costs that rise after two steps, another ones that only fall."""
    num = iter(range(99))

    def fake(losses: torch.Tensor, images: torch.Tensor) -> list[float]:
        k = next(num)
        level = -k if os.environ["RANK"] != "0" else abs(k - 2) + 1.0
        return [level, 1.01 * level, 0.99 * level]

    heldout.image_losses = fake  # type: ignore[assignment]


def test_processes_end_at_one_step_though_they_measure_differently(
    world: Path, tmp_path: Path
) -> None:
    child = start_ranks(world, tmp_path / "run", plant=differ_by_rank, **AUTO)
    assert child.wait() == 0, child.output()
    assert checkpoint_steps(tmp_path / "run") == [2, 4]
    assert read_model_info(tmp_path / "run" / "pipeline").steps == 2


def test_settings_that_leave_nothing_to_measure_are_refused(world: Path, tmp_path: Path) -> None:
    def refusal(**changes: Any) -> str:
        with pytest.raises(ValueError, match=r".") as caught:
            train(make_config(world, tmp_path / "run", **{**AUTO, **changes}))
        return str(caught.value)

    assert "set eval.every_steps=1, for 12" in refusal(eval__every_steps=0)
    assert "set eval.every_steps=1, for 12" in refusal(eval__every_steps=8)
    assert "set preview.features" in refusal(eval__num_samples=8)
    assert "at least 4 samples" in refusal(eval__num_samples=2, preview__features=world)
    assert "eval.num_samples, which is 0" in refusal(eval__unrelated_prompts=["a cat", "a dog"])


def test_the_end_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    verdicts = RunVerdicts("held-out loss", ends_run=True)
    for step, level in enumerate((1.0, 0.5, 0.7, 0.8, 0.9)):
        verdicts.add(step, [level, 1.01 * level, 0.99 * level])
        verdicts.log_stop(12)
    verdicts.add(5, [float("nan")] * 3)  # left out
    assert verdicts.rule.last_step == 4
    text = "training stops after step 3 of 12: 2 evaluations in a row overfit; the best, step 1"
    assert caplog.text.count(text) == caplog.text.count("training stops") == 1


def test_each_held_out_image_is_one_unit() -> None:
    losses, images = torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([4, 7, 4, 7])
    assert image_losses(losses, images) == [2.0, 3.5]
    assert image_losses(losses, torch.tensor([4, 4, 4, 4])) == [1.0, 2.0, 3.0, 5.0]
