"""Runs as a whole: equal losses by accumulation and in two processes, bad numbers, the export.

Other layouts and runs in pieces are in test_many_processes.py, damaged files in test_faults.py.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes_faults import start, start_ranks
from fakes_training import make_config, make_world, read_metrics
from safetensors.torch import load_file

from latentdiff import LatentDiffPipeline, load_config
from latentdiff.training import distributed
from latentdiff.training.inputs.dataset import LatentDataset
from latentdiff.training.text_to_image.train_step import TrainStep
from latentdiff.training.text_to_image.train_t2i import train

ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A run of eight steps that nothing stopped."""
    assert train(make_config(world, world / "whole")) == 0
    return world / "whole"


def final_tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:09d}"
    parts = ("model", "ema", "optimizer")
    return {f"{p}/{k}": v for p in parts for k, v in load_file(folder / f"{p}.safetensors").items()}


def assert_same_run(run: Path, other: Path, *, step: int) -> None:
    assert read_metrics(run) == read_metrics(other)
    ours, theirs = final_tensors(run, step), final_tensors(other, step)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    sheet = f"samples/step-{step:09d}.png"
    assert (run / sheet).read_bytes() == (other / sheet).read_bytes()


def test_run_folder_holds_what_the_readme_promises(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "samples",
        "pipeline",
        "tensorboard",
    }
    assert list(read_metrics(whole)) == list(range(1, 9))
    heldout = read_metrics(whole, "heldout_loss")
    assert heldout.keys() == {8}
    assert heldout[8] > 0


def test_resolved_config_alone_reproduces_the_run(whole: Path, tmp_path: Path) -> None:
    config = load_config(whole / "config.yaml", [f"--output_dir={tmp_path / 'again'}"])
    assert train(config) == 0
    assert_same_run(tmp_path / "again", whole, step=8)


def test_losses_do_not_depend_on_how_a_batch_is_accumulated(world: Path, tmp_path: Path) -> None:
    """Also where the last part is smaller; every other layout is in test_many_processes.py."""
    layout = {"train__micro_batch_size": 3}
    settings = {"model__unet__dropout": 0.0}
    assert train(make_config(world, tmp_path / "a", **settings)) == 0
    assert train(make_config(world, tmp_path / "b", **settings, **layout)) == 0
    ours, theirs = read_metrics(tmp_path / "b"), read_metrics(tmp_path / "a")
    assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-5, abs=1e-6)


def test_two_processes_train_to_the_losses_of_one_in_bf16(world: Path, tmp_path: Path) -> None:
    """In fp32 see test_many_processes.py; by torchrun, as users start it, test_processes.py."""
    settings = {"model__unet__dropout": 0.0, "train__mixed_precision": "bf16"}
    assert train(make_config(world, tmp_path / "one", **settings)) == 0
    child = start_ranks(world, tmp_path / "two", **settings)
    assert child.wait() == 0, child.output()
    assert "(2 processes x 2 x 1 accumulated)" in child.output()
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-2)


def test_sigterm_saves_and_the_resumed_run_is_the_whole_one(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    child = start(world, run, train__max_steps=4000)
    child.when(lambda: (run / "metrics.jsonl").exists() and read_metrics(run))
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 143
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert 0 < stopped < 4000
    assert train(make_config(world, run, train__max_steps=stopped + 3)) == 0
    assert train(make_config(world, tmp_path / "b", train__max_steps=stopped + 3)) == 0
    assert_same_run(run, tmp_path / "b", step=stopped + 3)


def planted(monkeypatch: pytest.MonkeyPatch, *, bad: set[int]) -> None:
    """Make the latents of some samples NaN."""
    clean = LatentDataset.__getitem__

    def dirty(self: LatentDataset, key: Any) -> dict[str, torch.Tensor]:
        sample = clean(self, key)
        return sample | {"z0": sample["z0"] * float("nan")} if key.index in bad else sample

    monkeypatch.setattr(LatentDataset, "__getitem__", dirty)


def test_a_bad_batch_is_skipped_and_counted(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, bad={3})
    assert train(make_config(world, tmp_path / "run", train__max_steps=6)) == 0
    skipped = read_metrics(tmp_path / "run", "skipped_updates")
    assert sum(skipped.values()) == 2  # once in each of the two epochs
    assert all(torch.isfinite(x).all() for x in final_tensors(tmp_path / "run", 6).values())


def test_too_many_bad_batches_stop_with_step_and_files(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, bad=set(range(10)))
    config = make_config(world, tmp_path / "run", train__max_skipped_steps=3)
    with pytest.raises(FloatingPointError, match=r"3 updates in a row, last at step 3 .*\.png"):
        train(config)
    assert not (tmp_path / "run" / "pipeline").exists()


def test_a_folder_of_another_run_is_refused(world: Path, whole: Path) -> None:
    with pytest.raises(ValueError, match=r"train.learning_rate: 0.001 -> 0.5"):
        train(make_config(world, whole, train__learning_rate=0.5))
    with pytest.raises(ValueError, match=r"--train\.resume=auto continues it"):
        train(make_config(world, whole, train__resume="never"))


def test_a_checkpoint_of_another_run_is_refused_by_its_path(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    settings = {
        "train__resume": whole / "checkpoints" / "step-000000008",
        "train__max_steps": 9,
        "diffusion__prediction_type": "v_prediction",
    }
    with pytest.raises(ValueError, match=r"diffusion.prediction_type: '' -> 'v_prediction'"):
        train(make_config(world, tmp_path / "run", **settings))


def test_max_steps_before_the_checkpoint_is_refused_and_changes_nothing(
    world: Path, whole: Path
) -> None:
    before = (whole / "config.yaml").read_text(), (whole / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"train.max_steps=5 is less than the 8 steps of .*-0*8"):
        train(make_config(world, whole, train__max_steps=5))
    assert before == ((whole / "config.yaml").read_text(), (whole / "metrics.jsonl").read_text())


def test_a_run_stopped_between_two_log_lines_is_logged_and_trained_as_the_whole_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a skipped update is in the cut window, which holds the learning rate back."""
    planted(monkeypatch, bad={3})
    settings = {"train__log_every_steps": 4, "train__max_steps": 12, "train__lr_warmup_steps": 9}
    assert train(make_config(world, tmp_path / "whole", **settings)) == 0
    step, run = TrainStep.step, tmp_path / "run"

    def stopping(self: TrainStep, *args: Any, **others: Any) -> Any:
        if others["step"] in (1, 5):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **others)

    monkeypatch.setattr(TrainStep, "step", stopping)
    for _ in range(2):
        assert train(make_config(world, run, **settings)) == 143
    assert train(make_config(world, run, **settings)) == 0
    for name in ("loss", "grad_norm", "skipped_updates", "learning_rate", "loss/t0-249"):
        assert read_metrics(run, name) == read_metrics(tmp_path / "whole", name)
    assert sum(read_metrics(run, "skipped_updates").values()) >= 3
    assert_same_run(run, tmp_path / "whole", step=12)


def test_all_that_a_run_writes_is_moved_aside_where_it_starts_anew(
    world: Path, whole: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    (run / "checkpoints" / "step-000000008" / "ema.safetensors").unlink()
    (run / "notes.txt").write_text("a user's own")
    assert train(make_config(world, run, train__max_steps=2, train__resume="never")) == 0
    moved, own = run / "previous" / "1", {".lock", "previous", "notes.txt"}
    assert {path.name for path in moved.iterdir()} == {path.name for path in whole.iterdir()} - own
    assert (run / "notes.txt").is_file()
    assert list(read_metrics(run)) == [1, 2]


def test_adding_a_prompt_keeps_the_other_images(world: Path, tmp_path: Path) -> None:
    from PIL import Image

    sheets = []
    for prompts in (["a red star"], ["a red star", "a blue ring"]):
        run = tmp_path / f"run{len(prompts)}"
        config = make_config(world, run, train__max_steps=2)
        preview = dataclasses.replace(config.preview, prompts=tuple(prompts))
        assert train(dataclasses.replace(config, preview=preview)) == 0
        sheets.append(Image.open(run / "samples" / "step-000000002.png"))
    box = (8, 8, 8 + 128, 8 + 128)
    assert sheets[0].crop(box).tobytes() == sheets[1].crop(box).tobytes()


def test_fine_tuning_starts_from_the_model_and_keeps_its_parts(
    world: Path, sd_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = make_config(world, run, model__vae="", model__pretrained=sd_folder, train__max_steps=2)
    assert train(config) == 0
    before = load_file(sd_folder / "unet" / "diffusion_pytorch_model.safetensors")
    after = load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == after.keys()
    moved = max((before[k] - after[k]).abs().max().item() for k in before)
    assert 0 < moved < 0.1
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        kept = load_file(run / "pipeline" / f"{part}.safetensors")
        assert all(
            torch.equal(value, kept[name])
            for name, value in load_file(sd_folder / f"{part}.safetensors").items()
        )


STOCK = """
import sys, torch
sys.modules["latentdiff"] = None  # importing it is an error
import diffusers
for name in ("StableDiffusionPipeline", "DiffusionPipeline"):
    pipe = getattr(diffusers, name).from_pretrained(sys.argv[1])
    latents = torch.load(sys.argv[2], weights_only=True)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red star", latents=latents, num_inference_steps=4, guidance_scale=3.0,
                 output_type="pt").images
    torch.save(image, sys.argv[3] + name)
    print(type(pipe).__name__)
"""


def test_stock_diffusers_opens_the_export_and_draws_the_same(whole: Path, tmp_path: Path) -> None:
    pipeline = LatentDiffPipeline.from_pretrained(whole / "pipeline")
    latents = torch.randn(1, 4, 8, 8)
    torch.save(latents, tmp_path / "latents")
    files = [str(whole / "pipeline"), str(tmp_path / "latents"), f"{tmp_path}/image of "]
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *files],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["StableDiffusionPipeline"] * 2
    ours = pipeline(
        "a red star",
        latents=latents,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    for name in ("StableDiffusionPipeline", "DiffusionPipeline"):
        theirs = torch.load(tmp_path / f"image of {name}", weights_only=True)
        assert (ours - theirs).abs().max() <= 1 / 255


def test_export_tells_how_the_model_came_to_be(whole: Path) -> None:
    facts = json.loads((whole / "pipeline" / "latentdiff.json").read_text())
    assert facts["caption_dropout"] == 0.1
    assert facts["steps"] == 8
    assert facts["metrics"]["num_heldout_draws"] == 8


def test_processes_that_accelerate_does_not_see_are_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(world, tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        distributed,
        "Accelerator",
        lambda **_: type("One", (), {"num_processes": 1, "distributed_type": "NO"})(),
    )
    with pytest.raises(ValueError, match="would train copies"):
        distributed.start_accelerator(config)
