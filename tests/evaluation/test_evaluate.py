"""scripts/evaluate.py as a whole: figures with counts and intervals, verdicts, one safe page."""

import copy
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes_clip import random_clip
from fakes_models import make_components, save_folder
from fakes_pipeline import ddim, tiny_tokenizer
from fakes_scripts import run_script
from PIL import Image
from transformers import CLIPTokenizer, ViTConfig, ViTModel

from latentdiff.config.options import EvalModelOptions, EvaluationOptions
from latentdiff.data.shapes import write_shapes
from latentdiff.diffusion.ddpm import q_sample
from latentdiff.evaluation import eval_set
from latentdiff.evaluation.eval_set import EvalModel, open_eval_model
from latentdiff.evaluation.metric_nets import MetricNets
from latentdiff.evaluation.report.comparison import comparison_section
from latentdiff.evaluation.report.heldout_loss import comparable, heldout_loss_section
from latentdiff.evaluation.report.section import PairedScore
from latentdiff.evaluation.run import DISTILLED, EvalResult, EvalRun, run_evaluation
from latentdiff.models.build import schedule_of
from latentdiff.models.compatibility import CONDITION_KINDS
from latentdiff.models.components import load_components
from latentdiff.models.unet.image_conditions import add_condition
from latentdiff.pipeline.files.model_info import ModelInfo

pytest.importorskip("matplotlib")
ATTACK = '<script>alert("1")</script>'
QUICK = ["--device", "cpu", "--steps", 2, "--guidance_scale", 2, "--num_images", 12]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """model/ and clip/ of a few thousand parameters, and data/ with 12 + 8 shapes."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    save_folder(make_components(tokenizer), root / "model")
    random_clip().save_pretrained(root / "clip")
    tiny_tokenizer().save_pretrained(root / "clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 16, "patch_size": 8}
    dino = ViTModel(ViTConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
    dino.save_pretrained(root / "dino")
    write_shapes(root / "data", num_train=12, num_test=8, size_px=32)
    return root


def run(*arguments: object) -> int:
    """Run the script in this process; return its exit status."""
    return int(run_script("evaluate.py", *arguments) or 0)


def intervals(figures: Any) -> Iterator[dict[str, Any]]:
    """Yield every interval below some figures."""
    if isinstance(figures, dict):
        if "estimate" in figures:
            yield figures
        for value in figures.values():
            yield from intervals(value)


def test_everything_that_is_given_is_measured_in_one_page(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "out", folders / "model"
    nets = ["--clip", folders / "clip", "--features", folders / "clip", "--compare", model]
    nets += ["--dino", folders / "dino"]
    sweeps = ["--step_sweep", "[1,2]", "--sweep_captions", 2, "--sweep_images", 2]
    data = ["--data", folders / "data", "--out", out]
    assert run(model, *data, *QUICK, *nets, *sweeps) == 0
    assert "report.html" in capsys.readouterr().out
    figures = json.loads((out / "metrics.json").read_text())
    assert set(figures["left_out"]) == {"bound", "guidance_sweep"}
    assert figures["settings"]["num_images"] == 12
    assert figures["settings"]["num_captions"] == 6
    assert len(list((out / "images").glob("*.png"))) == 12
    for name in ("following", "clip_score", "heldout", "fidelity", "memorisation", "diversity"):
        found = list(intervals(figures[name]))
        assert found, name
        for one in found:
            assert one["low"] <= one["estimate"] <= one["high"]
            assert one["num_samples"] >= 2
            assert one["level"] == 0.95
    assert figures["fidelity"]["features"]["sha256"] == figures["clip_score"]["clip"]["sha256"]
    assert figures["cmmd"]["features"]["sha256"] == figures["clip_score"]["clip"]["sha256"]
    for name in ("dino", "cmmd", "fidelity"):
        assert {"heldout", "train", "heldout_to_train"} <= set(figures[name])
    assert figures["steps"]["points"][-1]["to_most_steps"]["mean"] == 0
    assert figures["steps"]["points"][0]["to_most_steps"]["mean"] > 0
    verdicts = [v["verdict"] for v in figures["compare"].values() if "verdict" in v]
    assert verdicts == ["cannot tell"] * 4  # held-out and seen captions, CLIP score, loss
    page = (out / "report.html").read_text()
    assert "cannot tell" in page
    assert not re.findall(r"<script|https?://|src=\"(?!data:)", page)
    assert page.count("data:image/png") > 20


def test_without_networks_it_names_the_skipped_metrics_and_why(
    folders: Path, tmp_path: Path
) -> None:
    each = ["--images_per_caption", 1]
    data = ["--data", folders / "data", "--out", tmp_path]
    assert run(folders / "model", *data, *QUICK, *each) == 0
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert "--features" in figures["left_out"]["fidelity"]
    assert "--clip" in figures["left_out"]["clip_score"]
    assert "--clip" in figures["left_out"]["cmmd"]
    assert "--dino" in figures["left_out"]["dino"]
    assert figures["memorisation"]["features"].startswith("thumbnails")
    page = (tmp_path / "report.html").read_text()
    assert "Skipped" in page
    assert "--features" in page


def test_unseen_data_has_no_training_images(folders: Path, tmp_path: Path) -> None:
    data = ["--data", folders / "data", "--out", tmp_path, "--split", "all"]
    assert run(folders / "model", *data, *QUICK) == 0
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["following"]["heldout"]["num_captions"] == 6
    assert "training split" in figures["left_out"]["memorisation"]
    assert "seen" not in figures["following"]


@pytest.mark.parametrize(
    ("split", "trained", "warning"),
    [
        ("heldout", 1, None),
        ("train", 0, r"These \d+ images were trained on: a good fit may be copying"),
        ("all", 0, r"These \d+ images are not held out: where the model was trained on them"),
        ("all", 1, r"Most of these \d+ images were trained on: a good fit may be copying"),
    ],
)
def test_images_that_are_not_held_out_are_not_called_so(
    folders: Path, tmp_path: Path, split: str, trained: int, warning: str | None
) -> None:
    shutil.copytree(folders / "model", tmp_path / "run" / "pipeline")
    if trained:
        settings = f"data: {{root: '{folders / 'data'}', heldout_fraction: 0.02}}\n"
        (tmp_path / "run" / "config.yaml").write_text(settings)
    out = tmp_path / "out"
    data = ["--data", folders / "data", "--out", out, "--split", split]
    assert run(tmp_path / "run", *data, *QUICK, "--features", folders / "clip") == 0
    page = (out / "report.html").read_text()
    claims = re.findall(r"[Hh]eld-out (?:loss|captions|images|split)", page)
    assert bool(claims) == (split == "heldout")
    assert (warning is None) == ("copying" not in page)
    if warning is not None:
        assert re.search(warning, page)
        assert "Loss on these images" in page


def test_captions_are_text_in_the_page(folders: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 0, 0)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text(f"{ATTACK} {number}")
    out = tmp_path / "out"
    where = ["--data", data, "--out", out, "--split", "all"]
    assert run(folders / "model", *where, *QUICK) == 0
    page = (out / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    figures = json.loads((out / "metrics.json").read_text())
    assert "shapes world" in figures["left_out"]["following"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_images", 3], "num_images=3"),
        (["--images_per_caption", 64, "--num_images", 64], "images_per_caption=64"),
        (["--steps", 0], "num_inference_steps=0"),
        (["--step_sweep", "[0,2]"], "step_sweep"),
        (["--clip_weights", "x.safetensors"], "clip_weights"),
        (["--clip", "none"], "none"),
        (["--clip", "ViT-B-32", "--clip_weights", "x.bin"], "safetensors"),
        (["--clip", "ViT-Z", "--clip_weights", "x.safetensors"], "ViT-Z"),
        (["--features", "none"], "none"),
        (["--dino", "none"], "none"),
        (["--compare", "none"], "none"),
        (["--class_column", "nothing", *QUICK], "nothing"),
    ],
)
def test_bad_input_is_named(
    folders: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    message: str,
) -> None:
    out = tmp_path / "out"
    data = ["--data", folders / "data", "--out", out]
    assert run(folders / "model", *data, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.fixture(scope="module")
def stages(folders: Path) -> tuple[EvalModel, EvalModel]:
    """A model trained on its images, and the same one half way."""
    options = EvalModelOptions(data=str(folders / "data"), split="all", device="cpu")
    eval_model = open_eval_model(str(folders / "model"), options)
    unet = eval_model.components.unet.requires_grad_(True).train()
    latents, schedule = eval_model.latents, schedule_of(eval_model.components.scheduler)
    optimiser = torch.optim.Adam(unet.parameters(), lr=3e-3)
    generator, half = eval_model.generator(), unet
    for step in range(60):
        if step == 15:
            half = copy.deepcopy(unet)
        eps = torch.randn(latents.z0.shape, generator=generator)
        t = torch.randint(1000, (len(latents),), generator=generator)
        zt = q_sample(schedule, latents.z0, t, eps)
        loss = (unet(zt, t, latents.conditioning.prompt_embeds).sample - eps).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    trained, half = (one.eval().requires_grad_(False) for one in (unet, half))
    return (
        replace(eval_model, components=replace(eval_model.components, unet=trained)),
        replace(eval_model, components=replace(eval_model.components, unet=half)),
    )


def verdict(first: PairedScore, second: PairedScore) -> str:
    section = comparison_section(
        "other", {"loss": first}, {"loss": second}, images=None, skipped={}
    )
    return str(section.figures["loss"]["verdict"])


def test_trained_model_is_better_than_half_trained_and_not_than_itself(
    stages: tuple[EvalModel, EvalModel],
) -> None:
    trained, half = (heldout_loss_section(eval_model)[1] for eval_model in stages)
    assert verdict(trained, half) == "better"
    assert verdict(half, trained) == "worse"
    assert verdict(trained, trained) == "cannot tell"
    assert comparable(*stages) == ""


def test_losses_of_other_latents_do_not_compare(stages: tuple[EvalModel, EvalModel]) -> None:
    first = stages[0]
    moved = replace(first, latents=replace(first.latents, z0=first.latents.z0 + 1))
    assert "VAE" in comparable(first, moved)


def test_a_model_with_non_finite_outputs_is_named(stages: tuple[EvalModel, EvalModel]) -> None:
    broken = copy.deepcopy(stages[0].components.unet)
    broken.conv_out.weight.data.fill_(float("nan"))
    eval_model = replace(stages[0], components=replace(stages[0].components, unet=broken))
    with pytest.raises(FloatingPointError, match="NaN"):
        heldout_loss_section(eval_model)


@pytest.mark.parametrize(
    ("info", "asked", "num_steps"),
    [
        (ModelInfo(num_inference_steps=4), None, 4),
        (ModelInfo(num_inference_steps=4), 8, 8),
        (ModelInfo(), None, 25),
    ],
)
def test_a_distilled_model_is_measured_at_its_own_steps_and_has_no_heldout_loss(
    info: ModelInfo, asked: int | None, num_steps: int
) -> None:
    eval_model: Any = SimpleNamespace(
        info=info,
        is_distilled=info.num_inference_steps is not None,
        folder=[],
        components=SimpleNamespace(scheduler=ddim()),
    )
    options = EvaluationOptions(num_images=0, num_inference_steps=asked)
    nets, data, result = MetricNets(None, None), EvalModelOptions(""), EvalResult()
    evaluation = EvalRun(eval_model, nets, Path(), data, options, 1.0)
    assert evaluation.num_inference_steps == num_steps
    run_evaluation(evaluation, result)
    assert (result.skipped["heldout"] == DISTILLED) is (info.num_inference_steps is not None)


@pytest.mark.parametrize("kind", CONDITION_KINDS)
def test_a_model_that_reads_an_image_is_refused_by_its_kind(
    folders: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    components = load_components(folders / "model")
    add_condition(components.unet, kind)
    monkeypatch.setattr(eval_set, "load_components", lambda *_, **__: components)
    options = EvalModelOptions(data=str(folders / "data"), split="all", device="cpu")
    with pytest.raises(ValueError, match=f"reads an image.*{kind}"):
        open_eval_model("edits", options)
