"""Training images a second of a U-Net of Stable Diffusion 1.5's size at 512 px on one GPU.

    python benchmarks/gpu/train.py [--batch_size 16] [--rounds 4] [--out train.json]

Loops take turns in one process, bf16 autocast over float32 weights, AdamW, clipping, EMA: `example`
encodes images and captions at every step, as diffusers' script does, with torch's and diffusers'
defaults; `example_best` is that with channels_last, fused AdamW and diffusers' EMA by foreach;
`plain` is the U-Net's part of that on precomputed latents, without EMA; `latentdiff` is a run's own
step on the same latents. `share_of_peak`: its arithmetic, by torch's count, over that of a large
bf16 product measured here. `host_syncs`: waits of the host for the GPU within our step, aim 0.
"""

import statistics
import sys

import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from sd15 import (
    common,
    counted_syncs,
    make_batch,
    make_components,
    make_train_step,
    parser_of,
    peak_gb,
    run,
    seconds_of,
    step_of,
)
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.diffusion.ddpm import q_sample
from latentdiff.models.build import schedule_of
from latentdiff.models.text import encode_text


class Example:
    """The step of diffusers' train_text_to_image.py, written anew.

    best: in its fastest settings; encodes: images and captions at every step; ema: averages too.
    """

    def __init__(self, args, *, best, encodes, ema):
        self.args, self.encodes = args, encodes
        parts = make_components(tiny=args.tiny, device=args.device)
        self.unet = parts.unet.train()
        self.vae, self.text = parts.vae.bfloat16(), parts.text_encoder.bfloat16()
        for part in (self.vae, self.text):
            part.requires_grad_(False).eval()
        if best:
            self.unet.to(memory_format=torch.channels_last)
            self.vae.to(memory_format=torch.channels_last)
        self.schedule = schedule_of(parts.scheduler).to(args.device, dtype=torch.float32)
        fused = True if best else None
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4, fused=fused)
        self.ema = EMAModel(self.unet.parameters(), foreach=best) if ema else None
        self.batch = make_batch(parts, args.batch_size, tiny=args.tiny, device=args.device)
        px = 8 * self.batch["z0"].shape[-1]
        self.pixels = torch.rand(args.batch_size, 3, px, px, device=args.device) * 2 - 1
        shape = (args.batch_size, parts.tokenizer.model_max_length)
        self.ids = torch.randint(0, 500, shape, device=args.device)

    def inputs(self):
        """Return latents and prompt embeddings."""
        if not self.encodes:
            return self.batch["z0"], self.batch["prompt_embeds"]
        with torch.no_grad():
            z0 = self.vae.encode(self.pixels.bfloat16()).latent_dist.sample()
            return z0.float() * self.vae.config["scaling_factor"], encode_text(self.text, self.ids)

    def step(self):
        """Do one optimiser step."""
        z0, prompt_embeds = self.inputs()
        t = torch.randint(0, 1000, (len(z0),), device=z0.device)
        eps = torch.randn_like(z0)
        zt = q_sample(self.schedule, z0, t, eps)
        with torch.autocast(z0.device.type, torch.bfloat16):
            output = self.unet(zt, t, prompt_embeds, return_dict=False)[0]
        F.mse_loss(output.float(), eps).backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.unet.parameters())


def measure(args):
    """Yield the figures."""
    components = make_components(tiny=args.tiny, device=args.device)
    train_step, _, _ = make_train_step(args, components, f"--train.batch_size={args.batch_size}")
    batch = make_batch(components, args.batch_size, tiny=args.tiny, device=args.device)
    ours = step_of(train_step, batch)
    yield "batch_size", args.batch_size
    yield "peak_gb", peak_gb(args.device, ours)
    with counted_syncs(args.device) as syncs:
        ours()
    yield "host_syncs", len(syncs)
    yield "host_syncs_at", sorted(set(syncs))[:10]
    with FlopCounterMode(display=False) as counter:
        ours()
    tflop = counter.get_total_flops() / 1e12
    seconds = seconds_of(ours, device=args.device)
    peak = common.peak_tflops(size=256 if args.tiny else 8192, device=args.device)
    yield "tflop_per_step", round(tflop, 3)
    yield "peak_tflops", round(peak, 1)
    yield "share_of_peak", round(tflop / seconds / peak, 3)
    loops = {
        "example": Example(args, best=False, encodes=True, ema=True),
        "example_best": Example(args, best=True, encodes=True, ema=True),
        "plain": Example(args, best=True, encodes=False, ema=False),
    }
    steps = {name: loop.step for name, loop in loops.items()} | {"latentdiff": ours}
    works = {
        name: lambda work=work: seconds_of(work, device=args.device) for name, work in steps.items()
    }
    times = common.take_turns(works, rounds=args.rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    yield "step_s", {name: round(value, 4) for name, value in medians.items()}
    yield "images_per_second", {n: round(args.batch_size / s, 2) for n, s in medians.items()}
    for name in loops:
        yield f"ratio_to_{name}", round(medians[name] / medians["latentdiff"], 3)


def main():
    """Take turns and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    return run("train", measure, parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
