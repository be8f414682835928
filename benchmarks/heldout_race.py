"""Held-out loss against seconds of training, from noise, on the shapes world: ours and a baseline.

    OMP_NUM_THREADS=1 python benchmarks/heldout_race.py [--minutes 20] [--steps 600] [--decay both]

The baseline does the same as diffusers' text-to-image example: it reads images, encodes them and
their captions at every step, and takes torch.optim.AdamW, here in its better settings
(channels_last, fused). Ours is a run as `latentdiff train` prepares it, and its clock starts before
the folder is read and the caches are built. The two start from equal weights, take the same images
in the same order and have the same VAE, text encoder, batch, peak learning rate, weight decay and
precision; ours has stratified timesteps, a beta2 of 0.99, and Muon in AdamW's place with
--optimizer muon. Its learning rate falls as half a cosine over --steps, where it ends; the
example's is constant, or falls over its minutes with --decay both. Each in a process of its own,
they take turns of a 24th of --minutes; after each turn the loss of the raw weights is measured on
the same (image, timestep, noise) triples, off the clock. With one thread the clock is processor
time.

Prints one JSON line with both curves, [seconds, steps, loss] each. The target is the baseline's
loss at the end; it is reached where it is first met. Both losses are medians of the last three
measurements, for they jump.
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from common import OwnProcess, machine, own_seconds
from train_throughput import HEAD_DIM, TEXT_LAYERS, TEXT_WIDTH, TOKENS, WIDTHS

from latentdiff.config.io import load_config
from latentdiff.config.text_to_image import Config
from latentdiff.cpu.fused_transformers import unfuse_transformers
from latentdiff.data.images import to_pixels
from latentdiff.data.shapes import write_shapes
from latentdiff.diffusion.ddpm import q_sample
from latentdiff.evaluation.metrics.heldout_loss import triple_losses
from latentdiff.image_io import load_image
from latentdiff.models.build import build_text_encoder
from latentdiff.models.text import encode_text, tokenize, train_tokenizer
from latentdiff.models.unet.guidance_embedding import predict
from latentdiff.training.distributed import start_accelerator
from latentdiff.training.text_to_image.setup import setup

TURNS = 24
WARMUP_STEPS = 20
CONFIG = Path(__file__).parents[1] / "configs" / "demo_scratch.yaml"


def make_config(folder: Path, args: argparse.Namespace) -> Config:
    """Write the shapes and a frozen text encoder into folder; return a run's settings."""
    write_shapes(
        folder / "shapes", num_train=args.num_train, num_test=args.num_heldout, size_px=args.px
    )
    lines = (folder / "shapes" / "train" / "metadata.jsonl").read_text().splitlines()
    captions = [json.loads(line)["text"] for line in lines]
    tokenizer = train_tokenizer(captions, vocab_size=640, max_length=TOKENS)
    torch.manual_seed(0)
    text = build_text_encoder(tokenizer, width=TEXT_WIDTH, num_layers=TEXT_LAYERS, num_heads=4)
    text.save_pretrained(folder / "text" / "text_encoder")
    tokenizer.save_pretrained(folder / "text" / "tokenizer")
    settings = {
        "output_dir": folder / "run",
        "data.root": folder / "shapes",
        "data.resolution": args.px,
        "data.cache_dir": folder / "cache",
        "model.text_encoder": folder / "text",
        "model.vae": "latentdiff-mini",
        "model.unet.block_out_channels": list(WIDTHS),
        "model.unet.attention_levels": [True] * len(WIDTHS),
        "model.unet.head_dim": HEAD_DIM,
        "diffusion.zero_terminal_snr": "false",
        "diffusion.prediction_type": "epsilon",
        "diffusion.caption_dropout": 0,
        "train.max_steps": args.steps,
        "train.batch_size": args.batch_size,
        "train.learning_rate": args.rate,
        "train.optimizer": args.optimizer,
        "train.lr_schedule": "cosine",
        "train.lr_warmup_steps": WARMUP_STEPS,
        "train.beta2": 0.99,
        "train.ema": "false",
        "eval.num_heldout": args.num_heldout,
        "preview.num_nearest": 0,
    }
    return load_config(CONFIG, [f"--{name}={value}" for name, value in settings.items()])


class Side:
    """One side of the race: its U-Net, its clock, its curve, and its measurement."""

    def __init__(self):
        self.seconds, self.num_steps, self.curve = 0.0, 0, []
        self.max_steps = math.inf

    def train_until(self, seconds):
        """Take steps until the clock is past `seconds`; return the curve so far."""
        self.unet.train()
        while self.seconds < seconds and self.num_steps < self.max_steps:
            started = own_seconds()
            self.step()
            self.num_steps += 1
            self.seconds += own_seconds() - started
        if self.num_steps > self.curve[-1][1]:
            self.measure()
        return self.curve

    def measure(self):
        """Add the loss on the held-out triples to the curve."""
        unet = self.unet.eval()

        def denoise(zt, t, text):
            with torch.autocast("cpu", torch.bfloat16):
                return predict(unet, zt, t, text)

        losses = triple_losses(
            denoise,
            self.schedule,
            self.triples,
            prediction_type="epsilon",
            device=torch.device("cpu"),
            captions=["true"],
        )
        loss = round(losses["true"].mean().item(), 4)
        self.curve.append((round(self.seconds, 1), self.num_steps, loss))


class Ours(Side):
    """A prepared run, step by step. The file holds the parts that both sides share."""

    def __init__(self, config, file):
        super().__init__()
        self.max_steps = config.train.max_steps
        started = own_seconds()
        accelerator = start_accelerator(config)
        self.run = run = setup(config, Path(config.output_dir), accelerator)
        self.batches = run.train_data.batches(
            run.layout,
            first_step=0,
            last_step=config.train.max_steps,
            accelerator=accelerator,
            seed=config.train.seed,
        )
        self.seconds = own_seconds() - started
        self.unet, self.triples = run.components.unet, run.train_data.heldout_triples
        self.schedule = run.train_step.objective.schedule
        self._write(file)
        self.measure()

    def _write(self, file):
        parts = self.run.components
        unet = copy.deepcopy(parts.unet)
        unfuse_transformers(unet)
        unet.set_default_attn_processor()
        images = [(str(r.path), r.captions[0]) for r in self.run.train_data.train]
        common = {"triples": self.triples, "schedule": self.schedule, "images": images}
        common |= {"unet": unet, "vae": parts.vae, "text_encoder": parts.text_encoder}
        common |= {"tokenizer": parts.tokenizer, "order": self.run.train_data.order}
        torch.save(common | {"settings": self.run.config.train}, file)

    def step(self):
        count = self.run.train_data.order.count(self.num_steps)
        self.run.train_step.step(self.batches, step=self.num_steps, count=count, accumulation=1)


class Baseline(Side):
    """The example's loop, written anew, from the file that a prepared run wrote."""

    def __init__(self, file, decay_seconds):
        """decay_seconds: over which the learning rate falls; infinite: it is constant."""
        super().__init__()
        self.decay_seconds = decay_seconds
        vars(self).update(torch.load(file, weights_only=False))
        for part in (self.unet, self.vae):
            part.to(memory_format=torch.channels_last)
        self.generator = torch.Generator().manual_seed(1)
        decay, rate = self.settings.weight_decay, self.settings.learning_rate
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=rate, weight_decay=decay, fused=True
        )
        self.measure()

    @torch.no_grad()
    def inputs(self):
        """Return latents and prompt embeds of this step's images."""
        paths, captions = zip(
            *(self.images[i] for i in self.order.batch(self.num_steps).indices), strict=True
        )
        pixels = torch.stack([to_pixels(load_image(path)) for path in paths])
        ids = tokenize(self.tokenizer, captions)
        with torch.autocast("cpu", torch.bfloat16):
            moments = self.vae.encode(pixels.contiguous(memory_format=torch.channels_last))
            prompt_embeds = encode_text(self.text_encoder, ids)
        z0 = moments.latent_dist.sample(self.generator) * self.vae.config.scaling_factor
        return z0.float(), prompt_embeds

    def step(self):
        z0, prompt_embeds = self.inputs()
        t = torch.randint(0, self.schedule.num_timesteps, (len(z0),), generator=self.generator)
        eps = torch.randn(z0.shape, generator=self.generator)
        zt = q_sample(self.schedule, z0, t, eps)
        with torch.autocast("cpu", torch.bfloat16):
            output = self.unet(zt, t, prompt_embeds, return_dict=False)[0]
        F.mse_loss(output.float(), eps).backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self.settings.max_grad_norm)
        rise = min(1.0, (self.num_steps + 1) / self.settings.lr_warmup_steps)
        left = (1 + math.cos(math.pi * min(1.0, self.seconds / self.decay_seconds))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * rise * left
        self.optimizer.step()
        self.optimizer.zero_grad()


def smooth(curve, place):
    """Return the median loss of the three measurements up to a place of a curve."""
    return statistics.median(loss for *_, loss in curve[max(0, place - 2) : place + 1])


def result(ours, baseline):
    """Find where our curve reaches the loss that the baseline's curve ends with."""
    target = smooth(baseline, len(baseline) - 1)
    end, end_steps, _ = baseline[-1]
    met = [k for k in range(len(ours)) if smooth(ours, k) <= target]
    seconds, steps = ours[met[0]][:2] if met else (None, None)
    preparation, last, last_steps = ours[0][0], *ours[-1][:2]
    speed = last_steps / (last - preparation)
    return {
        "target_loss": target,
        "baseline_seconds": end,
        "seconds": seconds,
        "share_of_time": round(seconds / end, 3) if met else None,
        "share_of_steps": round(steps / end_steps, 3) if met else None,
        "steps_per_second_ratio": round(speed / (end_steps / end), 3),
        "preparation_seconds": preparation,
    }


def main():
    """Race and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="of the baseline's training")
    parser.add_argument("--steps", type=int, default=600, help="of ours")
    parser.add_argument(
        "--decay", choices=("ours", "both"), default="ours", help="whose learning rate falls"
    )
    parser.add_argument("--px", type=int, default=128)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="of ours")
    parser.add_argument("--num_train", type=int, default=2000)
    parser.add_argument("--num_heldout", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="race-") as name:
        folder, file = Path(name), Path(name) / "equal.pt"
        ours = OwnProcess(Ours, make_config(folder, args), file)
        curves = {"latentdiff": ours.call("train_until", 0)}
        decay_seconds = 60 * args.minutes if args.decay == "both" else math.inf
        baseline = OwnProcess(Baseline, file, decay_seconds)
        for turn in range(1, TURNS + 1):
            seconds = turn / TURNS * args.minutes * 60
            curves["baseline"] = baseline.call("train_until", seconds)
            curves["latentdiff"] = ours.call("train_until", seconds)
        for side in (ours, baseline):
            side.close()
    figures = {
        "benchmark": "heldout_race",
        **result(curves["latentdiff"], curves["baseline"]),
        "curves": curves,
        "settings": vars(args),
    }
    print(json.dumps(figures | machine()))


if __name__ == "__main__":
    main()
