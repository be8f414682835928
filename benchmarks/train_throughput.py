"""Training images a second against the loop that diffusers' text-to-image example stands for.

    OMP_NUM_THREADS=1 python benchmarks/train_throughput.py [--rounds 5] [--batch_size 16]

Loops, each in a process of its own, take turns on equal images: `baseline` encodes images and
captions at every step and takes torch.optim.AdamW's defaults; `baseline_best` is that with
channels_last and fused AdamW, `baseline_best_kept` that with our setting of malloc too;
`inner_plain` is the U-Net's part of the baseline alone, on precomputed latents and prompt embeds;
`latentdiff` is our training step (clip, check of the gradients, EMA) on the same, in the layout
that is faster on this CPU (contiguous). With one thread, seconds are of processor time. Prints one
JSON line: ratios are medians over rounds. cache_build.py measures our cache, train_step_overhead.py
our reading of data. The baseline does without torch.compile: on one core it takes five minutes.
"""

import argparse
import json
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from common import OwnProcess, machine, medians, own_seconds, peak_tflops, ratio, take_turns
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.device import tune_malloc
from latentdiff.diffusion.ddpm import q_sample
from latentdiff.diffusion.timesteps import SamplingOptions, build_timestep_sampler
from latentdiff.models.build import (
    build_text_encoder,
    build_unet,
    build_vae,
    make_ddpm_scheduler,
    schedule_of,
)
from latentdiff.models.components import Components
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.text import encode_text, train_tokenizer
from latentdiff.training.optim.lr import LRSchedule
from latentdiff.training.text_to_image.model import (
    TextToImage,
    use_fused_transformers,
    use_plain_attention,
)
from latentdiff.training.text_to_image.objective import Objective
from latentdiff.training.text_to_image.train_step import TrainStep

CAPTIONS = ["a red circle on a blue background", "two small green stars"] * 8
RESOLUTION, TOKENS, TEXT_WIDTH, TEXT_LAYERS = 128, 32, 256, 4
WIDTHS, HEAD_DIM = (128, 192, 192), 32
VAE_WIDTHS = (32, 64, 128, 128)


def make_model():
    """Return a 17 M U-Net, a 3.7 M VAE of factor 8, a text encoder of 4 layers."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=640, max_length=TOKENS)
    text = build_text_encoder(tokenizer, width=TEXT_WIDTH, num_layers=TEXT_LAYERS, num_heads=4)
    unet = build_unet(
        sample_size=RESOLUTION // 8,
        in_channels=4,
        block_out_channels=WIDTHS,
        attention_levels=(True,) * len(WIDTHS),
        layers_per_block=1,
        head_dim=HEAD_DIM,
        cross_attention_dim=TEXT_WIDTH,
    ).train()
    vae = build_vae(block_out_channels=VAE_WIDTHS, layers_per_block=1)
    for part in (vae, text):
        part.requires_grad_(False).eval()
    return Components(
        unet=unet, vae=vae, text_encoder=text, tokenizer=tokenizer, scheduler=make_ddpm_scheduler()
    )


class Loop:
    """Equal images and captions, and a step that is timed."""

    def __init__(self, batch_size):
        self.parts = make_model()
        torch.manual_seed(1)
        self.pixels = torch.rand(batch_size, 3, RESOLUTION, RESOLUTION) * 2 - 1
        self.ids = torch.randint(0, 500, (batch_size, TOKENS))

    def encode(self):
        """Return latents and prompt embeds."""
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z0 = self.parts.vae.encode(self.pixels).latent_dist.sample()
            return z0.float(), encode_text(self.parts.text_encoder, self.ids)

    def timed_step(self):
        """Return the seconds of a step."""
        started = own_seconds()
        self.step()
        return own_seconds() - started

    def tflop(self):
        """Return the TFLOP of a step, by torch's count."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops() / 1e12


class PlainLoop(Loop):
    """The example's step, written anew. encodes: at every step, or once."""

    def __init__(self, batch_size, *, best=False, encodes=True, tunes_malloc=False):
        super().__init__(batch_size)
        if tunes_malloc:
            tune_malloc()
        if best:
            for part in (self.parts.unet, self.parts.vae):
                part.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            self.parts.unet.parameters(), lr=1e-4, fused=True if best else None
        )
        self.ready = None if encodes else self.encode()
        self.schedule = schedule_of(self.parts.scheduler).to("cpu", dtype=torch.float32)

    def step(self):
        z0, prompt_embeds = self.ready or self.encode()
        t = torch.randint(0, 1000, (len(z0),))
        eps = torch.randn_like(z0)
        zt = q_sample(self.schedule, z0, t, eps)
        with torch.autocast("cpu", torch.bfloat16):
            output = self.parts.unet(zt, t, prompt_embeds, return_dict=False)[0]
        F.mse_loss(output.float(), eps).backward()
        torch.nn.utils.clip_grad_norm_(self.parts.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class OurLoop(Loop):
    """Our training step on precomputed latents and prompt embeds."""

    def __init__(self, batch_size):
        super().__init__(batch_size)
        parts, (z0, prompt_embeds) = self.parts, self.encode()
        tune_malloc()
        model = TextToImage(parts, trains_text_encoder=False)
        cells = RESOLUTION // 8
        use_plain_attention(parts.unet, num_latent_pixels=cells**2)
        use_fused_transformers(model)
        self.size = size = len(z0)
        self.batch = {
            "z0": z0,
            "prompt_embeds": prompt_embeds.float(),
            "dropped": torch.zeros(size, dtype=torch.bool),
            "stratum": torch.arange(size),
            "weight": torch.ones(size),
            "index": torch.arange(size),
        }
        self.train_step = TrainStep(
            model,
            objective=Objective(
                schedule_of(parts.scheduler).to("cpu", dtype=torch.float32),
                prediction_type="epsilon",
                sample_timesteps=build_timestep_sampler("uniform", SamplingOptions(1000)),
                null_text=Conditioning(prompt_embeds[:1].float()),
            ),
            accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
            lr_schedule=LRSchedule(1e-4, 1e-4, "constant", 0, 1000),
            weight_decay=0.01,
            betas=(0.9, 0.999),
            max_grad_norm=1.0,
            ema_decay=0.999,
            posthoc_ema_sigma_rel=(),
            fp16=False,
            seed=0,
        )

    def step(self):
        sampled = {"eps": torch.randn_like(self.batch["z0"]), "u": torch.rand(self.size).double()}
        self.train_step.step(iter([self.batch | sampled]), step=0, count=self.size, accumulation=1)


def main():
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()
    size = args.batch_size
    loops = {
        "baseline": OwnProcess(PlainLoop, size),
        "baseline_best": OwnProcess(PlainLoop, size, best=True),
        "baseline_best_kept": OwnProcess(PlainLoop, size, best=True, tunes_malloc=True),
        "inner_plain": OwnProcess(PlainLoop, size, encodes=False),
        "latentdiff": OwnProcess(OurLoop, size),
    }
    works = {name: partial(loop.call, "timed_step") for name, loop in loops.items()}
    times = take_turns(works, rounds=args.rounds)
    seconds = medians(times)
    peak, flops = peak_tflops(), loops["inner_plain"].call("tflop")
    for loop in loops.values():
        loop.close()
    figures = {
        "benchmark": "train_throughput",
        "ratio_to_baseline": ratio(times, "baseline", "latentdiff"),
        "ratio_to_baseline_best": ratio(times, "baseline_best", "latentdiff"),
        "ratio_to_baseline_best_kept": ratio(times, "baseline_best_kept", "latentdiff"),
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
