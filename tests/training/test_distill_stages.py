"""All stages of a distillation: the plan, a kill in any stage, the verdict, and the export."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from fakes_finetune import QUICK, generate, open_ours
from fakes_training import make_config, read_metrics
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_distill import world

from latentdiff.audit.verify import verify
from latentdiff.config.options import DistillOptions
from latentdiff.config.text_to_image import Config
from latentdiff.pipeline.files.model_info import ModelInfo, default_steps, read_model_info
from latentdiff.training.distill.stages import COST, distill, plan_lines, plan_stages
from latentdiff.training.text_to_image.train_step import TrainStep

__all__ = ["world"]
MEASURED: dict[str, Any] = {  # on few images, with bounds that every student keeps
    "num_images": 10,
    "teacher_num_steps": 2,
    "guidance_scale": 2.0,
    "max_distance": 100.0,
    "max_accuracy_loss": 1.0,
}
OPTIONS = DistillOptions(steps=16, guided_steps=2, halving_steps=2, **MEASURED)


def template(world: Path, out: Path, **overrides: Any) -> Config:
    plain = {
        "model__vae": "",
        "model__pretrained": world / "base" / "pipeline",
        "diffusion__caption_dropout": 0,
        "distill__method": "guided",
        "train__ema": "true",
    }
    return make_config(world, out, **(QUICK | plain | overrides))


@pytest.fixture(scope="module")
def whole(world: Path) -> Path:
    """A distillation that nothing stopped."""
    assert distill(template(world, world / "whole"), OPTIONS) == 0
    return world / "whole"


def student(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("killed_at", [1, 3], ids=["guided", "halving"])
def test_a_kill_in_any_stage_changes_no_bit(
    world: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    given, step, calls = template(world, tmp_path), TrainStep.step, iter(range(1, 100))

    def killed(self: TrainStep, *arguments: Any, **named: Any) -> Any:
        if next(calls) == killed_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "step", killed)
        assert distill(given, OPTIONS) == 143
    assert not (tmp_path / "pipeline").exists()
    assert distill(given, OPTIONS) == 0
    expected = student(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in student(tmp_path).items())
    for name in ("0-guided", "1-16"):
        stage = tmp_path / "stages" / name
        assert read_metrics(stage) == read_metrics(whole / "stages" / name)
        ours, theirs = (json.loads((one / "report.json").read_text()) for one in (
            stage, whole / "stages" / name,
        ))  # fmt: skip
        assert ours["scores"] == theirs["scores"]


def test_what_is_done_is_not_done_again(
    world: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentdiff.training.distill.stages.train", lambda config: 1 / 0)
    monkeypatch.setattr(
        "latentdiff.training.distill.comparison.generate_and_save", lambda *_, **__: 1 / 0
    )
    assert distill(template(world, whole), OPTIONS) == 0


def test_the_export_opens_in_stock_diffusers_and_says_its_steps(world: Path, whole: Path) -> None:
    assert verify(str(whole)).is_proven
    info = read_model_info(whole / "pipeline")
    assert default_steps(info, 30) == 16
    assert info.base_model == "base"
    stock = StableDiffusionPipeline.from_pretrained(whole / "pipeline", safety_checker=None)
    ours, theirs = (
        generate(pipe, num_inference_steps=16) for pipe in (open_ours(whole / "pipeline"), stock)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1 / 255)


def test_a_sheet_has_the_teacher_s_images_above_those_of_each_student(whole: Path) -> None:
    with Image.open(whole / "comparison.png") as sheet:
        assert sheet.width == 8 + 8 * (128 + 8)
        assert 3 * 128 < sheet.height < 4 * 128 + 200  # the teacher, 0-guided and 1-16
        tile = np.array(sheet.crop((8, 8, 136, 136)))
    with Image.open(whole / "teacher" / "0000-0.png") as image:
        enlarged = image.convert("RGB").resize((128, 128), Image.Resampling.NEAREST)
    assert np.array_equal(tile, np.array(enlarged))


def test_a_worse_stage_leaves_the_one_before(
    world: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = whole / "stages" / "1-16" / "report.json"
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | {"is_worse": True}))
    try:
        assert distill(template(world, whole), OPTIONS) == 1
    finally:
        path.write_text(text)
    assert "stage 1-16 is worse than the teacher, so the one before is kept" in caplog.text
    assert default_steps(read_model_info(whole / "pipeline"), 30) == 32
    report = json.loads((whole / "report.json").read_text())
    assert (report["num_steps"], report["asked"]) == (32, 16)
    assert distill(template(world, whole), OPTIONS) == 0
    assert default_steps(read_model_info(whole / "pipeline"), 30) == 16


def test_the_plan_has_a_stage_a_halving_and_names_the_cost(world: Path, tmp_path: Path) -> None:
    given = template(world, tmp_path)
    stages = plan_stages(given, DistillOptions(steps=2, guided_steps=40))
    names = ["0-guided", "1-16", "2-8", "3-4", "4-2"]
    assert [stage.name for stage in stages] == names
    assert [stage.config.train.max_steps for stage in stages] == [40, 1, 1, 1, 1]
    assert [stage.config.distill.num_steps for stage in stages] == [32, 16, 8, 4, 2]
    assert stages[1].config.model.pretrained == str(tmp_path / "stages" / "0-guided" / "pipeline")
    assert len({stage.config.train.seed for stage in stages}) == 5
    last = plan_lines(stages, read_model_info(world / "base" / "pipeline"))[-1]
    assert last == (
        "in all 44 steps of 4 images, as costly as 73 of plain training; "
        "the teacher's last training had 2 of 4 images"
    )
    with pytest.raises(ValueError, match="steps=3, expected 16, 8, 4, 2 or 1"):
        distill(given, DistillOptions(steps=3))


@pytest.mark.parametrize("steps", [1_150, 30_000])
@pytest.mark.parametrize("batches", [1, 2])
def test_down_to_one_step_all_stages_cost_a_tenth_more_than_the_teachers_training_at_most(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, batches: int
) -> None:
    given = template(world, tmp_path)
    known = ModelInfo(steps=steps, batch_size=batches * given.train.batch_size)
    monkeypatch.setattr("latentdiff.training.distill.stages._info", lambda template: known)
    lengths = [
        stage.config.train.max_steps for stage in plan_stages(given, DistillOptions(steps=1))
    ]
    assert lengths == [int(batches * steps * share / 32) for share in (5, 1, 2, 3, 4, 6)]
    assert 1.05 < COST * sum(lengths) / (batches * steps) <= 1.1


def test_a_teacher_of_unknown_training_is_given_the_steps(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latentdiff.training.distill.stages._info", lambda template: ModelInfo())
    given = template(world, tmp_path)
    with pytest.raises(ValueError, match="does not say how many steps it was trained for"):
        plan_stages(given, DistillOptions(guided_steps=5))
    both = plan_stages(given, DistillOptions(guided_steps=5, halving_steps=3))
    assert [stage.config.train.max_steps for stage in both] == [5, 3, 3, 3]


LCM = DistillOptions(method="lcm_lora", steps=2, lora_steps=3, teacher_images=6, **MEASURED)


def lcm_template(world: Path, out: Path) -> Config:
    lora = {"finetune__method": "lora", "finetune__lora_rank": 2, "train__learning_rate": 1e-2}
    often = {"distill__method": "lcm_lora", "distill__num_steps": 2}
    return template(world, out, **(lora | often | {"train__ema_decay": 0.5}))


@pytest.fixture(scope="module")
def lcm(world: Path) -> Path:
    """An LCM-LoRA that nothing stopped."""
    assert distill(lcm_template(world, world / "lcm"), LCM) == 0
    return world / "lcm"


def test_a_kill_changes_no_bit_of_an_lcm_lora(
    world: Path, lcm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, step, calls = lcm_template(world, tmp_path), TrainStep.step, iter(range(1, 100))

    def killed(self: TrainStep, *arguments: Any, **named: Any) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "step", killed)
        assert distill(given, LCM) == 143
    assert distill(given, LCM) == 0
    name = "lora_kohya.safetensors"
    ours, expected = load_file(tmp_path / name), load_file(lcm / name)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in ours.items())
    stage = Path("stages") / "lcm-lora"
    assert read_metrics(tmp_path / stage) == read_metrics(lcm / stage)


def test_the_teacher_s_images_are_a_captioned_folder_that_the_adapter_was_trained_on(
    lcm: Path,
) -> None:
    rows = (lcm / "teacher_images" / "metadata.jsonl").read_text().splitlines()
    assert len(rows) == 6
    assert {json.loads(row)["num_inference_steps"] for row in rows} == {2}
    assert len({json.loads(row)["seed"] for row in rows}) == 6
    config = (lcm / "stages" / "lcm-lora" / "config.yaml").read_text()
    assert f"root: {lcm / 'teacher_images'}" in config


@pytest.mark.parametrize(
    "file", ["lora/pytorch_lora_weights.safetensors", "lora_kohya.safetensors"]
)
def test_stock_diffusers_with_the_lora_and_an_lcm_scheduler_draws_our_image(
    world: Path, lcm: Path, file: str
) -> None:
    stock = StableDiffusionPipeline.from_pretrained(
        world / "base" / "pipeline", safety_checker=None
    )
    plain = generate(stock, num_inference_steps=2, guidance_scale=1.0)
    stock.load_lora_weights(lcm / file)
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    theirs = generate(stock, num_inference_steps=2, guidance_scale=1.0)
    ours = generate(open_ours(lcm / "pipeline"), num_inference_steps=None, guidance_scale=None)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1 / 255)
    assert (theirs - plain).abs().max() > 1 / 255
    with safe_open(lcm / file, "pt") as opened:
        hint = opened.metadata()["modelspec.usage_hint"]
    assert hint == "2 steps, CFG scale 1 (guidance scale 1 to 8 is in the weights), " + (
        "sampler LCM, schedule SGM uniform"
    )
