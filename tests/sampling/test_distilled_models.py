"""Distilled folders: one pass a step of their own number, the scale as a knob, other forms."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from fakes_pipeline import SIZE, lora_weights, sd1_shaped
from fakes_scripts import run_script
from safetensors.torch import save_file

from latentdiff import LatentDiffPipeline
from latentdiff.app.model_facts import read_model_facts
from latentdiff.models.unet.guidance_embedding import add_guidance_embedding
from latentdiff.pipeline.files.model_info import ModelInfo, read_model_info
from latentdiff.pipeline.files.single_file import stored_usage_hint
from latentdiff.pipeline.png_metadata import read_settings
from latentdiff.pipeline.schedulers import distilled_scheduler
from latentdiff.sampling import conversion
from latentdiff.sampling.conversion import export_single_file, merge_loras
from latentdiff.sampling.release import pack_model

STEP = 1 / 255
INFO = ModelInfo(guidance_scale=3.0, num_inference_steps=4, guidance_range=(1.0, 8.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 4 steps, as `latentdiff distill` writes one."""
    pipe = sd1_shaped()
    unet = add_guidance_embedding(pipe.unet)
    torch.manual_seed(3)
    torch.nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.3)
    pipe.register_modules(unet=unet, scheduler=distilled_scheduler(pipe.scheduler))
    pipe.model_info = INFO
    path = tmp_path_factory.mktemp("distilled") / "student"
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def pipe(folder: Path) -> LatentDiffPipeline:
    return quiet(LatentDiffPipeline.from_pretrained(folder))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_of(pipe: Any, **changes: Any) -> np.ndarray:
    call: dict[str, Any] = {"generator": torch.Generator().manual_seed(1), "output_type": "np"}
    images: np.ndarray = pipe("a cat", **(call | changes)).images
    return images


def test_a_plain_call_takes_the_model_s_steps_and_one_pass_a_step(pipe: Any) -> None:
    passes: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    result = pipe("a cat", seed=1)
    assert passes == [1, 1, 1, 1]
    call = result.settings[0]["call"]
    assert (call["num_inference_steps"], call["guidance_scale"]) == (4, 3.0)


def test_stock_diffusers_draws_the_same_image_at_every_scale(pipe: Any, folder: Path) -> None:
    stock = quiet(StableDiffusionPipeline.from_pretrained(folder, safety_checker=None))
    size, drawn = {"height": SIZE, "width": SIZE, "num_inference_steps": 4}, []
    for scale in (1.5, 3.0, 8.0):
        drawn.append(image_of(pipe, guidance_scale=scale))
        theirs = image_of(stock, guidance_scale=scale, **size)
        assert np.abs(drawn[-1] - theirs).max() <= STEP
    assert np.abs(drawn[0] - drawn[-1]).max() > 2 * STEP


def test_the_fast_path_of_a_cpu_draws_the_same_image(pipe: Any) -> None:
    prompts, expected = ["a cat", "blue sea, sky"], {}
    for scale in (2.0, 6.0):
        expected[scale] = pipe(prompts, seed=1, guidance_scale=scale, output_type="np").images
    pipe.fast_cpu.is_on = True
    for scale, images in expected.items():
        found = pipe(prompts, seed=1, guidance_scale=scale, output_type="np").images
        assert np.abs(found - images).max() <= STEP
    assert pipe.fast_cpu._forwards


def test_outside_the_guidance_interval_the_model_reads_no_guidance(pipe: Any) -> None:
    plain = image_of(pipe, guidance_scale=1.0)
    assert np.array_equal(image_of(pipe, guidance_interval=(0.9, 1.0)), plain)
    assert not np.array_equal(image_of(pipe, guidance_interval=(0.0, 0.3)), plain)


def test_the_default_scale_lies_within_those_learned(pipe: Any) -> None:
    pipe.model_info = replace(INFO, guidance_scale=None, guidance_range=(1.0, 5.0))
    assert pipe("a cat", seed=1).settings[0]["call"]["guidance_scale"] == 5.0


@pytest.mark.parametrize(
    ("info", "call", "message"),
    [
        (INFO, {"negative_prompt": "a dog"}, "negative_prompt has no effect"),
        (INFO, {"num_inference_steps": 5}, "is 5, but this model is distilled to 4"),
        (INFO, {"guidance_scale": 9}, "is 9, but this model is distilled for scales of 1 to 8"),
        (replace(INFO, is_guided=True), {"guidance_scale": 2}, "is applied twice; use guidance"),
        (INFO, {"negative_prompt": ""}, None),
        (INFO, {"num_inference_steps": 2, "guidance_scale": 8}, None),
    ],
)
def test_arguments_without_use_are_named(
    pipe: Any, caplog: Any, info: ModelInfo, call: dict[str, Any], message: str | None
) -> None:
    pipe.model_info = info
    with caplog.at_level(logging.WARNING, "latentdiff"):
        pipe("a cat", seed=1, **call)
    assert (message or "") in caplog.text
    assert bool(caplog.records) is (message is not None)


def test_the_sample_command_takes_the_model_s_steps(folder: Path, tmp_path: Path) -> None:
    assert run_script("sample.py", folder, "a cat", "--out", tmp_path / "cat.png") == 0
    (settings,) = read_settings(tmp_path / "cat.png")
    assert settings["call"]["num_inference_steps"] == 4


def test_the_page_takes_the_model_s_steps_and_says_what_it_was_distilled_to(
    pipe: Any, folder: Path
) -> None:
    facts = read_model_facts(pipe, name="student", path=str(folder), max_px=64)
    assert (facts.num_inference_steps, facts.guidance_scale) == (4, 3.0)
    assert "to 4 steps, guidance of 1 to 8 learned" in dict(facts.rows)["Distilled"]


def test_one_file_fixes_a_scale_and_says_so(
    pipe: Any, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(conversion, "CLIP_VOCABULARY", len(pipe.tokenizer))
    teacher = tmp_path / "teacher"
    sd1_shaped().save_pretrained(teacher)
    file = export_single_file(folder, tmp_path / "four.safetensors", guidance_scale=5.0)
    hint = stored_usage_hint(file)
    assert hint is not None
    assert hint.startswith("4 steps, CFG scale 1 (guidance scale 5 is in the weights), sampler")
    one = quiet(LatentDiffPipeline.from_single_file(file, config=teacher))
    expected = image_of(pipe, guidance_scale=5.0)
    assert np.abs(image_of(one) - expected).max() <= STEP
    assert np.abs(image_of(pipe) - expected).max() > STEP
    assert one.model_info == replace(INFO, guidance_range=(5.0, 5.0), is_guided=True)
    own = export_single_file(folder, tmp_path / "own.safetensors")
    assert "guidance scale 3 is" in str(stored_usage_hint(own))
    with pytest.raises(ValueError, match="expected one learned: 1 to 8"):
        export_single_file(folder, tmp_path / "x.safetensors", guidance_scale=9.0)
    with pytest.raises(ValueError, match="only a model that reads the scale"):
        export_single_file(teacher, tmp_path / "x.safetensors", guidance_scale=3.0)
    plain = export_single_file(teacher, tmp_path / "plain.safetensors")
    assert stored_usage_hint(plain) is None


def test_merged_and_packed_models_keep_their_steps_and_scales(folder: Path, tmp_path: Path) -> None:
    save_file(lora_weights(), tmp_path / "lora.safetensors")
    merge_loras(folder, [tmp_path / "lora.safetensors"], tmp_path / "merged")
    pack_model(tmp_path / "merged", tmp_path / "packed")
    for name in ("merged", "packed"):
        info = read_model_info(tmp_path / name)
        assert (info.num_inference_steps, info.guidance_range) == (4, (1.0, 8.0))
        assert info.guidance_scale == 3.0
        assert "1 to 8, an input" in (tmp_path / name / "README.md").read_text()
    pipe = quiet(LatentDiffPipeline.from_pretrained(tmp_path / "packed"))
    assert pipe.scheduler.config["timestep_spacing"] == "trailing"
    assert pipe("a cat", seed=1).settings[0]["call"]["num_inference_steps"] == 4
