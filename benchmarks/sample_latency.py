"""Seconds of a 20-step call against StableDiffusionPipeline on the same folder, seed and sampler.

    OMP_NUM_THREADS=1 python benchmarks/sample_latency.py [MODEL] [--batch_sizes 1,16] [--rounds 3]

Calls take turns: the stock pipeline as it comes (float32) and in channels_last, both in bf16 too,
ours in float32 and bf16 with `fast_cpu.is_on`. Without MODEL a model of the demo's size with
random weights is made. Prints one JSON line a batch size. Seconds are the process' CPU time, which
on one thread is what the clock shows on an idle machine, and stays so next to other jobs.
`error_255`: the largest difference of ours to the stock image in float32; `bf16_error_ratio`:
mean error of our bf16 images to the float32 ones over that of the stock bf16 images, to be
below 1.1, over 16 seeds of each of four prompts, with `bf16_error_interval` its 95 % bootstrap
interval over the images, generated 16 at once. `two_passes`: the time of a pass for each caption
over that of one pass for both, in our bf16. Several pipelines in one process fill oneDNN's cache of
kernels: set ONEDNN_PRIMITIVE_CACHE_CAPACITY=8192.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict

import numpy as np
import torch
from common import machine, medians, ratio
from diffusers import StableDiffusionPipeline

from latentdiff import LatentDiffPipeline
from latentdiff.cli.command import quieten_libraries
from latentdiff.cpu.fast_sampling import FastCPU
from latentdiff.models.build import build_text_encoder, build_unet, make_ddpm_scheduler
from latentdiff.models.components import load_vae
from latentdiff.models.model_path import BUNDLED
from latentdiff.models.text import train_tokenizer

PROMPT = "a large red star on a pink background"
ERROR_PROMPTS = [PROMPT, "a red heart", "a cat", "a small blue circle on a white background"]
ERROR_SEEDS = 16


def save_demo_size(folder):
    """Write a model of the demo's size; its images are noise."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([PROMPT], vocab_size=640, max_length=20)
    unet = build_unet(
        sample_size=8,
        in_channels=8,
        block_out_channels=(64, 128),
        attention_levels=(True, True),
        layers_per_block=1,
        head_dim=32,
        cross_attention_dim=128,
    )
    StableDiffusionPipeline(
        unet=unet.eval(),
        vae=load_vae(BUNDLED["latentdiff-vae"]),
        text_encoder=build_text_encoder(tokenizer, width=128, num_layers=2, num_heads=4).eval(),
        tokenizer=tokenizer,
        scheduler=make_ddpm_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def open_all(folder):
    """Return the pipelines by name."""
    dtypes = {"": torch.float32, "_bf16": torch.bfloat16}
    pipelines = {}
    for suffix, dtype in dtypes.items():
        for name in (f"stock{suffix}", f"stock{suffix}_cl"):
            pipelines[name] = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
        for part in (pipelines[name].unet, pipelines[name].vae):
            part.to(memory_format=torch.channels_last)
        pipelines[f"ours{suffix}"] = LatentDiffPipeline.from_pretrained(folder, torch_dtype=dtype)
        pipelines[f"ours{suffix}"].fast_cpu.is_on = True
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def take_cpu_turns(works, *, rounds):
    """Return the CPU seconds of each call of each work (by name), one call of each a round."""
    times = defaultdict(list)
    for number in range(1 + rounds):
        for name, work in works.items():
            started = time.process_time()
            work()
            if number > 0:
                times[name].append(time.process_time() - started)
    return times


def generate(pipeline, size, *, steps, prompt=PROMPT):
    """Return images (B, H, W, 3) in [0, 1]."""
    generators = [torch.Generator().manual_seed(k) for k in range(size)]
    return pipeline(
        [prompt] * size,
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=generators,
        output_type="np",
    ).images


def error_ratio(pipelines, *, steps):
    """Return how much farther our bf16 images are from float32 than stock's, and its interval."""
    gaps = {"stock_bf16": [], "ours_bf16": []}
    for prompt in ERROR_PROMPTS:
        exact = generate(pipelines["stock"], ERROR_SEEDS, steps=steps, prompt=prompt)
        for name, found in gaps.items():
            images = generate(pipelines[name], ERROR_SEEDS, steps=steps, prompt=prompt)
            found.append(np.abs(images - exact).mean((1, 2, 3)))
    stock, ours = (np.concatenate(found) for found in gaps.values())
    picks = np.random.default_rng(0).integers(len(stock), size=(2000, len(stock)))
    ratios = ours[picks].sum(1) / stock[picks].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return round(float(ours.sum() / stock.sum()), 3), [round(float(low), 3), round(float(high), 3)]


def fast_pass(fast, unet, x, t, prompt_embeds):
    """Return the U-Net's output of x (B, C, h, w), sped up by `fast`."""
    with fast.speed_up(unet, x):
        return unet(x, t, encoder_hidden_states=prompt_embeds, return_dict=False)[0]


@torch.no_grad()
def two_passes(pipeline, size, *, rounds=9):
    """Return the seconds of a pass for each caption over those of one pass for both."""
    unet = pipeline.unet
    latent_size, width = unet.config.sample_size, unet.config.cross_attention_dim
    x = torch.randn(size, unet.config.in_channels, latent_size, latent_size, dtype=unet.dtype)
    tokens = pipeline.tokenizer.model_max_length
    prompt_embeds, t = torch.randn(2 * size, tokens, width, dtype=unet.dtype), torch.tensor(500)
    whole, *parts = (FastCPU() for _ in range(3))
    for fast in (whole, *parts):
        fast.is_on = True
    both = torch.cat([x, x])
    works = {
        "one": lambda: fast_pass(whole, unet, both, t, prompt_embeds),
        "two": lambda: [
            fast_pass(fast, unet, x, t, own)
            for fast, own in zip(parts, prompt_embeds.chunk(2), strict=True)
        ],
    }
    return ratio(take_cpu_turns(works, rounds=rounds), "two", "one")


def main():
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--batch_sizes", default="1,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    quieten_libraries()
    scratch = tempfile.TemporaryDirectory(prefix="sample-latency-")
    pipelines = open_all(args.model or save_demo_size(scratch.name))
    error, interval = error_ratio(pipelines, steps=args.steps)
    for size in map(int, args.batch_sizes.split(",")):
        images = {}

        def work(name, size=size, images=images):
            images[name] = generate(pipelines[name], size, steps=args.steps)

        works = {name: lambda name=name: work(name) for name in pipelines}
        times = take_cpu_turns(works, rounds=args.rounds)
        seconds = medians(times)
        names = [name for name in pipelines if name.startswith("stock")]
        best_stock = min(names, key=seconds.get)
        best_ours = min(("ours", "ours_bf16"), key=seconds.get)
        figures = {
            "benchmark": "sample_latency",
            "batch_size": size,
            "ratio_float32": ratio(times, "stock", "ours"),
            "ratio_bf16": ratio(times, "stock_bf16", "ours_bf16"),
            "ratio_to_default": ratio(times, "stock", best_ours),
            "ratio_to_best": ratio(times, best_stock, best_ours),
            "best": [best_stock, best_ours],
            "cpu_seconds": seconds,
            "error_255": round(float(np.abs(images["ours"] - images["stock"]).max()) * 255, 4),
            "bf16_error_ratio": error,
            "bf16_error_interval": interval,
            "bf16_error_images": ERROR_SEEDS * len(ERROR_PROMPTS),
            "model": "given" if args.model else "demo size, random weights",
            "two_passes": two_passes(pipelines["ours_bf16"], size),
            "steps": args.steps,
        }
        print(json.dumps(figures | machine()), flush=True)


if __name__ == "__main__":
    main()
