"""Training images a second against the loop that diffusers' text-to-image example stands for.

    OMP_NUM_THREADS=1 python benchmarks/train_throughput.py [--rounds 5] [--batch_size 16]

Four loops take turns on equal pictures: `baseline` encodes pictures and captions at every step and
takes torch.optim.AdamW as it comes; `baseline_best` is that with channels_last and fused AdamW;
`inner_plain` is the U-Net's part of the baseline alone, on latents and text states that lie ready;
`latentdiff` is the training engine (clip, masked update, EMA) on the same. Prints one JSON line:
ratios are medians over rounds. The cache that the engine reads from is measured in cache_build.py,
its supply of data in engine_overhead.py. torch.compile is left out of the baseline: on one core it
takes five minutes.
"""

import argparse
import json

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from common import machine, medians, peak_tflops, ratio, take_turns
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.build import (
    build_text_encoder,
    build_unet,
    build_vae,
    make_scheduler,
    schedule_of,
)
from latentdiff.diffusion.ddpm import q_sample
from latentdiff.models import Components
from latentdiff.text import encode_text, train_tokenizer
from latentdiff.training.components import TextToImage, take_large_steps, use_plain_attention
from latentdiff.training.engine import Engine, Objective, RatePlan

CAPTIONS = ["a red circle on a blue background", "two small green stars"] * 8
RESOLUTION, TOKENS, TEXT_WIDTH = 128, 32, 256


def make_model():
    """Return a 17 M U-Net, a 3.7 M VAE of factor 8, a text tower of 4 layers."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=640, max_length=TOKENS)
    text = build_text_encoder(tokenizer, width=TEXT_WIDTH, num_layers=4, num_heads=4)
    unet = build_unet(
        sample_size=RESOLUTION // 8,
        in_channels=4,
        block_out_channels=(128, 192, 192),
        attention_levels=(True, True, True),
        layers_per_block=1,
        head_dim=32,
        cross_attention_dim=TEXT_WIDTH,
    ).train()
    vae = build_vae(block_out_channels=(32, 64, 128, 128), layers_per_block=1)
    for part in (vae, text):
        part.requires_grad_(False).eval()
    return Components(
        unet=unet, vae=vae, text_encoder=text, tokenizer=tokenizer, scheduler=make_scheduler()
    )


class PlainLoop:
    """The example's step in our own words. ready: latents and text states, or encode each time."""

    def __init__(self, pixels, ids, *, best, ready=None):
        self.parts = make_model()
        if best:
            for part in (self.parts.unet, self.parts.vae):
                part.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            self.parts.unet.parameters(), lr=1e-4, fused=True if best else None
        )
        self.pixels, self.ids, self.ready = pixels, ids, ready
        self.schedule = schedule_of(self.parts.scheduler).to("cpu", dtype=torch.float32)

    def inputs(self):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z0 = self.parts.vae.encode(self.pixels).latent_dist.sample()
            return z0.float(), encode_text(self.parts.text_encoder, self.ids)

    def step(self):
        z0, states = self.ready or self.inputs()
        t = torch.randint(0, 1000, (len(z0),))
        eps = torch.randn_like(z0)
        zt = q_sample(self.schedule, z0, t, eps)
        with torch.autocast("cpu", torch.bfloat16):
            output = self.parts.unet(zt, t, states, return_dict=False)[0]
        F.mse_loss(output.float(), eps).backward()
        torch.nn.utils.clip_grad_norm_(self.parts.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class OurLoop:
    """The training engine on latents and text states that lie ready."""

    def __init__(self, ready):
        parts = make_model()
        model = TextToImage(parts, learns_text=False)
        cells = RESOLUTION // 8
        use_plain_attention(parts.unet, num_cells=cells**2)
        take_large_steps(model)
        z0, states = ready
        self.size = size = len(z0)
        self.batch = {
            "z0": z0,
            "text": states.float(),
            "dropped": torch.zeros(size, dtype=torch.bool),
            "place": torch.arange(size),
            "weight": torch.ones(size),
            "index": torch.arange(size),
        }
        self.engine = Engine(
            model,
            objective=Objective(
                schedule_of(parts.scheduler).to("cpu", dtype=torch.float32),
                prediction_type="epsilon",
                null_text=states[:1].float(),
            ),
            accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
            rates=RatePlan(1e-4, 1e-4, "constant", 0, 1000),
            weight_decay=0.01,
            betas=(0.9, 0.999),
            max_grad_norm=1.0,
            ema_decay=0.999,
            power_ema=(),
            fp16=False,
            seed=0,
        )

    def step(self):
        drawn = {"eps": torch.randn_like(self.batch["z0"]), "u": torch.rand(self.size).double()}
        self.engine.step(iter([self.batch | drawn]), step=0, count=self.size, accumulation=1)


def main():
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()
    pixels = torch.rand(args.batch_size, 3, RESOLUTION, RESOLUTION) * 2 - 1
    ids = torch.randint(0, 500, (args.batch_size, TOKENS))
    baseline = PlainLoop(pixels, ids, best=False)
    ready = baseline.inputs()
    inner = PlainLoop(pixels, ids, best=False, ready=ready)
    loops = {
        "baseline": baseline,
        "baseline_best": PlainLoop(pixels, ids, best=True),
        "inner_plain": inner,
        "latentdiff": OurLoop(ready),
    }
    times = take_turns({name: loop.step for name, loop in loops.items()}, rounds=args.rounds)
    seconds = medians(times)
    with FlopCounterMode(display=False) as counter:
        inner.step()
    peak, flops = peak_tflops(), counter.get_total_flops() / 1e12
    figures = {
        "benchmark": "train_throughput",
        "ratio_to_baseline": ratio(times, "baseline", "latentdiff"),
        "ratio_to_baseline_best": ratio(times, "baseline_best", "latentdiff"),
        "ratio_inner": ratio(times, "inner_plain", "latentdiff"),
        "images_per_second": {k: round(args.batch_size / s, 2) for k, s in seconds.items()},
        "step_s": seconds,
        "tflop_per_step": round(flops, 4),
        "peak_tflops": round(peak, 3),
        "share_of_peak": round(flops / seconds["latentdiff"] / peak, 3),
        "settings": vars(args),
    }
    print(json.dumps(figures | machine()))


if __name__ == "__main__":
    main()
