"""Runs of the VAE and CLIP recipes: exact resume, signals, kills, and a limit in minutes."""

import itertools
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from fakes_faults import SCRIPT, Child, assert_same_state, fork, run_command
from fakes_training import make_world, read_metrics
from kill_runs import kill_runs
from safetensors.torch import load_file
from torch import Tensor

from latentdiff.config.clip import ClipConfig
from latentdiff.config.io import load_config
from latentdiff.config.vae import VaeConfig
from latentdiff.models.build import build_vae
from latentdiff.training import loop
from latentdiff.training.clip.train_clip import train_clip
from latentdiff.training.optim.lr import learning_rate
from latentdiff.training.optim.mixed_precision import AmpStep
from latentdiff.training.vae.train_vae import train_vae

STEPS = 8
SHARED = {
    "resolution": 16,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "lr_warmup_steps": 3,
    "mixed_precision": "fp32",
    "num_workers": 0,
    "log_every_steps": 1,
    "checkpoint_every_steps": 1,
    "keep_checkpoints": 100,
    "max_steps": STEPS,
}
VAE = {  # with all that is random in a step, and the discriminator from its start on
    "resolution": 32,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "latent_noise": 0.2,
    "equivariance_prob": 0.5,
    "discriminator_weight": 0.1,
    "discriminator_start": 3,
    "discriminator_width": 8,
}
CLIP = {
    "patch_size": 8,
    "width": 32,
    "num_layers": 1,
    "text_width": 32,
    "text_num_layers": 1,
    "head_dim": 16,
    "embed_dim": 16,
    "vocab_size": 600,
    "max_tokens": 12,
}
RECIPES: dict[str, tuple[Any, Any, dict[str, object]]] = {
    "vae": (VaeConfig, train_vae, SHARED | VAE),
    "clip": (ClipConfig, train_clip, SHARED | CLIP),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=sorted(RECIPES))
def recipe(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def options(recipe: str, world: Path, run: Path, **changes: object) -> list[str]:
    settings = RECIPES[recipe][2] | {"roots": [str(world / "data")], "output_dir": str(run)}
    return [
        f"--{name}={json.dumps(value).strip(chr(34))}"
        for name, value in (settings | changes).items()
    ]


def run_recipe(recipe: str, world: Path, run: Path, **changes: object) -> int:
    """Train in this process; return the exit status."""
    AcceleratorState._reset_state(reset_partial_state=True)
    kind, train, _ = RECIPES[recipe]
    (world / "empty.yaml").write_text("{}")
    status = train(
        load_config(world / "empty.yaml", options(recipe, world, run, **changes), kind=kind)
    )
    return int(status)


def start(
    recipe: str, world: Path, run: Path, plant: Callable[[], None] | None = None, **changes: object
) -> Child:
    """Start a trainer in a fork; plant: a fault, done before it trains."""

    def task() -> None:
        if plant is not None:
            plant()
        script = SCRIPT.with_name(f"train_{recipe}.py")
        run_command(script, options(recipe, world, run, **changes))

    return fork(task, run.with_name(f"{run.name}.log"))


@pytest.fixture(scope="module")
def wholes(world: Path) -> dict[str, Path]:
    """Runs that nothing stopped, by recipe."""
    for recipe in RECIPES:
        assert run_recipe(recipe, world, world / recipe) == 0
    return {recipe: world / recipe for recipe in RECIPES}


def exported(run: Path) -> dict[str, bytes]:
    """Return every exported file, but for the figures."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for part in ("vae", "clip", "text_encoder", "tokenizer")
        for path in sorted((run / part).rglob("*"))
        if path.is_file()
    }


def assert_same_run(run: Path, whole: Path) -> None:
    assert_same_state(run, whole, step=STEPS)
    assert exported(run) == exported(whole) != {}
    assert (run / "metrics.json").read_text() == (whole / "metrics.json").read_text()


def slowly() -> None:
    """Make steps long enough to be met by a signal."""
    fast = AmpStep.step

    def slow(self: AmpStep, *args: Any, **others: Any) -> None:
        time.sleep(0.5)
        fast(self, *args, **others)

    AmpStep.step = slow  # type: ignore[method-assign]


def divergently() -> None:
    """Make steps so large that the weights overflow."""
    step = AmpStep.step

    def diverge(self: AmpStep, loss: Tensor, *, learning_rate: float) -> None:
        step(self, loss, learning_rate=1e30)

    AmpStep.step = diverge  # type: ignore[method-assign]


def test_signal_saves_and_the_resumed_run_is_the_whole_one(
    world: Path, wholes: dict[str, Path], tmp_path: Path, recipe: str
) -> None:
    """Sent to all processes, whose data workers it spares; each recipe gets one of the two."""
    number = {"vae": signal.SIGTERM, "clip": signal.SIGINT}[recipe]
    run, rare = tmp_path / "run", {"checkpoint_every_steps": 1000, "num_workers": 2}
    child = start(recipe, world, run, plant=slowly, **rare)
    child.when(lambda: (run / "metrics.jsonl").exists() and read_metrics(run))
    os.killpg(child.pid, number)
    assert child.wait() == 128 + number, child.output()
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    assert 0 < int(checkpoint.name.removeprefix("step-")) < STEPS
    assert not exported(run)
    assert run_recipe(recipe, world, run) == 0
    assert_same_run(run, wholes[recipe])


def test_pieces_are_the_whole_bit_for_bit(
    world: Path, wholes: dict[str, Path], tmp_path: Path, recipe: str
) -> None:
    """Resumed within each epoch, at its end, and before and after the discriminator's start."""
    for step in (1, 3, 4, 6):
        start_from = wholes[recipe] / "checkpoints" / f"step-{step:09d}"
        run = tmp_path / f"run{step}"
        assert run_recipe(recipe, world, run, resume=str(start_from)) == 0
        ours, theirs = read_metrics(run), read_metrics(wholes[recipe])
        assert ours == {at: loss for at, loss in theirs.items() if at > step}
        assert exported(run) == exported(wholes[recipe])


def test_log_lines_do_not_depend_on_where_a_run_was_cut(
    world: Path, tmp_path: Path, recipe: str
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_recipe(recipe, world, whole, log_every_steps=3) == 0
    start_from = str(whole / "checkpoints" / "step-000000004")
    assert run_recipe(recipe, world, run, log_every_steps=3, resume=start_from) == 0
    assert read_metrics(whole).keys() == {3, 6, 8}
    assert read_metrics(run) == {at: loss for at, loss in read_metrics(whole).items() if at > 4}


def test_a_run_without_a_usable_checkpoint_is_refused(
    world: Path, wholes: dict[str, Path], tmp_path: Path, recipe: str
) -> None:
    run = shutil.copytree(wholes[recipe], tmp_path / "run")
    for path in run.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    log = (run / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="none can be used"):
        run_recipe(recipe, world, run)
    assert (run / "metrics.jsonl").read_text() == log
    assert run_recipe(recipe, world, run, resume="never") == 0
    assert (run / "previous" / "1" / "metrics.jsonl").read_text() == log
    assert exported(run / "previous" / "1") == exported(run)
    others = {"previous", ".lock", "config.json", "diffusion_pytorch_model.safetensors"}
    assert {path.name for path in run.iterdir()} - others == {
        path.name for path in (run / "previous" / "1").iterdir()
    }  # everything that the recipe writes was moved


def test_killed_runs_lose_nothing(world: Path, tmp_path: Path, recipe: str) -> None:
    starter = partial(start, recipe, world, max_steps=20, keep_checkpoints=2)
    figures = kill_runs(starter, 3, tmp_path, num_steps=20)
    assert figures["kills"] == 3
    assert figures["runs"] >= 1


def test_a_folder_of_another_run_is_refused(
    world: Path, wholes: dict[str, Path], recipe: str
) -> None:
    run = wholes[recipe]
    with pytest.raises(ValueError, match=r"other settings \(learning_rate: 0.002 -> 0.5\)"):
        run_recipe(recipe, world, run, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"other settings \(max_steps: 8 -> 9\)"):
        run_recipe(recipe, world, run, max_steps=9)
    with pytest.raises(ValueError, match="--resume=auto continues it"):
        run_recipe(recipe, world, run, resume="never")
    with pytest.raises(FileNotFoundError, match="resume=nowhere does not exist"):
        run_recipe(recipe, world, run, resume="nowhere")


def test_a_run_that_is_done_exports_again_and_adds_nothing(
    world: Path, wholes: dict[str, Path], recipe: str
) -> None:
    run = wholes[recipe]
    before, log = exported(run), (run / "metrics.jsonl").read_text()
    assert run_recipe(recipe, world, run) == 0
    assert exported(run) == before
    assert (run / "metrics.jsonl").read_text() == log


def test_numbers_that_go_wrong_exit_1(world: Path, tmp_path: Path, recipe: str) -> None:
    child = start(recipe, world, tmp_path / "run", plant=divergently)
    assert child.wait() == 1, child.output()
    assert "lower --learning_rate" in child.output()
    assert not exported(tmp_path / "run")


def test_a_limit_in_minutes_becomes_steps_once(
    world: Path,
    wholes: dict[str, Path],
    tmp_path: Path,
    recipe: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run is that of so many steps, whatever the clock shows when it is stopped and resumed."""
    run, limit = tmp_path / "run", {"max_minutes": 10, "max_steps": 1000}
    counts = itertools.chain([STEPS], itertools.repeat(77))
    time_steps = loop.steps_within

    def count(minutes: float, recipe: loop.Recipe, *, max_steps: int) -> int:
        assert time_steps(minutes, recipe, max_steps=max_steps) == max_steps  # spoils the recipe
        assert (minutes, max_steps) == (10, 1000)
        return next(counts)

    monkeypatch.setattr(loop, "steps_within", count)
    step = AmpStep.step

    def stopping(self: AmpStep, *args: Any, **others: Any) -> None:
        step(self, *args, **others)
        if (run / "checkpoints" / "step-000000002").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(AmpStep, "step", stopping)
        assert run_recipe(recipe, world, run, **limit) == 143
    text = (run / "config.yaml").read_text()
    assert f"max_steps: {STEPS}\n" in text
    assert "max_minutes: 0.0\n" in text
    assert run_recipe(recipe, world, run, **limit) == 0
    assert_same_run(run, wholes[recipe])


class Sleeping(loop.Recipe):
    """A recipe whose last step takes 20 ms, by a clock of its own."""

    now = 0.0

    def batches(self, first_step: int) -> Iterator[None]:
        return iter([])

    def step(self, batches: Iterator[None], step: int) -> int:
        assert step == 999  # the timed steps are those with every loss on
        self.now += 0.02
        return 1

    def figures(self, step: int) -> dict[str, float]:
        return {"loss": 0.0}

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, tensors: object, state: object) -> None: ...

    def export(self) -> None: ...


def test_steps_within_some_time_take_that_time_together_with_their_timing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = Sleeping()
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: recipe.now))
    timed = loop.NUM_UNTIMED + loop.NUM_TIMED
    num_steps = loop.steps_within(2.31 / 60, recipe, max_steps=1000)
    assert num_steps == int(2.31 / 0.02) - timed
    assert loop.steps_within(1000, recipe, max_steps=1000) == 1000
    assert loop.steps_within(1e-9, recipe, max_steps=1000) == 1


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_learning_rate_is_the_cosine_over_the_run_times_the_warmup(warmup: int) -> None:
    """As both recipes had it, by the clock or by steps, whichever came first."""
    for step in range(20):
        warm = min(1.0, (step + 1) / max(1, warmup))
        assert (
            learning_rate(
                step,
                base=3e-3,
                schedule="cosine",
                lr_warmup_steps=warmup,
                max_steps=20,
                decay_from=0,
            )
            == 3e-3 * warm * (1 + math.cos(math.pi * (step / 20))) / 2
        )


def test_the_vae_exported_is_the_warmed_up_average(wholes: dict[str, Path]) -> None:
    """Against its definition, over the weights that the checkpoints hold."""
    run = wholes["vae"]
    torch.manual_seed(0)
    average = build_vae(
        block_out_channels=(8, 16),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
    ).state_dict()
    for step in range(1, STEPS + 1):
        checkpoint = run / "checkpoints" / f"step-{step:09d}"
        weights = load_file(checkpoint / "model.safetensors")
        share = max(1 - 0.999, 9 / (9 + step))
        average = {name: torch.lerp(average[name], weights[name], share) for name in weights}
    found = load_file(run / "vae" / "diffusion_pytorch_model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, average[name])
