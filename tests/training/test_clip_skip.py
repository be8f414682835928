"""Training with layers of the text encoder skipped: in caches, images and exports alike."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from fakes_finetune import finetuning, generate, open_ours
from fakes_sdxl import sdxl_pipeline, stock_sdxl
from fakes_training import make_config, make_world, read_metrics
from PIL import Image
from safetensors import safe_open

from latentdiff.data.cache.prompt_cache import encoder_hash
from latentdiff.data.folder.folder import read_folder
from latentdiff.evaluation.eval_set import encode_folder
from latentdiff.models.components import Components, load_components
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.text import TextEncoders, set_clip_skip
from latentdiff.pipeline.png_metadata import read_settings, save_png
from latentdiff.training.text_to_image.model import TextToImage
from latentdiff.training.text_to_image.train_t2i import train

SKIP = {"model__clip_skip": 1, "train__max_steps": 2, "eval__every_steps": 1}
PROMPT = "a small red circle"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder, and base/pipeline, whose text encoder has three layers."""
    world = make_world(tmp_path_factory.mktemp("world"))
    AcceleratorState._reset_state(reset_partial_state=True)
    config = make_config(
        world,
        world / "base",
        train__max_steps=1,
        model__text__num_layers=3,
        preview__num_nearest=0,
        model__unet__dropout=0,
    )
    assert train(config) == 0
    return world


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    changes = {"finetune__method": "lora", "train__train_text_encoder": "true"}
    assert train(finetuning(world, world / "run", **SKIP | changes)) == 0
    return world / "run"


def skipping(world: Path, value: int) -> Components:
    components = load_components(world / "base" / "pipeline")
    set_clip_skip(components.text_encoders, value)
    return components


@torch.no_grad()
def encode_captions(components: Components, captions: Sequence[str]) -> torch.Tensor:
    return components.text_encoders.encode_captions(captions).prompt_embeds


def open_stock(folder: Path) -> StableDiffusionPipeline:
    stock = StableDiffusionPipeline.from_pretrained(folder)
    if not hasattr(stock.text_encoder, "text_model"):  # where it looks for the last norm
        object.__setattr__(stock.text_encoder, "text_model", stock.text_encoder)
    return stock


def test_training_and_evaluation_encode_captions_as_stock_diffusers_does(world: Path) -> None:
    """And the empty caption as its negative prompt, for which diffusers skips no layer."""
    components = skipping(world, 1)
    stock = open_stock(world / "base" / "pipeline")
    embeds, null = stock.encode_prompt(PROMPT, "cpu", 1, True, clip_skip=1)
    tokenizer = components.tokenizer
    found = encode_captions(components, [PROMPT, ""])
    torch.testing.assert_close(found, torch.cat([embeds, null]))
    ids = tokenizer([PROMPT, ""], padding="max_length", return_tensors="pt").input_ids
    model = TextToImage(components, trains_text_encoder=True)
    seen = []
    model.unet.forward = lambda zt, t, **read: (seen.append(read), zt)  # type: ignore[assignment]
    model(torch.zeros(2), torch.zeros(2), Conditioning(input_ids=ids))
    assert torch.equal(seen[0]["encoder_hidden_states"], found)
    folder = read_folder(world / "data").split("train")
    evaluated = encode_folder(components, folder, batch_size=8, device=torch.device("cpu"), seed=0)
    captions = [record.captions[0] for record in folder]
    expected = encode_captions(components, captions)
    torch.testing.assert_close(evaluated.conditioning.prompt_embeds, expected)


@pytest.mark.parametrize("skipped", [0, 1])
def test_both_text_encoders_of_sdxl_skip_the_layers_that_stock_skips(skipped: int) -> None:
    stock = stock_sdxl()
    parts = stock.text_encoder, stock.tokenizer, stock.text_encoder_2, stock.tokenizer_2
    encoders = TextEncoders(*parts)
    set_clip_skip(encoders, skipped)
    embeds, _, pooled, _ = stock.encode_prompt(
        PROMPT, device="cpu", do_classifier_free_guidance=False, clip_skip=skipped
    )
    with torch.no_grad():
        found = encoders.encode_captions([PROMPT])
    torch.testing.assert_close(found.prompt_embeds, embeds)
    torch.testing.assert_close(found.pooled_embeds, pooled)
    ours = sdxl_pipeline(text_encoder=stock.text_encoder)  # in sampling, as saved
    torch.testing.assert_close(ours.encode_prompt(PROMPT)[0], embeds)
    with pytest.raises(ValueError, match=r"model\.clip_skip is 9, expected 0 to"):
        set_clip_skip(encoders, 9)


def test_cache_keys_are_others_only_where_layers_are_skipped(world: Path) -> None:
    keys = set()
    for value in (0, 1, 2):
        components = skipping(world, value)
        keys.add(encoder_hash(components.text_encoders, dtype=torch.float32))
        if value == 0:
            assert not hasattr(components.text_encoder.config, "clip_skip")
    assert len(keys) == 3


def test_exported_model_skips_by_default_and_tells_stock_diffusers_how_to(
    world: Path, run: Path, tmp_path: Path
) -> None:
    folder = run / "pipeline"
    ours, stock = open_ours(folder), open_stock(folder)
    found = generate(ours, PROMPT)
    assert (found - generate(stock, PROMPT, clip_skip=1)).abs().max() <= 1e-4
    assert (found - generate(stock, PROMPT)).abs().max() > 1e-3
    assert torch.equal(generate(ours, PROMPT, clip_skip=1), found)
    assert not torch.equal(generate(ours, PROMPT, clip_skip=0), found)
    card = (folder / "README.md").read_text()
    assert "| Clip skip | 1, as diffusers counts; in A1111 2 |" in card
    assert json.loads((folder / "latentdiff.json").read_text())["clip_skip"] == 1
    with safe_open(run / "lora_kohya.safetensors", "pt") as file:
        assert file.metadata()["ss_clip_skip"] == "2"  # kohya counts as A1111
    image = ours(PROMPT, num_inference_steps=1, seed=0).images[0]
    save_png(image, tmp_path / "image.png")
    assert read_settings(tmp_path / "image.png")["call"]["clip_skip"] == 1
    with Image.open(tmp_path / "image.png") as file:
        assert "Clip skip: 2" in file.info["parameters"]


def test_model_that_skips_is_tuned_further_with_the_same_layers(
    run: Path, world: Path, tmp_path: Path
) -> None:
    changes = {"model__pretrained": run / "pipeline", "train__max_steps": 1}
    again = finetuning(world, tmp_path / "again", **changes, eval__every_steps=1)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(again) == 0
    before, after = (read_metrics(one, "heldout_loss") for one in (run, tmp_path / "again"))
    assert after[0] == pytest.approx(before[2], abs=1e-6)
    assert load_components(tmp_path / "again" / "pipeline").text_encoder.config.clip_skip == 1


def test_layers_that_are_skipped_are_not_trained(world: Path, tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    changes = {"train__train_text_encoder": "true", "diffusion__caption_dropout": 0.5}
    assert train(finetuning(world, tmp_path / "run", **SKIP | changes)) == 0
    before, after = (
        load_components(folder / "pipeline").text_encoder.state_dict()
        for folder in (world / "base", tmp_path / "run")
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not [name for name in moved if "layers.2." in name]
    assert [name for name in moved if "layers.1." in name]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__clip_skip": 3}, "model.clip_skip is 3, expected 0 to 2: .* has 3 layers"),
        ({"model__clip_skip": -1}, "model.clip_skip=-1, expected a number of at least 0"),
        ({"model__clip_skip": 1, "model__pretrained": ""}, "a new one has none to spare"),
    ],
)
def test_too_few_layers_are_refused(
    world: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        train(finetuning(world, tmp_path / "run", **changes))
