"""Random LoRA files for the tiny model: right strengths, or damage, other kinds, other models."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fakes_lora import ATTENTION, CONVS, TEXT, kohya_file, product
from fakes_pipeline import tiny_pipeline
from fuzz_inputs import FuzzCase
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.pipeline.files.adapter_file import LORA_NAMES, open_adapter
from latentdiff.pipeline.files.lora_layers import lora_layers

NAME = "style.safetensors"
Weights = dict[str, Tensor]


@functools.cache
def pipe() -> Any:
    return tiny_pipeline()


def deltas(path: Path) -> dict[str, Tensor]:
    """Return B A of each layer of a file, as it would act."""
    file = open_adapter(path, names=LORA_NAMES, weight_name=None, subfolder=None)
    models = {"unet": pipe().unet, "text_encoder": pipe().text_encoder}
    found = {}
    for part, weights in lora_layers(file, models).parts.items():
        for name, down in weights.items():
            if name.endswith(".lora_A.weight"):
                layer = name.removesuffix(".lora_A.weight")
                up, weight = weights[f"{layer}.lora_B.weight"], models[part].get_submodule(layer)
                found[layer] = product(up, down, weight.weight)
    return found


def random_strengths(generator: random.Random) -> dict[str, tuple[int, float | None]]:
    layers = generator.sample([*ATTENTION, *CONVS, *TEXT], generator.randint(1, 8))
    alphas = [None, 0.5, 1.0, 4.0, 16.0, -1.0]
    return {path: (generator.randint(1, 8), generator.choice(alphas)) for path in layers}


def valid(generator: random.Random) -> FuzzCase:
    strengths, seed = random_strengths(generator), generator.randrange(1000)
    kind = generator.choice([torch.float32, torch.float16, torch.bfloat16])
    weights = {k: w.to(kind) for k, w in kohya_file(pipe(), strengths, seed=seed).items()}
    is_dotted = generator.random() < 0.3

    def load(folder: Path) -> Any:
        save_file(_dotted(weights) if is_dotted else weights, folder / NAME)
        return deltas(folder / NAME)

    def is_right(found: dict[str, Tensor]) -> bool:
        return found.keys() == strengths.keys() and all(
            torch.allclose(found[path], _expected(weights, path, *strength), atol=1e-5)
            for path, strength in strengths.items()
        )

    return FuzzCase(f"valid {strengths}", load, is_right)


def _flat(path: str) -> str:
    prefix = "lora_te_text_model_" if path.startswith("encoder.") else "lora_unet_"
    return prefix + path.replace(".", "_")


def _dotted(weights: Weights) -> Weights:
    """Name the layers as peft does; alphas keep their matrices' company."""
    paths = {_flat(path): f"base_model.model.{path}" for path in [*ATTENTION, *CONVS, *TEXT]}
    return {f"{paths[k.split('.')[0]]}.{k.split('.', 1)[1]}": w for k, w in weights.items()}


def _expected(weights: Weights, path: str, rank: int, alpha: float | None) -> Tensor:
    up, down = (weights[f"{_flat(path)}.lora_{end}.weight"].float() for end in ("up", "down"))
    part = pipe().text_encoder if path.startswith("encoder.") else pipe().unet
    scale = 1.0 if alpha is None else alpha / rank
    return scale * product(up, down, part.get_submodule(path).weight)


def one_changed(weights: Weights, generator: random.Random) -> Weights:
    """Spoil one entry: its numbers, its shape, its name, or leave it out."""
    key = generator.choice(sorted(k for k in weights if not k.endswith("alpha")))
    tensor = weights.pop(key)
    match generator.randrange(6):
        case 0:
            weights[key] = tensor * torch.nan
        case 1:
            weights[key] = torch.cat([tensor, tensor], dim=1)
        case 2:
            weights[key] = tensor.flatten()
        case 3:
            weights[f"{key}." + generator.choice(["x", "ü", " ", "weight", "\n"])] = tensor
        case 4:
            weights[key.split(".")[0] + generator.choice([".hada_w1_a", ".lokr_w1", ".diff"])] = (
                tensor
            )
        case _:
            pass  # its partner alone is left
    return weights


def one_bad_alpha(weights: Weights, generator: random.Random) -> Weights:
    key = generator.choice(sorted(weights)).split(".")[0]
    weights[f"{key}.alpha"] = generator.choice(
        [torch.tensor(torch.nan), torch.tensor(torch.inf), torch.ones(2), torch.ones(0)]
    )
    return weights


def another_model(weights: Weights, generator: random.Random) -> Weights:
    prefix = generator.choice(["lora_te2_text_model", "transformer.single_transformer_blocks", "x"])
    return {f"{prefix}_{k}": w for k, w in weights.items()}


def spoiled(generator: random.Random) -> FuzzCase:
    change: Callable[[Weights, random.Random], Weights] = generator.choice(
        [one_changed, one_changed, one_bad_alpha, another_model]
    )
    weights = change(kohya_file(pipe(), random_strengths(generator)), generator)

    def load(folder: Path) -> Any:
        save_file(weights, folder / NAME)
        return deltas(folder / NAME)

    return FuzzCase(f"{change.__name__} {sorted(weights)[:6]}", load, named=(NAME,))


def damaged(generator: random.Random) -> FuzzCase:
    place, kind = generator.random(), generator.choice(["cut", "noise", "text", "header"])
    noise = generator.randbytes(generator.randint(0, 200))

    def load(folder: Path) -> Any:
        save_file(kohya_file(pipe(), {ATTENTION[0]: (2, 1.0)}), folder / NAME)
        whole = (folder / NAME).read_bytes()
        contents = {
            "cut": whole[: int(len(whole) * place)],
            "noise": noise,
            "text": b"<!DOCTYPE html><html>" + noise,
            "header": (2**62).to_bytes(8, "little") + whole[8:],
        }
        (folder / NAME).write_bytes(contents[kind])
        return deltas(folder / NAME)

    return FuzzCase(f"{kind} at {place:.3f}", load, named=(NAME,))


def make_case(generator: random.Random) -> FuzzCase:
    """Return a random LoRA file, two of five valid."""
    return generator.choice([valid, valid, spoiled, spoiled, damaged])(generator)
