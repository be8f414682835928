"""Which checkpoint a run begins from, whose run a folder holds, and what is moved aside for it."""

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fakes_training import read_metrics
from safetensors.torch import load_file

from latentdiff.config.vae import VaeConfig
from latentdiff.training.checkpoint import Parts, newest_valid, save_checkpoint
from latentdiff.training.loop import train_in_one_process
from latentdiff.training.metrics_log import MeanLosses
from latentdiff.training.recipe import Recipe
from latentdiff.training.resume import run_key

STEPS = 20
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "log_every_steps": 1,
    "checkpoint_every_steps": 5,
    "keep_checkpoints": 10,
    "mixed_precision": "fp32",
    "lr_warmup_steps": 0,
}


class Walk(Recipe):
    """A recipe of one weight, whose steps are a function of (learning rate, step)."""

    def __init__(self, config: VaeConfig, folder: Path, _: Accelerator, *, dies_at: int) -> None:
        super().__init__()
        self.config, self.folder, self.dies_at = config, folder, dies_at
        self.weight, self.losses = torch.zeros(1), MeanLosses()

    def batches(self, first_step: int) -> Iterator[None]:
        return iter(lambda: None, 1)

    def step(self, batches: Iterator[None], step: int) -> int:
        if step == self.dies_at:
            raise InterruptedError
        self.weight = torch.sin(self.weight + self.config.learning_rate + step)
        self.losses.add({"loss": self.weight[0].clone()})
        return 1

    def figures(self, step: int) -> dict[str, float]:
        return self.losses.close(step)

    def tensors(self) -> Parts:
        return {"model": {"weight": self.weight}, **self.losses.tensors()}

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, tensors: Parts, state: object) -> None:
        self.weight = tensors["model"]["weight"]
        self.losses.load(tensors, torch.device("cpu"))

    def export(self) -> None:
        (self.folder / "vae").mkdir(exist_ok=True)
        (self.folder / "vae" / "weight.json").write_text(json.dumps(self.weight.item()))

    def save_samples(self, step: int, *, last: bool) -> dict[str, float]:
        if step and step % 4 == 0:
            path = self.folder / "samples" / f"step-{step:09d}.png"
            path.parent.mkdir(exist_ok=True)
            path.touch()
        return {}


def walk(run: Path, *, dies_at: int = -1, **changes: Any) -> int:
    """Train in `run`; dies_at: the step before which the process ends as by a kill."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = VaeConfig(output_dir=str(run), **SETTINGS | changes)
    if dies_at < 0:
        return train_in_one_process(config, partial(Walk, dies_at=dies_at))
    with pytest.raises(InterruptedError):
        train_in_one_process(config, partial(Walk, dies_at=dies_at))
    return -9


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps that came to its end."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert walk(folder) == 0
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "run")


def steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:09d}"


def files(folder: Path) -> dict[str, bytes]:
    """Return every file but the lock and TensorBoard's, which are of the moment."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not {".lock", "tensorboard"} & set(path.parts)
    }


def spoil(run: Path) -> None:
    for path in (run / "checkpoints").rglob("model.safetensors"):
        path.write_bytes(path.read_bytes()[:9])


def test_a_resume_from_an_older_checkpoint_is_a_branch_of_its_own(run: Path) -> None:
    """Kept though its numbers are lower, pruned by itself, and what `auto` then continues."""
    before, log = files(run / "checkpoints"), (run / "metrics.jsonl").read_text()
    branch = {"resume": str(checkpoint(run, 5)), "checkpoint_every_steps": 3, "keep_checkpoints": 2}
    walk(run, **branch, dies_at=14)
    assert steps(run) == [5, 9, 12]  # 5 is where it began
    assert sorted(read_metrics(run)) == list(range(1, 15))
    old = run / "previous" / "1"
    assert steps(old) == [10, 15, 20]
    assert all(before[name] == content for name, content in files(old / "checkpoints").items())
    assert (old / "metrics.jsonl").read_text() == log
    assert (old / "vae" / "weight.json").is_file()
    assert [path.name for path in sorted((old / "samples").iterdir())] == [
        f"step-{step:09d}.png" for step in (8, 12, 16, 20)
    ]
    walk(run, dies_at=13)  # auto
    assert steps(run)[0] == 5
    assert read_metrics(run).keys() == set(range(1, 14))
    assert walk(run, **branch) == 0  # the same command
    assert steps(run) == [5, 18, 20]
    assert len(list((run / "previous").iterdir())) == 1
    assert files(run / "vae") == files(old / "vae")
    assert walk(old) == 0  # a run folder like any other
    assert (old / "metrics.jsonl").read_text() == log


def test_a_branch_that_is_left_for_another_is_moved_aside_too(run: Path) -> None:
    walk(run, resume=str(checkpoint(run, 5)), dies_at=12)
    moved = checkpoint(run / "previous" / "1", 15)
    walk(run, resume=str(moved), dies_at=17)
    assert steps(run / "previous" / "2") == [10]
    assert steps(run) == [5]
    assert walk(run, resume=str(moved)) == 0
    assert steps(run) == [5, 20]


def test_the_newest_checkpoint_given_by_its_path_is_no_branch(run: Path) -> None:
    before = files(run / "checkpoints")
    assert walk(run, resume=str(checkpoint(run, 20))) == 0
    assert files(run / "checkpoints").keys() == before.keys()
    assert not (run / "previous").exists()


def test_a_branch_in_a_new_folder_leaves_its_run_as_it_was(run: Path, tmp_path: Path) -> None:
    before, other = files(run), tmp_path / "other"
    start = {"resume": str(checkpoint(run, 10))}
    walk(other, **start, dies_at=17)
    assert steps(other) == [15]
    assert walk(other, **start) == 0
    assert read_metrics(other).keys() == set(range(11, 21))
    assert files(run) == before
    assert files(other / "vae") == files(run / "vae")


def without_config(run: Path) -> None:
    (run / "config.yaml").unlink()


def edited_config(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("learning_rate: 0.001", "learning_rate: 0.5"))


@pytest.mark.parametrize("resume", ["auto", 10])
@pytest.mark.parametrize("fault", [lambda run: None, without_config, edited_config])
def test_other_settings_are_refused_from_every_checkpoint(
    run: Path, resume: Any, fault: Callable[[Path], None]
) -> None:
    """Those of its checkpoint are compared, whatever became of the folder's file."""
    fault(run)
    before = files(run)
    start = resume if resume == "auto" else str(checkpoint(run, resume))
    with pytest.raises(ValueError, match=r"with other settings \(learning_rate: 0.001 -> 0.5\)"):
        walk(run, resume=start, learning_rate=0.5)
    assert files(run) == before
    assert walk(run, resume=start) == 0


def test_a_given_checkpoint_does_not_mix_into_another_run(run: Path, tmp_path: Path) -> None:
    assert walk(tmp_path / "other", learning_rate=0.5) == 0
    start = str(checkpoint(tmp_path / "other", 10))
    before = files(run)
    with pytest.raises(ValueError, match=r"run holds a run with other settings"):
        walk(run, resume=start, learning_rate=0.5)
    assert files(run) == before


def as_earlier_versions(run: Path, **config: Any) -> None:
    """Give a run the files of a version without a copy of the settings in its checkpoints."""
    key = {
        name.replace("lr_warmup", "warmup"): v for name, v in run_key(VaeConfig(**config)).items()
    }
    for step in steps(run):
        path = checkpoint(run, step)
        shutil.rmtree(path)
        save_checkpoint(
            run / "checkpoints",
            step=step,
            tensors={"model": {"weight": torch.zeros(1)}},
            state={},
            config_hash=json.dumps(key),
            world_size=1,
        )


def test_runs_of_earlier_versions_are_compared_by_value_and_go_on(run: Path) -> None:
    """Under old names, numbers written otherwise, absent settings, and ones without effect."""
    as_earlier_versions(run)
    stored = yaml.safe_load((run / "config.yaml").read_text())
    stored["warmup_steps"] = stored.pop("lr_warmup_steps")
    del stored["kl_weight"]
    text = yaml.safe_dump(stored | {"discriminator_width": 7})
    (run / "config.yaml").write_text(text.replace("0.001", "1.0e-3"))
    with pytest.raises(ValueError, match=r"settings \(kl_weight: 1e-06 -> 0.5\)"):
        walk(run, kl_weight=0.5)
    assert walk(run) == 0


def test_without_any_copy_of_its_settings_a_run_is_refused(run: Path) -> None:
    as_earlier_versions(run)
    text = (run / "config.yaml").read_text()
    without_config(run)
    with pytest.raises(ValueError, match=r"settings are not known: .*step-000000020 has no copy"):
        walk(run)
    (checkpoint(run, 20) / "config.yaml").write_text(text)
    assert walk(run) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [("nowhere", "does not exist, expected"), (".", r"is a run folder.*step-000000020")],
)
def test_a_path_that_is_no_checkpoint_is_refused(run: Path, given: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        walk(run, resume=str(run / given))


def test_a_damaged_checkpoint_given_by_its_path_is_refused(run: Path) -> None:
    spoil(run)
    with pytest.raises(ValueError, match=r"step-000000010: model.safetensors is truncated"):
        walk(run, resume=str(checkpoint(run, 10)))


def test_a_run_without_a_usable_checkpoint_starts_over_only_when_told(run: Path) -> None:
    spoil(run)
    before = files(run)
    with pytest.raises(
        ValueError, match=r"none can be used .*truncated.*--resume=never.*previous/1"
    ):
        walk(run)
    assert files(run) == before
    assert walk(run, resume="never") == 0
    assert files(run / "previous" / "1") == before
    assert sorted(read_metrics(run)) == list(range(1, STEPS + 1))
    assert steps(run) == [5, 10, 15, 20]


def test_a_result_without_checkpoints_is_not_overwritten(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    before = files(run)
    with pytest.raises(ValueError, match=r"result of a run \(vae\) without any checkpoint"):
        walk(run)
    assert files(run) == before
    assert walk(run, resume="never") == 0
    assert files(run / "previous" / "1") == before


def test_a_valid_backup_replaces_checkpoints_that_cannot_be_used(run: Path, tmp_path: Path) -> None:
    backup = shutil.copytree(checkpoint(run, 10), tmp_path / "step-000000010")
    spoil(run)
    assert walk(run, resume=str(backup)) == 0
    assert steps(run / "previous" / "1") == [15, 20]
    assert sorted(read_metrics(run)) == list(range(1, STEPS + 1))
    assert newest_valid(run / "checkpoints")[0] == checkpoint(run, 20)


def test_what_a_run_left_before_its_first_checkpoint_is_not_mixed_with_other_settings(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    walk(run, dies_at=4, learning_rate=0.5)
    walk(run, dies_at=4, learning_rate=0.5)  # the same run begins again
    assert not (run / "previous").exists()
    left = files(run)
    assert walk(run) == 0
    assert files(run / "previous" / "1") == left


def test_max_steps_before_the_checkpoint_is_refused(run: Path) -> None:
    before = files(run)
    for start in ("auto", str(checkpoint(run, 15))):
        with pytest.raises(ValueError, match=r"max_steps"):
            walk(run, resume=start, max_steps=12)
    assert files(run) == before


def test_a_limit_in_minutes_is_that_of_the_run_without_its_config_file(run: Path) -> None:
    without_config(run)
    assert walk(run, max_minutes=10, max_steps=1000) == 0
    assert steps(run) == [5, 10, 15, 20]


def test_a_warmup_longer_than_the_run_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert walk(tmp_path / "a", lr_warmup_steps=STEPS) == 0
    assert "never reaches its peak" not in caplog.text
    assert walk(tmp_path / "b", lr_warmup_steps=STEPS + 1) == 0
    assert "never reaches its peak: lr_warmup_steps=21 is above max_steps=20" in caplog.text


@pytest.mark.parametrize("dies_at", [6, 11, 14, 19])
def test_lines_of_the_log_do_not_depend_on_where_a_kill_cut_them(
    tmp_path: Path, dies_at: int
) -> None:
    settings = {"log_every_steps": 4, "checkpoint_every_steps": 3}
    assert walk(tmp_path / "whole", **settings) == 0
    walk(tmp_path / "run", **settings, dies_at=dies_at)
    assert walk(tmp_path / "run", **settings) == 0
    assert list(read_metrics(tmp_path / "whole")) == [4, 8, 12, 16, 20]
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_losses_that_went_wrong_between_two_lines_are_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "sin", lambda x: x * (float("nan") if x > 100 else 1.0))
    with pytest.raises(FloatingPointError, match="lower --learning_rate"):
        walk(tmp_path / "run", log_every_steps=20, checkpoint_every_steps=1)
    saved = [load_file(path) for path in (tmp_path / "run").rglob("model.safetensors")]
    assert saved
    assert all(torch.isfinite(tensors["weight"]).all() for tensors in saved)
