"""int8 weights for sampling on a CPU: CPU seconds, memory and error of torchao's and torch's own.

    pip install torchao
    python benchmarks/int8_weights.py mini      # the bundled model, with the error of its images
    python benchmarks/int8_weights.py sd15      # a guided pass of Stable Diffusion 1.5's size

Linear layers are quantised, as neither library has int8 convolutions without calibration. The time
is the processor's, the median of some rounds. mini: 10 guided steps; the images of eight prompts
against those of float32 at the same seeds, mean absolute error of 255 with its 95 % interval, in
pairs with bf16's. sd15: random weights, 64 x 64 latents; the error is that of the pass against
bf16's, relative. One JSON line each.
"""

import argparse
import json
import statistics
import time

import torch
from diffusers import StableDiffusionPipeline
from sample_sd15 import inputs, make_unet
from torch import nn

from latentdiff import LatentDiffPipeline
from latentdiff.evaluation.metrics.bootstrap import bootstrap_difference, bootstrap_mean
from latentdiff.models.model_path import resolve_model

PROMPTS = ["a red circle", "a cat", "a yellow flower", "a green apple"] * 2
CALL = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "pt"}


def weight_only(unet):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(unet, Int8WeightOnlyConfig())
    return unet


def dynamic(unet):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(unet, Int8DynamicActivationInt8WeightConfig())
    return unet


def torch_dynamic(unet):
    return torch.ao.quantization.quantize_dynamic(unet.float(), {nn.Linear}, dtype=torch.qint8)


KINDS = {
    "bf16": (lambda unet: unet, torch.bfloat16),
    "torchao int8 weight-only, bf16": (weight_only, torch.bfloat16),
    "torchao int8 dynamic, bf16": (dynamic, torch.bfloat16),
    "torch quantize_dynamic, float32": (torch_dynamic, torch.float32),
}


def cpu_seconds(work, *, rounds):
    work()
    times = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return round(statistics.median(times), 3)


def megabytes(module):
    """Return the size of a module's weights, those inside tensor subclasses and packed ones too."""

    def size(value):
        if hasattr(value, "__tensor_flatten__"):
            return sum(size(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        if isinstance(value, tuple):
            return sum(map(size, value))
        return value.numel() * value.element_size() if torch.is_tensor(value) else 0

    return round(sum(map(size, module.state_dict().values())) / 1e6, 1)


def images_of(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return pipe(PROMPTS, generator=generators, **CALL).images.float()


def measure_mini():
    wanted, before = images_of(LatentDiffPipeline.from_pretrained("latentdiff-mini")), None
    for name, (quantise, dtype) in KINDS.items():
        pipe = StableDiffusionPipeline.from_pretrained(
            resolve_model("latentdiff-mini"), torch_dtype=dtype
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.unet = quantise(pipe.unet)
        errors = 255 * (images_of(pipe) - wanted).abs().mean((1, 2, 3))
        before = errors if before is None else before
        found, more = bootstrap_mean(errors), bootstrap_difference(errors, before)
        yield {
            "kind": name,
            "cpu_seconds": cpu_seconds(lambda pipe=pipe: pipe("a cat", **CALL), rounds=5),
            "error": [round(x, 2) for x in (found.estimate, found.low, found.high)],
            "error_above_bf16": [round(x, 2) for x in (more.estimate, more.low, more.high)],
            "unet_mb": megabytes(pipe.unet),
        }


def measure_sd15():
    wanted = None
    for name, (quantise, dtype) in KINDS.items():
        if dtype == torch.float32:
            continue  # minutes, for what the smaller model shows
        unet = quantise(make_unet().to(memory_format=torch.channels_last))
        x, t, prompt_embeds = inputs(64)
        given = x.to(dtype, memory_format=torch.channels_last), t, prompt_embeds.to(dtype)
        with torch.inference_mode():
            out = unet(*given).sample.float()
            seconds = cpu_seconds(lambda unet=unet, given=given: unet(*given), rounds=1)
        wanted = out if wanted is None else wanted
        error = (out - wanted).square().mean().sqrt() / wanted.std()
        yield {
            "kind": name,
            "cpu_seconds": seconds,
            "relative_error": round(error.item(), 4),
            "unet_mb": megabytes(unet),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["mini", "sd15"])
    model = parser.parse_args().model
    torch.set_num_threads(1)
    for row in {"mini": measure_mini, "sd15": measure_sd15}[model]():
        print(json.dumps({"benchmark": "int8_weights", "model": model} | row), flush=True)


if __name__ == "__main__":
    main()
