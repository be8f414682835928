"""DoRA and LoKr next to LoRA: what is exported is what was trained, and resumes bit for bit."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from fakes_faults import assert_same_state
from fakes_finetune import finetuning, generate, open_ours, world
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from latentdiff.config.finetune import FinetuneConfig
from latentdiff.models.components import Components, load_components
from latentdiff.models.conditioning import Conditioning
from latentdiff.pipeline.files.kohya_lora import kohya_weights
from latentdiff.pipeline.files.model_info import ModelInfo
from latentdiff.training.finetune import lokr, lora
from latentdiff.training.finetune.initial_weights import InitialWeights
from latentdiff.training.finetune.methods import (
    LoraFacts,
    add_adapters,
    merged_components,
    save_adapters,
)
from latentdiff.training.text_to_image.memory import estimate_activations
from latentdiff.training.text_to_image.model import TextToImage
from latentdiff.training.text_to_image.preview import make_pipeline
from latentdiff.training.text_to_image.train_t2i import train

__all__ = ["world"]
SETTINGS = {
    "finetune__method": "lora",
    "finetune__lora_rank": 2,
    "finetune__lora_alpha": 4,
    "finetune__lora_targets": '["to_q", "to_out.0", "conv1"]',
    "train__learning_rate": 0.02,
    "train__max_steps": 3,
}


def start(world: Path, kind: str) -> Components:
    """Return the base with trained-looking adapters of a kind."""
    components = load_components(world / "base" / "pipeline")
    targets = ("to_q", "to_out.0", "conv1")
    settings = FinetuneConfig(
        "lora", adapter_type=kind, lora_rank=2, lora_alpha=4, lora_targets=targets
    )  # type: ignore[arg-type]
    add_adapters(components, settings, initial=InitialWeights(), text_encoders=(), seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in components.unet.named_parameters():
        if "lora_B" in name or "lokr_w2" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
        if "magnitude" in name:
            parameter.data *= 1 + 0.5 * torch.rand(parameter.shape, generator=generator)
    return components


@pytest.fixture(scope="module", params=["dora", "lokr"])
def run(request: pytest.FixtureRequest, world: Path) -> tuple[str, Path]:
    folder = world / f"run-{request.param}"
    settings = SETTINGS | {"finetune__adapter_type": request.param}
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train(finetuning(world, folder, **settings)) == 0
    return request.param, folder


def test_resume_continues_bitwise_with_adapters_alone(
    world: Path, tmp_path: Path, run: tuple[str, Path]
) -> None:
    kind, whole = run
    settings = SETTINGS | {"finetune__adapter_type": kind}
    for num_steps in (1, 3):
        AcceleratorState._reset_state(reset_partial_state=True)
        changes = {"train__max_steps": num_steps}
        assert train(finetuning(world, tmp_path / "run", **settings | changes)) == 0
    assert_same_state(tmp_path / "run", whole, step=3)
    saved = load_file(whole / "checkpoints" / "step-000000003" / "model.safetensors")
    ends = {"dora": (".lora_A.", ".lora_B.", "magnitude"), "lokr": (".lokr_",)}[kind]
    assert all(any(end in name for end in ends) for name in saved)


def test_dora_trains_convolutions_in_channels_last(world: Path, tmp_path: Path) -> None:
    """As on a GPU by default: peft takes views of the adapter's kernels, rows by columns."""
    changes = {"train__channels_last": True}
    settings = SETTINGS | {"finetune__adapter_type": "dora", "train__max_steps": 1} | changes
    assert train(finetuning(world, tmp_path / "run", **settings)) == 0


@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
def test_merged_model_is_the_one_with_adapters(world: Path, kind: str) -> None:
    components = start(world, kind)
    merged = merged_components(components, "lora")
    found = generate(make_pipeline(components))
    assert (generate(make_pipeline(merged)) - found).abs().max() <= 1e-4
    plain = generate(open_ours(world / "base" / "pipeline"))
    assert (found - plain).abs().max() > 2 / 255
    names = load_components(world / "base" / "pipeline").unet.state_dict().keys()
    assert merged.unet.state_dict().keys() == names


def test_stock_diffusers_gives_the_image_of_the_merged_model(
    world: Path, run: tuple[str, Path]
) -> None:
    kind, folder = run
    stock = StableDiffusionPipeline.from_pretrained(world / "base" / "pipeline")
    plain = generate(stock)
    if kind == "dora":
        stock.load_lora_weights(str(folder / "lora"))
    else:  # which diffusers reads for a U-Net, and not yet for a whole pipeline
        name = "pytorch_lora_weights.safetensors"
        stock.unet.load_lora_adapter(str(folder / "lora"), prefix="unet", weight_name=name)
    found = generate(stock)
    assert (found - plain).abs().max() > 1e-3
    assert (found - generate(open_ours(folder / "pipeline"))).abs().max() <= 1e-4


def lycoris_weight(weight: Tensor, matrices: dict[str, Tensor]) -> Tensor:
    """Return a layer's weight as LyCORIS' formulas have it, from its file's matrices."""
    if "dora_scale" in matrices:
        down, up = matrices["lora_down.weight"], matrices["lora_up.weight"]
        scale = matrices["alpha"] / len(down)
        delta = scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
        dims = list(range(1, weight.ndim))
        norm = torch.linalg.vector_norm(weight + delta, dim=dims, keepdim=True)
        return (weight + delta) * matrices["dora_scale"] / norm
    scale = 1.0
    if "lokr_w2" in matrices:
        w2 = matrices["lokr_w2"]  # (b, d) or (b, d, h, w)
    else:
        w2 = matrices["lokr_w2_a"] @ matrices["lokr_w2_b"]
        scale = float(matrices["alpha"]) / len(matrices["lokr_w2_b"])
    w1 = matrices["lokr_w1"].view(*matrices["lokr_w1"].shape, *[1] * (w2.ndim - 2))
    return weight + scale * torch.kron(w1, w2.contiguous()).reshape(weight.shape)


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_kohya_file_has_the_meaning_it_has_in_lycoris(world: Path, kind: str) -> None:
    components = start(world, kind)
    weights = (
        lokr.lokr_weights(components.unet) if kind == "lokr" else lora.lora_weights(components)
    )
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in kohya_weights(weights).items():
        layer, _, matrix = name.partition(".")
        layers.setdefault(layer, {})[matrix] = tensor
    merged = merged_components(components, "lora").unet
    base = load_components(world / "base" / "pipeline").unet
    seen = 0
    for path, module in base.named_modules():
        if (matrices := layers.get("lora_unet_" + path.replace(".", "_"))) is not None:
            expected = merged.get_submodule(path).weight
            torch.testing.assert_close(lycoris_weight(module.weight, matrices), expected)
            seen += 1
    assert seen == len(layers) > 3


def test_memory_of_a_lokr_is_estimated(world: Path) -> None:
    model = TextToImage(start(world, "lokr"), trains_text_encoder=False).train()

    def inputs() -> tuple[Tensor, Tensor, Conditioning]:
        return torch.empty(1, 4, 8, 8), torch.empty(1), Conditioning(torch.empty(1, 16, 32))

    with lokr.without_drawing(model):
        assert estimate_activations(model, inputs, autocast=nullcontext) > 0
    assert all(layer.training for layer in model.modules())


def test_files_tell_which_library_made_them(run: tuple[str, Path]) -> None:
    kind, folder = run
    with safe_open(folder / "lora_kohya.safetensors", "pt") as file:
        found = file.metadata()
    assert found["ss_network_module"] == "lycoris.kohya"
    arguments = json.loads(found["ss_network_args"])
    assert arguments["algo"] == {"dora": "lora", "lokr": "lokr"}[kind]
    assert found["ss_network_dim"] == "2"


@pytest.mark.parametrize("name", ["lora", "lora_kohya.safetensors"])
def test_our_pipeline_opens_what_was_trained(world: Path, run: tuple[str, Path], name: str) -> None:
    _, folder = run
    ours = open_ours(world / "base" / "pipeline")
    ours.load_lora_weights(folder / name)
    assert (generate(ours) - generate(open_ours(folder / "pipeline"))).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter_type": "lokr", "init_lora": "a"}, "leave one of them out"),
        ({"adapter_type": "lokr", "lokr_factor": 0}, "lokr_factor=0"),
        ({"adapter_type": "lokr", "lora_dropout": 0.1}, "lokr has no dropout"),
        ({"lokr_factor": 4}, "it is for finetune.adapter_type=lokr"),
        ({"adapter_type": "lokr", "train_text_encoder": "true"}, "adapts the U-Net alone"),
        ({"adapter_type": "dora", "method": "full"}, "it is for finetune.method=lora"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    world: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    overrides = {
        f"{'train' if name.startswith('train_') else 'finetune'}__{name}": value
        for name, value in changes.items()
    }
    with pytest.raises(ValueError, match=said):
        finetuning(world, tmp_path / "run", **({"finetune__method": "lora"} | overrides))


def test_dora_goes_on_from_a_dora_alone(world: Path, tmp_path: Path, run: tuple[str, Path]) -> None:
    kind, folder = run
    settings = SETTINGS | {"finetune__init_lora": folder, "train__max_steps": 1}
    if kind == "lokr":
        with pytest.raises(ValueError, match=r"finetune.init_lora: .* is a LoKr"):
            train(finetuning(world, tmp_path / "run", **settings))
        return
    with pytest.raises(ValueError, match=r"is a DoRA: set finetune.adapter_type=dora"):
        train(finetuning(world, tmp_path / "run", **settings))
    AcceleratorState._reset_state(reset_partial_state=True)
    settings |= {"finetune__adapter_type": "dora", "train__learning_rate": 1e-9}
    assert train(finetuning(world, tmp_path / "run", **settings)) == 0
    ours, theirs = (open_ours(one / "pipeline") for one in (tmp_path / "run", folder))
    assert (generate(ours) - generate(theirs)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_no_other_program_is_named_for_a_base_of_an_own_vocabulary(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    settings = FinetuneConfig("lora", adapter_type=kind, lora_rank=2)  # type: ignore[arg-type]
    with caplog.at_level("INFO"):
        facts = LoraFacts(ModelInfo(), "style")
        save_adapters(start(world, kind), settings, tmp_path, facts=facts)
    assert "it fits its own base model only" in caplog.text
    assert "ComfyUI" not in caplog.text
