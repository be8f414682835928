"""Exports open in programs without diffusers, and give our image; skipped where they are absent.

stable-diffusion.cpp: the package cyllama, whose wheel holds it. It takes Stable Diffusion's sizes
alone, so the file has these, with random weights: 2 GB of disk, 8 GB of memory, minutes on a core.
OpenVINO: an environment of its own, as optimum-intel wants older libraries (docs/formats.md).
"""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff.models.build import build_tiny_vae, make_ddpm_scheduler
from latentdiff.models.model_path import resolve_model
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.files.model_info import ModelInfo
from latentdiff.pipeline.files.single_file import bundled_configs, save_single_file

SEED, SIDE = 42, 64
PERIOD = 1_000_003  # of the random weights, prime: no two rows of a matrix are alike
OPENVINO = """
import sys
import numpy as np
import torch
from optimum.intel import OVStableDiffusionPipeline

folder, scratch = sys.argv[1:]
options = {"export": True, "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
pipe = OVStableDiffusionPipeline.from_pretrained(folder, **options)
latents = torch.from_numpy(np.load(f"{scratch}/latents.npy"))
call = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
np.save(f"{scratch}/image.npy", pipe("a red circle", latents=latents, **call).images[0])
"""


def randomize(module: nn.Module) -> nn.Module:
    """Give a module on "meta" random weights in half precision, in little time."""
    values = 0.02 * torch.randn(PERIOD, generator=torch.Generator().manual_seed(0)).half()
    module = module.half().to_empty(device="cpu").eval()
    for name, weight in module.state_dict().items():
        if weight.ndim == 1:
            weight.fill_(float(name.endswith("weight")))  # norms as they begin, no biases
        elif weight.is_floating_point():
            flat = weight.view(-1)
            flat.copy_(values.repeat(len(flat) // PERIOD + 1)[: len(flat)])
    return module


@pytest.fixture(scope="module")
def sd() -> ModuleType:
    """The bindings of stable-diffusion.cpp."""
    return pytest.importorskip("cyllama.sd", reason="pip install cyllama runs it")


@pytest.fixture(scope="module")
def single_file(sd: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Stable Diffusion 1.5's size in one file, by what `export single-file` calls."""
    configs = bundled_configs("sd1")
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
        }
    parts = {name: randomize(part) for name, part in parts.items()}
    info = {"model_info": ModelInfo(), "stated_info": ModelInfo()}
    pipe = SimpleNamespace(**parts, scheduler=make_ddpm_scheduler(), **info)
    return save_single_file(pipe, tmp_path_factory.mktemp("file") / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["own", "tiny"])
def test_stable_diffusion_cpp_makes_our_image_of_the_single_file(
    sd: ModuleType, single_file: Path, tmp_path: Path, decoder: str
) -> None:
    """At the same seed, timesteps and solver; a tiny VAE takes TAESD's place there."""
    context, vae = sd.SDContextParams(model_path=str(single_file), n_threads=1), None
    context.rng_type = sd.RngType.CPU  # torch's
    if decoder == "tiny":
        vae = build_tiny_vae(factor=8, latent_channels=4)
        vae.decoder.layers[-1].weight.data *= 10  # an image of some contrast
        vae.decoder.layers[-1].bias.data.fill_(0.5)
        vae.save_pretrained(tmp_path)
        context.taesd_path = str(tmp_path / "diffusion_pytorch_model.safetensors")
    call = {"sample_method": sd.SampleMethod.EULER, "scheduler": sd.Scheduler.DISCRETE}
    call |= {"width": SIDE, "height": SIDE, "seed": SEED, "sample_steps": 2, "cfg_scale": 1.0}
    theirs = sd.SDContext(context).generate("a cat", **call)[0].to_numpy()
    pipe = LatentDiffPipeline.from_single_file(single_file)
    pipe.vae = vae or pipe.vae
    pipe.set_scheduler("euler")
    latents = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(SEED))
    steps = {"num_inference_steps": None, "timesteps": [999, 0], "guidance_scale": 1.0}
    ours = pipe("a cat", latents=latents, height=SIDE, width=SIDE, output_type="np", **steps)
    difference = np.abs(255 * ours.images[0] - theirs.astype(float))
    assert theirs.std() > 10  # an image of something
    assert difference.max() < 4
    assert difference.mean() < 0.6


@pytest.mark.slow
def test_openvino_makes_our_image_of_the_bundled_model(tmp_path: Path) -> None:
    python = os.environ.get("OPTIMUM_PYTHON")
    if python is None:
        pytest.skip("set OPTIMUM_PYTHON to a Python with optimum-intel[openvino] to run this")
    assert python != sys.executable, "OPTIMUM_PYTHON is this Python, whose libraries are newer"
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "latents.npy", latents.numpy())
    folder = resolve_model("latentdiff-mini")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python, "-c", OPENVINO, str(folder), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    pipe = LatentDiffPipeline.from_pretrained(folder)
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    ours = pipe("a red circle", latents=latents, **call).images[0]
    assert np.abs(ours - np.load(tmp_path / "image.npy")).max() < 1e-4
