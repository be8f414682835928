"""Open Stable Diffusion 1.x and 2.x models of real size from one file, offline.

    python benchmarks/single_file.py [sd1] [sd2]

Writes a .safetensors file of the family's shapes in CompVis' naming with random fp16 weights (a 2.x
file has OpenCLIP's text encoder, its unused last layer too), opens it with `from_single_file`,
compares every weight, takes one step at 64 px in bf16, and prints one JSON line a family. Needs
about 8 GB of memory and 3 GB of disk, and reads nothing from the network.
"""

import json
import os
import resource
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff import LatentDiffPipeline
from latentdiff.pipeline.files.ldm_names import (
    clip_weights,
    open_clip_weights,
    to_file,
    unet_weights,
    vae_weights,
)

CLIP_PREFIX = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX = "cond_stage_model.model."


def make_modules(family: str) -> dict[str, nn.Module]:
    """Build U-Net, VAE and text encoder of a family; weights are random, in fp16."""
    source = resources.files("latentdiff") / "assets" / "single_file" / f"{family}.json"
    configs = json.loads(source.read_text(encoding="utf-8"))
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
    generator = torch.Generator().manual_seed(0)
    for name, module in modules.items():
        modules[name] = module.to(torch.float16).to_empty(device="cpu")
        for parameter in module.parameters():
            parameter.data.normal_(0, 0.02, generator=generator)
    return modules


def named(modules: dict[str, Any], family: str) -> dict[str, Tensor]:
    """Return the weights by the names of a family's files."""
    text = modules["text_encoder"]
    names, prefix = (
        (clip_weights, CLIP_PREFIX) if family == "sd1" else (open_clip_weights, OPEN_CLIP_PREFIX)
    )
    return (
        to_file(modules["unet"], unet_weights(modules["unet"]))
        | to_file(modules["vae"], vae_weights(modules["vae"]))
        | to_file(text, names(text, prefix=prefix))
    )


def write_file(path: Path, family: str) -> int:
    """Write a whole model of a family; return the number of its U-Net's parameters."""
    modules = make_modules(family)
    weights = named(modules, family)
    if family == "sd2":  # such files hold unused weights too
        last = f"{OPEN_CLIP_PREFIX}transformer.resblocks.22."
        weights |= {
            key.replace(".22.", ".23."): value
            for key, value in list(weights.items())
            if key.startswith(last)
        }
        weights[OPEN_CLIP_PREFIX + "text_projection"] = torch.eye(1024, dtype=torch.float16)
        weights[OPEN_CLIP_PREFIX + "logit_scale"] = torch.tensor(4.6)
    save_file({key: value.clone().contiguous() for key, value in weights.items()}, path)
    return sum(parameter.numel() for parameter in modules["unet"].parameters())


def num_different(path: Path, pipe: LatentDiffPipeline, family: str) -> int:
    """Count the loaded tensors that are not the file's."""
    modules = {name: getattr(pipe, name) for name in ("unet", "vae", "text_encoder")}
    with safe_open(path, "pt") as file:
        return sum(
            not torch.equal(file.get_tensor(key), value)
            for key, value in named(modules, family).items()
        )


def measure(family: str, folder: Path) -> dict[str, Any]:
    """Write, open, compare and generate."""
    path = folder / f"{family}.safetensors"
    num = write_file(path, family)
    started = time.perf_counter()
    pipe = LatentDiffPipeline.from_single_file(path, torch_dtype=torch.float16)
    seconds = time.perf_counter() - started
    different = num_different(path, pipe, family)
    assert different == 0, f"{different} tensors differ"
    pipe.to(torch.bfloat16)
    image = pipe("a red circle", num_inference_steps=1, height=64, width=64, seed=0).images[0]
    return {
        "benchmark": "single_file",
        "family": family,
        "file_gb": round(path.stat().st_size / 1e9, 2),
        "unet_millions": round(num / 1e6, 1),
        "open_seconds": round(seconds, 1),
        "tensors_different": different,
        "image": image.size,
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    for family in sys.argv[1:] or ["sd1", "sd2"]:
        with tempfile.TemporaryDirectory(prefix="single-file-") as folder:
            print(json.dumps(measure(family, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
