"""Measure a preview at every step against a step of a U-Net of Stable Diffusion 1's size.

    python benchmarks/preview_latency.py PATH_TO_TAESD

Prints one JSON line. The U-Net has random weights in bf16 and channels_last, and runs a guided
step (batch 2) at 64 x 64 latents; the preview is TAESD's in float32.
"""

import json
import platform
import statistics
import sys
import time
from importlib import resources

import torch
from diffusers import UNet2DConditionModel

from latentdiff.models.components import load_vae
from latentdiff.pipeline.callbacks import preview_images


def seconds(work, *, repeats=5):
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@torch.no_grad()
def main():
    shipped = resources.files("latentdiff") / "assets" / "single_file" / "sd1.json"
    config = json.loads(shipped.read_text(encoding="utf-8"))["unet"]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config, torch_dtype=torch.bfloat16)
    unet = unet.to(torch.bfloat16).to_empty(device="cpu").to(memory_format=torch.channels_last)
    for parameter in unet.parameters():
        parameter.normal_(0, 0.02)
    vae = load_vae(sys.argv[1])
    xt, t = torch.randn(2, 4, 64, 64, dtype=torch.bfloat16), torch.tensor(500)
    prompt_embeds, z0 = torch.randn(2, 77, 768, dtype=torch.bfloat16), torch.randn(1, 4, 64, 64)
    step = seconds(lambda: unet(xt.contiguous(memory_format=torch.channels_last), t, prompt_embeds))
    decode = seconds(lambda: preview_images(vae, z0))
    result = {
        "benchmark": "preview_latency",
        "preview_s": decode,
        "step_s": step,
        "preview_over_step": decode / step,
    }
    result |= {"threads": torch.get_num_threads(), "cpu": platform.processor()}
    print(json.dumps(result | {"torch": torch.__version__}))


if __name__ == "__main__":
    main()
