"""Fine-tuning by each method: trainable parameters, exact resume, and the exported files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from fakes_finetune import finetuning, generate, open_ours
from fakes_training import read_metrics
from safetensors import safe_open
from safetensors.torch import load_file

from latentdiff.audit.verify import verify
from latentdiff.models.components import load_components
from latentdiff.pipeline.files.kohya_lora import layers_unknown_to_kohya
from latentdiff.training import loop
from latentdiff.training.checkpoint import newest_valid
from latentdiff.training.text_to_image import setup
from latentdiff.training.text_to_image.components import pretrained_components
from latentdiff.training.text_to_image.train_t2i import train


def parts(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of U-Net and text encoder of a pipeline folder."""
    components = load_components(folder)
    named = {f"unet.{k}": v for k, v in components.unet.state_dict().items()}
    return named | {f"text.{k}": v for k, v in components.text_encoder.state_dict().items()}


def changed(world: Path, run: Path) -> set[str]:
    """Return the names of the weights that a run's export has otherwise than the base."""
    before, after = parts(world / "base" / "pipeline"), parts(run / "pipeline")
    assert before.keys() == after.keys()
    return {
        name
        for name in before
        if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    }


@pytest.mark.parametrize(
    ("method", "learns"),
    [
        ("cross_attention", lambda name: ".attn2." in name),
        ("attention", lambda name: ".attn1." in name or ".attn2." in name),
        ("full", lambda name: name.startswith("unet.")),
    ],
)
def test_only_what_the_method_names_changes(world, tmp_path, method, learns):
    assert train(finetuning(world, tmp_path / "run", finetune__method=method)) == 0
    moved = changed(world, tmp_path / "run")
    everything = parts(world / "base" / "pipeline")
    assert moved <= {name for name in everything if learns(name)}
    assert {name for name in everything if learns(name) and name.endswith("to_k.weight")} <= moved
    checkpoint, _ = newest_valid(tmp_path / "run" / "checkpoints")
    saved = load_file(checkpoint / "model.safetensors")
    assert all(learns(name) for name in saved)


def test_text_encoder_is_trained_at_its_own_learning_rate(world, tmp_path):
    assert train(finetuning(world, tmp_path / "one", train__train_text_encoder="true")) == 0
    assert {"text", "unet"} == {name.split(".")[0] for name in changed(world, tmp_path / "one")}
    AcceleratorState._reset_state(reset_partial_state=True)
    slow = finetuning(
        world,
        tmp_path / "two",
        train__train_text_encoder="true",
        train__text_learning_rate=1e-7,
        train__weight_decay=0,
        train__lr_warmup_steps=0,
    )
    assert train(slow) == 0
    before, after = parts(world / "base" / "pipeline"), parts(tmp_path / "two" / "pipeline")
    steps = {
        part: max(
            (after[name] - before[name]).abs().max().item()
            for name in before
            if name.startswith(part)
        )
        for part in ("text", "unet")
    }
    assert 0 < steps["text"] < 1e-6
    assert steps["unet"] > 1e-4


def stopping_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the next run see a signal after so many steps."""
    whole = loop.any_process
    seen = iter(range(10_000))

    def flagged(flag: bool, accelerator: object) -> bool:
        return next(seen) >= steps - 1 + 1 or whole(flag, accelerator)

    monkeypatch.setattr(loop, "any_process", flagged)


LORA = {
    "finetune__method": "lora",
    "finetune__lora_rank": 2,
    "finetune__lora_alpha": 4,
    "train__train_text_encoder": "true",
    "train__ema": "true",
    "train__learning_rate": 0.02,
}
WORD = {
    "finetune__method": "textual_inversion",
    "finetune__token": "<pet>",
    "finetune__initializer_token": "red circle",
    "finetune__num_vectors": 2,
    "finetune__instance_prompts": json.dumps(["a photo of <pet>", "the <pet>, small"]),
    "train__ema": "true",
    "train__weight_decay": 0,
    "diffusion__caption_dropout": 0,
}


@pytest.fixture(scope="module")
def lora_run(world) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    run = world / "lora"
    assert train(finetuning(world, run, **LORA)) == 0
    return run


@pytest.fixture(scope="module")
def word_run(world) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    run = world / "word"
    assert train(finetuning(world, run, **WORD)) == 0
    return run


def test_a_lora_of_an_own_vocabulary_is_said_to_fit_its_base_only(world, tmp_path, caplog):
    AcceleratorState._reset_state(reset_partial_state=True)
    caplog.set_level("INFO")
    extra = {"finetune__lora_kohya": "true", "train__max_steps": 1}
    run = tmp_path / "run"
    assert train(finetuning(world, run, **LORA | extra)) == 0
    assert "it fits base only: use latentdiff sample, latentdiff app or diffusers" in caplog.text
    assert "ComfyUI" not in caplog.text
    assert f"before: {run}/samples/step-000000000.png" in caplog.text
    assert f"after: {run}/samples/step-000000001.png" in caplog.text


@pytest.mark.parametrize("settings", [LORA, WORD], ids=["lora", "textual_inversion"])
def test_resume_continues_bitwise(world, tmp_path, request, settings):
    whole = request.getfixturevalue("lora_run" if settings is LORA else "word_run")
    extra = {"finetune__lora_kohya": "true"} if settings is LORA else {}
    half = finetuning(world, tmp_path / "run", **settings | extra | {"train__max_steps": 2})
    assert train(half) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(finetuning(world, tmp_path / "run", **settings, **extra)) == 0
    losses, expected = read_metrics(tmp_path / "run"), read_metrics(whole)
    assert losses == expected
    for part in ("model", "ema", "optimizer"):
        name = f"checkpoints/step-000000004/{part}.safetensors"
        ours, theirs = load_file(tmp_path / "run" / name), load_file(whole / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_checkpoint_holds_adapters_alone(lora_run):
    saved = load_file(lora_run / "checkpoints/step-000000004/model.safetensors")
    assert saved
    assert all(".lora_A." in name or ".lora_B." in name for name in saved)
    assert {name.split(".")[0] for name in saved} == {"unet", "text_encoder"}


def test_checkpoint_of_another_base_is_refused(world, lora_run, tmp_path, monkeypatch):
    def changed(config):
        components = pretrained_components(config)
        components.unet.conv_in.weight.data += 1
        return components

    monkeypatch.setattr(setup, "pretrained_components", changed)
    changes = {
        "train__resume": lora_run / "checkpoints/step-000000004",
        "train__max_steps": 5,
    }
    config = finetuning(world, tmp_path / "run", **LORA | changes)
    with pytest.raises(ValueError, match="other weights"):
        train(config)


def states(components, captions: list[str]) -> torch.Tensor:
    from latentdiff.models.text import encode_text, tokenize

    return encode_text(components.text_encoder, tokenize(components.tokenizer, captions))


def open_stock(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["lora", "lora_kohya.safetensors"])
@pytest.mark.parametrize("opened", [open_stock, open_ours])
def test_lora_file_gives_the_merged_folders_image(world, lora_run, name, opened):
    pipe = opened(world / "base" / "pipeline")
    plain = generate(pipe)
    pipe.load_lora_weights(str(lora_run / name))
    found = generate(pipe)
    assert (found - plain).abs().max() > 2 / 255
    assert (found - generate(open_ours(lora_run / "pipeline"))).abs().max() <= 1e-4
    pipe.fuse_lora()
    assert (generate(pipe) - found).abs().max() <= 1e-4


def test_lora_files_tell_other_programs_how_they_were_made(lora_run):
    with safe_open(lora_run / "lora_kohya.safetensors", "pt") as file:
        found = file.metadata()
    assert found["ss_network_module"] == "networks.lora"
    assert found["ss_steps"] == found["ss_max_train_steps"] == "4"
    assert int(found["ss_num_train_images"]) > 0
    assert found["ss_output_name"] == found["modelspec.title"] == lora_run.name
    with safe_open(lora_run / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata()["modelspec.implementation"] == "diffusers"


def test_lora_at_scale_0_is_the_base_bit_for_bit(world, lora_run):
    pipe = open_ours(world / "base" / "pipeline")
    plain = generate(pipe)
    pipe.load_lora_weights(lora_run / "lora")
    assert torch.equal(generate(pipe, lora_scale=0.0), plain)


def test_several_loras_act_with_their_weights(world, lora_run):
    pipe = open_ours(world / "base" / "pipeline")
    plain = generate(pipe)
    pipe.load_lora_weights(lora_run / "lora", adapter_name="one")
    once = generate(pipe)
    pipe.load_lora_weights(lora_run / "lora_kohya.safetensors", adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.75, 0.25])
    both = generate(pipe)
    assert (both - once).abs().max() <= 1e-4  # the same matrices: 3/4 and 1/4 of them are one
    assert torch.equal(generate(pipe, lora_scale=0.0), plain)
    assert torch.equal(generate(pipe), both)  # and the weights are still those


def test_new_token_is_trained_alone(world, word_run):
    moved = changed(world, word_run)
    assert moved == {"text.embeddings.token_embedding.weight"}
    before = parts(world / "base" / "pipeline")["text.embeddings.token_embedding.weight"]
    after = parts(word_run / "pipeline")["text.embeddings.token_embedding.weight"]
    assert len(after) == len(before) + 2
    assert torch.equal(after[: len(before)], before)
    assert not torch.equal(after[-1], after[-2])


def test_learned_embeds_open_in_stock_diffusers(world, word_run):
    assert verify(str(word_run)).is_proven
    stock = open_stock(world / "base" / "pipeline")
    before = generate(stock, "the <pet> on a")
    stock.load_textual_inversion(str(word_run / "learned_embeds.safetensors"))
    found = generate(stock, "the <pet> on a")
    assert (found - before).abs().max() > 0
    ours = open_ours(word_run / "pipeline")
    assert (generate(ours, "the <pet> on a") - found).abs().max() <= 1 / 255
    exported = load_components(word_run / "pipeline")
    spelled = states(exported, ["the <pet> <pet>_1 on a"])
    assert torch.equal(states(exported, ["the <pet> on a"]), spelled)


def test_caption_dropout_of_the_base_is_recorded_after_tuning(world, word_run):
    base = json.loads((world / "base" / "pipeline" / "latentdiff.json").read_text())
    tuned = json.loads((word_run / "pipeline" / "latentdiff.json").read_text())
    assert tuned["caption_dropout"] == 0
    assert tuned["base_caption_dropout"] == base["caption_dropout"] > 0


def test_token_that_no_caption_has_is_refused(world, tmp_path):
    settings = WORD | {"finetune__instance_prompts": "[]"}
    with pytest.raises(ValueError, match="no caption has the token <pet>"):
        train(finetuning(world, tmp_path / "run", **settings))


def test_gradient_checkpointing_leaves_the_token_its_gradient(world, word_run, tmp_path):
    settings = WORD | {"train__gradient_checkpointing": "true"}
    assert train(finetuning(world, tmp_path / "run", **settings)) == 0
    name = "learned_embeds.safetensors"
    found, expected = load_file(tmp_path / "run" / name), load_file(word_run / name)
    torch.testing.assert_close(found["<pet>"], expected["<pet>"])


def test_target_without_a_layer_is_named(world, tmp_path):
    settings = LORA | {"finetune__lora_targets": '["to_q", "to_z"]'}
    with pytest.raises(ValueError, match="'to_z'"):
        train(finetuning(world, tmp_path / "run", **settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"finetune__method": "lora", "model__pretrained": ""}, "needs a model"),
        (LORA | {"train__posthoc_ema_sigma_rel": "[0.1]"}, "posthoc_ema"),
        (WORD | {"finetune__token": "pet"}, "angle brackets"),
        (WORD | {"finetune__initializer_token": ""}, "initializer_token"),
        (WORD | {"train__train_text_encoder": "true"}, "train_text_encoder"),
        ({"finetune__class_prompt": "a dog", "train__batch_size": 1}, "batch_size"),
        (
            {
                "finetune__class_prompt": "a dog",
                "data__buckets": "true",
                "data__bucket_multiple": 8,
            },
            "buckets",
        ),
        ({"finetune__lora_rank": 0}, "lora_rank"),
    ],
)
def test_settings_that_do_not_fit_are_refused(world, tmp_path, settings, said):
    with pytest.raises(ValueError, match=said):
        finetuning(world, tmp_path / "run", **settings)


def test_layers_that_kohyas_scripts_have_no_place_for_are_named():
    layers = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    known = ("mid_block.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv")
    names = [f"unet.{layer}.lora_A.weight" for layer in (*layers, *known)]
    names.append("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight")
    assert layers_unknown_to_kohya(names) == sorted(layers)
