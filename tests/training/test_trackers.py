"""Trackers: what a run reports to them, how a resumed run goes on there, what is refused."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes_trackers import FakeTracker, use_fake_wandb
from fakes_training import arguments, make_config, make_world, read_metrics
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latentdiff.cli.main import main
from latentdiff.training import trackers
from latentdiff.training.text_to_image.train_t2i import train
from latentdiff.training.trackers import Trackers, check_trackers

SMALL = {"train__max_steps": 2, "preview__num_nearest": 0}


def open_trackers(report_to: Any, folder: Path, *, first_step: int = 0) -> Trackers:
    return Trackers(
        report_to,
        folder,
        project="mine",
        settings={"train.seed": 3, "preview.prompts": ("a", "b")},
        first_step=first_step,
    )


def test_a_run_reports_figures_sheets_and_settings_and_a_resumed_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = use_fake_wandb(monkeypatch)
    world, run = make_world(tmp_path), tmp_path / "run"
    settings = SMALL | {"train__report_to": "wandb", "train__tracker_project_name": "mine"}
    assert train(make_config(world, run, **settings)) == 0
    assert train(make_config(world, run, **settings | {"train__max_steps": 3})) == 0
    first, second = made
    assert first.project == "mine"
    assert first.options["config"]["train.max_steps"] == 2
    assert first.options["name"] == "run"
    assert first.options["id"] == second.options["id"]
    assert second.options["resume"] == "allow"
    assert [step for kind, _, step in first.calls if kind == "image"] == [0, 2]
    assert [step for kind, _, step in second.calls if kind == "image"] == [3]
    logged = {
        step: values for kind, values, step in first.calls if kind == "log" and "loss" in values
    }
    assert logged.keys() == {1, 2}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged[2]["loss"] == next(row["loss"] for row in lines if row["step"] == 2)
    assert first.calls[-1] == ("finish", None, None)
    assert not (run / "tensorboard").exists()


def test_a_tracker_that_fails_is_left_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = use_fake_wandb(monkeypatch)
    monkeypatch.setattr(FakeTracker, "fails", True)
    world, run = make_world(tmp_path), tmp_path / "run"
    assert train(make_config(world, run, **SMALL, train__report_to="[wandb, tensorboard]")) == 0
    assert [kind for kind, _, _ in made[0].calls] == ["start", "image"]  # before the first step
    assert caplog.text.count("no more of this run in wandb: no network") == 1
    assert read_metrics(run).keys() == {1, 2}
    assert "loss" in EventAccumulator(str(run / "tensorboard")).Reload().Tags()["scalars"]


def test_tensorboard_has_the_settings_as_text_and_sheets_as_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "sheet.png")
    opened = open_trackers("tensorboard", tmp_path)
    opened.log_sheet(5, tmp_path / "sheet.png")
    opened.finish()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert b"train.seed: 3" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    shown = board.Images("samples")[0]
    assert (shown.step, shown.width, shown.height) == (5, 6, 4)


@pytest.mark.parametrize("report_to", ["none", [], ()])
def test_none_opens_no_tracker_and_writes_nothing(tmp_path: Path, report_to: Any) -> None:
    open_trackers(report_to, tmp_path).finish()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_one_message_before_heavy_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    given = ["--config", str(make_world(tmp_path) / "config.json")]
    given += arguments(tmp_path, tmp_path / "run", train__report_to="trackio")
    assert main(["train", *given]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "pip install trackio (or latentdiff[trackers])" in message
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_key_is_refused_before_heavy_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def login() -> None:
        raise RuntimeError("No API key configured")

    online = SimpleNamespace(settings=SimpleNamespace(mode="online"))
    wandb = SimpleNamespace(setup=lambda: online, login=login)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match=r"report_to=wandb: No API key.*WANDB_MODE=offline"):
        check_trackers(["wandb"], is_main=True)
    check_trackers(["wandb"], is_main=False)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_real_tracker_keeps_a_run_offline_and_continues_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name, reason="needs the extra trackers")
    if not os.environ.get("LATENTDIFF_REAL_TRACKERS"):
        pytest.skip(f"a run in the real {name} takes seconds (set LATENTDIFF_REAL_TRACKERS=1)")
    code = (
        "import sys; from pathlib import Path; from test_trackers import *\n"
        "from accelerate import PartialState\n"
        "PartialState()\nfolder = Path(sys.argv[2])\n"
        "Image.new('RGB', (8, 8)).save(folder / 'sheet.png')\n"
        "for step in (1, 2):\n"
        "    opened = open_trackers(sys.argv[1], folder)\n"
        "    opened.log(step, {'loss': 1 / step})\n"
        "    opened.log_sheet(step, folder / 'sheet.png')\n"
        "    assert opened._open\n"
        "    opened.finish()\n"
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("PYTHONPATH", ":".join([*sys.path, str(Path(__file__).parent)]))
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if name == "wandb":
        runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
        assert len({run.name.rpartition("-")[2] for run in runs}) == 1
        assert any(run.rglob("*.png") for run in runs)
    else:
        tables = sqlite3.connect(next((tmp_path / "trackio").glob("*.db")))
        rows = tables.execute("select distinct run_name from metrics").fetchall()
        assert len(rows) == 1
        assert any((tmp_path / "trackio").rglob("*.png"))
