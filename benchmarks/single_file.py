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
from latentdiff.pipeline.files.single_file import (
    TEXT_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    unet_name,
    vae_name,
)

OPEN_CLIP_PREFIX = "cond_stage_model.model."
OPEN_CLIP_NAMES = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


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
    unet, vae, text = modules["unet"], modules["vae"], modules["text_encoder"]
    found = {
        UNET_PREFIX + unet_name(key, layers=unet.config.layers_per_block): value
        for key, value in unet.state_dict().items()
    }
    levels = len(vae.config.block_out_channels)
    for key, value in vae.state_dict().items():
        is_projection = ".attentions." in key and key.endswith("weight") and value.ndim == 2
        one = value[..., None, None] if is_projection else value  # a 1x1 convolution there
        found[VAE_PREFIX + vae_name(key, levels=levels)] = one
    words = {key.removeprefix("text_model."): value for key, value in text.state_dict().items()}
    words.pop("embeddings.position_ids", None)
    if family == "sd1":
        return found | {TEXT_PREFIX + key: value for key, value in words.items()}
    return found | {OPEN_CLIP_PREFIX + key: value for key, value in open_clip(words).items()}


def open_clip(words: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a CLIP text encoder's weights as OpenCLIP has them: q, k and v in one."""
    found: dict[str, Tensor] = {}
    for key, value in words.items():
        if "k_proj" in key or "v_proj" in key:
            continue
        name = key.replace("self_attn.q_proj.", "attn.in_proj_")
        for ours, theirs in OPEN_CLIP_NAMES.items():
            name = name.replace(ours, theirs)
        if "q_proj" in key:
            three = [words[key.replace("q_proj", f"{kind}_proj")] for kind in "qkv"]
            found[name] = torch.cat(three)
        else:
            found[name] = value
    return found


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
