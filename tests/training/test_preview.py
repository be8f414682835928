"""Sample sheets: captions are text, and no failure of a sheet ends or changes a training run."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fakes_data import noise_image
from fakes_models import make_tiny_vae
from fakes_training import make_config, make_world, read_metrics
from PIL import Image
from safetensors.torch import load_file

from latentdiff.models.components import Components, load_components
from latentdiff.models.latents import LatentCodec, set_scale
from latentdiff.models.text import NULL_CAPTION, encode_text, tokenize
from latentdiff.pipeline import output
from latentdiff.training.inputs.conditions import FixedCondition
from latentdiff.training.text_to_image import preview
from latentdiff.training.text_to_image.preview import (
    batch_size,
    make_pipeline,
    preview_components,
    prompt_seed,
    write_sheet,
)
from latentdiff.training.text_to_image.train_t2i import train

BRACKETS = [
    "a wall clock (12:3{}) on a wall",
    "a screen (ratio {}:9)",
    r"\\(left\\) a (red:1.{}) dot",
]
FAILURES = [
    ValueError("prompt weighs"),
    RuntimeError("expected scalar type"),
    torch.OutOfMemoryError("out of memory"),
    OSError(28, "No space left on device"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def undisturbed(world: Path) -> Path:
    assert train(make_config(world, world / "undisturbed", **SETTINGS)) == 0
    return world / "undisturbed"


SETTINGS = {"train__max_steps": 2, "preview__every_steps": 1, "preview__num_nearest": 0}


def test_captions_with_brackets_are_trained_previewed_and_measured_as_text(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    for k in range(8):
        path = data / ("test" if k > 5 else "train") / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(k).save(path)
        path.with_suffix(".txt").write_text(BRACKETS[k % 3].format(k))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(make_config(world, run, data__root=data, **SETTINGS)) == 0
    assert "no sheet" not in caplog.text
    assert Image.open(run / "samples" / "step-000000002.png").width >= 2 * 128
    assert read_metrics(run, "heldout_loss").keys() == {2}


def test_a_sheet_shows_the_image_of_the_embeddings_that_training_has_of_a_caption(
    undisturbed: Path, tmp_path: Path
) -> None:
    parts, caption = load_components(undisturbed / "pipeline"), "a red star (12:30)"
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0}
    pipe = preview.make_pipeline(parts)
    pipe.set_progress_bar_config(disable=True)
    embeds, null = (
        encode_text(parts.text_encoder, tokenize(parts.tokenizer, [text]))
        for text in (caption, NULL_CAPTION)
    )
    texts = {"prompt_embeds": embeds, "negative_prompt_embeds": null}
    expected = pipe(**texts, seed=prompt_seed(0, caption), **settings).images[0]
    shared: dict[str, Any] = {"seed": 0, "num_steps": 2, "guidance_scale": 3.0}
    sheet = tmp_path / "sheet.png"
    write_sheet(parts, [caption], sheet, accelerator=Accelerator(cpu=True), **shared)
    with Image.open(sheet) as image:
        box = (8, 8, 8 + 128, 8 + 128)
        shown = image.crop(box)
    resized = expected.resize(shown.size, Image.Resampling.NEAREST)
    difference = np.abs(np.asarray(shown.convert("RGB"), int) - np.asarray(resized, int))
    assert difference.max() <= 2  # a batch of four rounds in another way than one image


@pytest.mark.parametrize("failure", FAILURES, ids=lambda one: type(one).__name__)
def test_a_sheet_that_fails_is_a_warning_and_changes_no_weight(  # noqa: PLR0917  (fixtures)
    world: Path,
    undisturbed: Path,
    tmp_path: Path,
    failure: Exception,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(preview, "generate_share", fail)
    assert train(make_config(world, tmp_path, **SETTINGS)) == 0
    warnings = [one.getMessage() for one in caplog.records if "no sheet" in one.getMessage()]
    assert len(warnings) == 3  # before the first step, and after each
    assert all(f"{type(failure).__name__}: {failure}" in one for one in warnings)
    assert not (tmp_path / "samples").exists()
    assert read_metrics(tmp_path) == read_metrics(undisturbed)
    ours, theirs = (
        load_file(run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
        for run in (tmp_path, undisturbed)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("place", ["make_preview_pipeline", "draw_grid"])
def test_a_sheet_may_fail_at_any_place(
    world: Path,
    tmp_path: Path,
    place: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise TypeError(place)

    with monkeypatch.context() as patch:
        patch.setattr(preview, place, fail)
        assert train(make_config(world, tmp_path, **SETTINGS)) == 0
    assert caplog.text.count(f"TypeError: {place}") == 3


def test_a_stop_signal_during_a_sheet_still_stops_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise ValueError("failed too")

    monkeypatch.setattr(preview, "generate_share", stop)
    assert train(make_config(world, tmp_path, **SETTINGS | {"train__max_steps": 4})) == 143

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preview, "generate_share", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(make_config(world, tmp_path / "other", **SETTINGS))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a clock (12:30)", "preview.prompts: prompt weighs '12' by 30"),
        ("half \ud83d", r"preview.prompts\[1\] is not valid Unicode"),
    ],
)
def test_typed_prompts_that_cannot_be_read_are_refused_before_any_work(
    world: Path, tmp_path: Path, prompt: str, message: str
) -> None:
    config = make_config(world, tmp_path / "run")
    typed = replace(config.preview, prompts=("a cat", prompt))
    with pytest.raises(ValueError, match=message):
        train(replace(config, preview=typed))
    assert not (tmp_path / "run").exists()


def test_sheets_are_decoded_by_another_vae_and_nothing_else_changes(
    world: Path, undisturbed: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    make_tiny_vae().save_pretrained(tmp_path / "vae_tiny")
    run, changed = tmp_path / "run", {"preview__vae": str(tmp_path / "vae_tiny")}
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(make_config(world, run, **SETTINGS | changed)) == 0
    assert read_metrics(run) == read_metrics(undisturbed)
    name = "samples/step-000000002.png"
    sheets = [np.asarray(Image.open(path / name)) for path in (run, undisturbed)]
    assert sheets[0].shape == sheets[1].shape
    assert (sheets[0] != sheets[1]).any()
    vae = "pipeline/vae/diffusion_pytorch_model.safetensors"
    assert (run / vae).read_bytes() == (undisturbed / vae).read_bytes()


def test_another_vae_follows_the_scale_that_a_run_gives_its_latents(
    components: Components, tmp_path: Path
) -> None:
    z = torch.randn(1, 4, 4, 4)
    tiny = make_tiny_vae()
    tiny.save_pretrained(tmp_path / "vae_tiny")
    components.vae.save_pretrained(tmp_path / "vae")
    set_scale(components.vae, 3 * components.vae.config["scaling_factor"])
    options: dict[str, Any] = {"source": str(tmp_path), "device": torch.device("cpu")}
    found = preview_components(components, vae="tiny", **options)
    assert found is not None
    with torch.no_grad():
        expected = LatentCodec(tiny).decode(z)
        torch.testing.assert_close(LatentCodec(found.vae).decode(3 * z), expected)
    assert preview_components(components, vae="", **options) is None


def test_a_sheet_shows_a_condition_by_the_vae_that_encoded_it(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit's image has no scale in its latents, so another VAE's would be wrong for it."""
    grey = Image.new("RGB", (32, 32), "grey")
    monkeypatch.setattr(preview, "generate_share", lambda *args, **options: {0: grey})
    parts = load_components(undisturbed / "pipeline")
    condition = FixedCondition("edit", 2 * torch.randn(parts.vae.config["latent_channels"], 8, 8))
    images = []
    for vae in (parts.vae, make_tiny_vae()):
        path = tmp_path / f"{len(images)}.png"
        write_sheet(
            replace(parts, vae=vae),
            ["edit"],
            path,
            accelerator=Accelerator(cpu=True),
            seed=0,
            num_steps=1,
            guidance_scale=1.0,
            conditions=[condition],
            condition_kind="instruct_pix2pix",
            condition_vae=parts.vae,
        )
        images.append(np.asarray(Image.open(path)))
    assert np.array_equal(*images)


def test_a_vae_of_the_sheets_that_is_not_there_is_refused_before_heavy_work(
    world: Path, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="carries no tiny VAE"):
        train(make_config(world, tmp_path / "run", preview__vae="tiny", **SETTINGS))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("side", "at_once"), [(128, 4), (132, 1)])  # of latents, 4 px each
def test_images_above_512_px_of_a_sheet_are_made_and_decoded_one_at_a_time(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch, side: int, at_once: int
) -> None:
    parts, decoded = load_components(undisturbed / "pipeline"), []
    parts.unet.register_to_config(sample_size=side)
    assert batch_size(make_pipeline(parts)) == at_once

    def decode(codec: LatentCodec, z: torch.Tensor) -> torch.Tensor:
        decoded.append(len(z))
        return z.new_zeros(len(z), 3, 8, 8)

    monkeypatch.setattr(LatentCodec, "_decode_chunk", decode)
    latents = torch.zeros(4, 4, side, side)
    output.decode(
        latents, vae=parts.vae, safety_checker=None, feature_extractor=None, output_type="pt"
    )
    assert decoded == [at_once] * (4 // at_once)
