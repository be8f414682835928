"""Fine-tunes that start from a LoRA or an embedding: as sampling with that file loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from fakes_finetune import finetuning, generate, open_ours, world
from fakes_training import read_metrics
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentdiff.config.finetune import FinetuneConfig
from latentdiff.models.components import Components, load_components
from latentdiff.pipeline.files.kohya_lora import kohya_weights, save_lora
from latentdiff.training.finetune import lora
from latentdiff.training.finetune.initial_weights import read_initial_weights
from latentdiff.training.finetune.methods import add_adapters
from latentdiff.training.text_to_image.preview import make_pipeline
from latentdiff.training.text_to_image.train_t2i import train

__all__ = ["world"]
SOURCES = ["lora", "kohya.safetensors", "peft"]
LORA = {"finetune__method": "lora", "train__max_steps": 2}
WORD = {
    "finetune__method": "textual_inversion",
    "finetune__token": "<toy>",
    "finetune__instance_prompts": '["a photo of <toy>"]',
    "diffusion__caption_dropout": 0,
}


def random_lora(base: Components, *, rank: int) -> dict[str, Tensor]:
    """Return a LoRA that changes images, in diffusers' naming; the base gets its adapters."""
    lora.add_lora(
        base, rank=rank, alpha=0, dropout=0, targets=["to_q", "conv1"], seed=0,
        text_encoders=["text_encoder"],
    )  # fmt: skip
    weights = lora.lora_weights(base)
    for name, tensor in weights.items():
        if ".lora_B." in name:
            tensor.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return weights


@pytest.fixture(scope="module")
def files(world: Path) -> Path:
    """The same LoRA as a diffusers folder, a kohya file of alpha 1, and a peft folder of alpha 1.

    And an embedding of two vectors, for diffusers and, without its word, for A1111.
    """
    folder = world / "files"
    weights = random_lora(load_components(world / "base" / "pipeline"), rank=4)
    save_lora(weights, folder / "lora" / "pytorch_lora_weights.safetensors")
    kohya = kohya_weights(weights)
    for name in kohya:
        if name.endswith(".lora_up.weight"):
            kohya[name] = kohya[name] * 4
            kohya[name.replace("lora_up.weight", "alpha")] = torch.tensor(1.0)
    save_lora(kohya, folder / "kohya.safetensors")
    peft = {
        f"base_model.model.{name}": tensor * 4 if ".lora_B." in name else tensor
        for name, tensor in weights.items()
    }
    save_lora(peft, folder / "peft" / "adapter_model.safetensors")
    settings = {"r": 4, "lora_alpha": 1, "peft_type": "LORA"}
    (folder / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    width = load_components(world / "base" / "pipeline").text_encoder.config.hidden_size
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(1))
    save_file({"<word>": vectors}, folder / "learned_embeds.safetensors")
    save_file({"emb_params": vectors}, folder / "a1111.safetensors")
    return folder


def started(world: Path, settings: FinetuneConfig) -> Components:
    components = load_components(world / "base" / "pipeline")
    initial = read_initial_weights(components, settings)
    add_adapters(components, settings, initial=initial, text_encoders=(), seed=3)
    return components


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("alpha", [0, 3])
def test_start_is_the_base_with_the_lora_loaded(
    world: Path, files: Path, source: str, alpha: int
) -> None:
    settings = FinetuneConfig("lora", init_lora=str(files / source), lora_alpha=alpha)
    found = generate(make_pipeline(started(world, settings)))
    ours = open_ours(world / "base" / "pipeline")
    plain = generate(ours)
    ours.load_lora_weights(files / source)
    assert (generate(ours) - plain).abs().max() > 2 / 255
    assert (found - generate(ours)).abs().max() <= 1e-4
    if source == "lora":
        stock = StableDiffusionPipeline.from_pretrained(world / "base" / "pipeline")
        stock.load_lora_weights(files / source)
        assert (found - generate(stock)).abs().max() <= 1e-4


@pytest.mark.parametrize("source", ["learned_embeds.safetensors", "a1111.safetensors"])
def test_start_is_the_base_with_the_embedding_loaded(world: Path, files: Path, source: str) -> None:
    settings = FinetuneConfig(
        "textual_inversion", token="<toy>", init_embedding=str(files / source)
    )
    prompt = "a <toy>"
    found = generate(make_pipeline(started(world, settings)), prompt)
    stock = StableDiffusionPipeline.from_pretrained(world / "base" / "pipeline")
    stock.load_textual_inversion(str(files / source), token="<toy>")
    assert (found - generate(stock, prompt)).abs().max() <= 1e-4


def test_a_run_goes_on_from_the_lora_of_another(world: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    settings = LORA | {"finetune__lora_rank": 3, "train__learning_rate": 0.02}
    settings |= {"eval__every_steps": 1}
    assert train(finetuning(world, first, **settings, train__train_text_encoder="true")) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    again = settings | {"finetune__init_lora": first, "finetune__lora_rank": 8}
    assert train(finetuning(world, second, **again)) == 0
    before, after = (read_metrics(run, "heldout_loss") for run in (first, second))
    assert after[0] == pytest.approx(before[2], abs=1e-6)
    assert abs(after[0] - before[0]) > 1e-4
    with safe_open(second / "lora_kohya.safetensors", "pt") as file:
        assert file.metadata()["ss_network_dim"] == "3"
    old, new = (load_file(run / "lora" / lora.FILE_NAME) for run in (first, second))
    assert old.keys() == new.keys()
    same = {name.split(".")[0] for name in old if torch.equal(old[name], new[name])}
    assert same == {"text_encoder"}  # which was not trained further
    AcceleratorState._reset_state(reset_partial_state=True)
    (first / "lora").rename(tmp_path / "moved")
    (first / "lora").mkdir()
    save_lora({k: v + 1 for k, v in old.items()}, first / "lora" / lora.FILE_NAME)
    with pytest.raises(ValueError, match="trained on other weights"):
        train(finetuning(world, second, **again | {"train__max_steps": 3}))


def test_file_that_cannot_be_the_start_is_refused_with_its_setting(
    world: Path, files: Path, tmp_path: Path
) -> None:
    changes = {"finetune__init_lora": tmp_path / "none.safetensors"}
    with pytest.raises(FileNotFoundError, match=r"finetune.init_lora: .*none.safetensors"):
        train(finetuning(world, tmp_path / "run", **LORA | changes))
    (tmp_path / "old.pt").write_bytes(b"PK\x03\x04")
    changes = {"finetune__init_embedding": tmp_path / "old.pt"}
    with pytest.raises(ValueError, match=r"finetune.init_embedding: .*old.pt is a pickle"):
        train(finetuning(world, tmp_path / "run", **WORD | changes))
    settings = FinetuneConfig("lora", init_lora=str(files / "a1111.safetensors"))
    with pytest.raises(ValueError, match=r"finetune.init_lora: .* is no LoRA"):
        started(world, settings)
    settings = replace(settings, init_lora=str(tmp_path / "wide.safetensors"))
    weights = load_file(files / "lora" / lora.FILE_NAME)
    save_file({k: torch.cat([v, v], 1) for k, v in weights.items()}, settings.init_lora)
    with pytest.raises(ValueError, match=r"finetune.init_lora: .* trained for"):
        started(world, settings)
    with pytest.raises(ValueError, match=r"init_lora=.* has no effect"):
        finetuning(world, tmp_path / "run", finetune__init_lora="a")
