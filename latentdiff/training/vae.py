"""Train an AutoencoderKL: L1 + L2 + KL on random crops (Rombach et al. 2022, Appendix G).

Crops are taken at a random scale between the picture's own and the one where its shorter side just
fills the crop, so one VAE serves several resolutions. The EMA weights are what is saved, with the
scalar scaling measured on training crops. Held-out PSNR is reported over whole pictures.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from latentdiff.config_file import to_yaml
from latentdiff.config_vae import VaeConfig
from latentdiff.data.folder import Folder, read_folder
from latentdiff.data.images import load_image, resize_and_crop, to_pixels
from latentdiff.latents import LatentCodec, measure_latents, set_scalar_scaling
from latentdiff.models import build_vae, load_vae

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def train_vae(config: VaeConfig) -> dict[str, float]:
    """Train, save `output_dir`/vae and `output_dir`/metrics.json, and return the figures.

    ValueError when there is no picture to train on or the loss is no number any more.
    """
    folders = [_read(root) for root in config.roots]
    if not folders or not any(len(folder.split("train")) for folder in folders):
        raise ValueError(f"roots={list(config.roots)} hold no training pictures; give --roots")
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(to_yaml(config))
    torch.manual_seed(config.seed)
    accelerator = Accelerator(mixed_precision=MIXED[config.precision])
    vae = _start(config)
    if config.channels_last:
        vae.to(memory_format=torch.channels_last)
    crops = Crops([f.split("train") for f in folders], config.resolution, seed=config.seed)
    average, steps = _optimise(vae, crops, config, accelerator)
    codec = LatentCodec(average)
    batches = (batch for _, batch in zip(range(20), crops.loader(config, start=0), strict=False))
    with torch.no_grad():
        set_scalar_scaling(average, measure_latents(codec, (b.to(average.device) for b in batches)))
    report = {"steps": float(steps), "scaling_factor": codec.scale}
    for root, folder in zip(config.roots, folders, strict=True):
        if len(held_out := folder.held_out()):
            name = Path(root).name
            report[f"psnr_db/{name}"] = held_out_psnr(codec, held_out, resolution=config.resolution)
    if accelerator.is_main_process:
        saved = average.to(torch.float16 if config.save_dtype == "fp16" else torch.float32)
        saved.to(memory_format=torch.contiguous_format).save_pretrained(output / "vae")
        (output / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def vae_loss(
    reconstruction: Tensor, pixels: Tensor, kl: Tensor, *, l2_weight: float, kl_weight: float
) -> Tensor:
    """Return mean |error| + l2_weight * mean error^2 + kl_weight * mean over pictures of their KL.

    reconstruction, pixels: (B, 3, H, W); kl: (B,), in nats, summed over each latent.
    """
    error = reconstruction.float() - pixels
    return error.abs().mean() + l2_weight * error.square().mean() + kl_weight * kl.mean()


def psnr(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each picture: (B, 3, H, W) in [-1, 1]."""
    error = F.mse_loss(reconstruction.clamp(-1, 1), pixels, reduction="none").mean((1, 2, 3))
    return 10 * torch.log10(4.0 / error.clamp_min(1e-10))  # the peak-to-peak range is 2


@torch.no_grad()
def held_out_psnr(
    codec: LatentCodec, folder: Folder, *, resolution: int, max_images: int = 256
) -> float:
    """Return the mean PSNR in dB over centre crops of at most `max_images` pictures."""
    values = []
    for index in range(min(len(folder), max_images)):
        image = load_image(BytesIO(folder.read_bytes(index)))
        crop = resize_and_crop(image, height=resolution, width=resolution)
        pixels = to_pixels(crop.image)[None].to(codec.vae.device)
        values.append(psnr(codec.decode(codec.encode(pixels)), pixels).item())
    return float(np.mean(values))


@dataclass(frozen=True)
class Crops(Dataset[Tensor]):
    """Random square crops of the pictures of several folders; item k is a function of (seed, k)."""

    folders: list[Folder]
    resolution: int
    seed: int

    def __getitem__(self, k: int) -> Tensor:
        """Return the k-th crop of the run, (3, H, W) in [-1, 1]; folders take turns evenly."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, k]))
        folder = self.folders[k % len(self.folders)]
        image = load_image(BytesIO(folder.read_bytes(int(rng.integers(len(folder))))))
        room = min(image.size) / self.resolution  # how much smaller the picture may be made
        side = round(min(image.size) / max(1.0, rng.uniform(1.0, max(1.0, room))))
        whole = resize_and_crop(
            image,
            height=max(self.resolution, round(image.height * side / min(image.size))),
            width=max(self.resolution, round(image.width * side / min(image.size))),
        ).image
        y, x = (int(rng.integers(n - self.resolution + 1)) for n in (whole.height, whole.width))
        cut = whole.crop((x, y, x + self.resolution, y + self.resolution))
        pixels = to_pixels(cut)
        return pixels.flip(-1) if rng.random() < 0.5 else pixels

    def loader(self, config: VaeConfig, *, start: int) -> Iterator[Tensor]:
        """Yield batches (B, 3, H, W) from step `start` on, without end."""
        order = _Counting(start * config.batch_size)
        loader = DataLoader(
            self,
            config.batch_size,
            sampler=order,
            num_workers=config.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)


class _Counting(Sampler[int]):
    """0, 1, 2, ... from `start`."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        k = self.start
        while True:
            yield k
            k += 1


def _start(config: VaeConfig) -> AutoencoderKL:
    """Load the VAE to go on from, or build a new one."""
    if config.pretrained:
        vae = load_vae(config.pretrained)
        if not isinstance(vae, AutoencoderKL):
            raise ValueError(
                f"pretrained={config.pretrained} is a {type(vae).__name__}, expected AutoencoderKL"
            )
        return vae.train()
    return build_vae(
        block_out_channels=config.block_out_channels,
        latent_channels=config.latent_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        sample_size=config.resolution,
    )


def _optimise(
    vae: AutoencoderKL, crops: Crops, config: VaeConfig, accelerator: Accelerator
) -> tuple[AutoencoderKL, int]:
    """Run the training loop; return the EMA model and the number of steps."""
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3
    )
    model, optimizer = accelerator.prepare(vae, optimizer)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    started, losses, steps = time.monotonic(), [], 0
    bar = tqdm(range(config.max_steps), disable=not accelerator.is_main_process, unit="step")
    with (Path(config.output_dir) / "metrics.jsonl").open("a") as log:
        for step, pixels in zip(bar, crops.loader(config, start=0), strict=False):
            progress = _progress(step, config, minutes=(time.monotonic() - started) / 60)
            if progress >= 1.0:
                break
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _rate(step, progress, config.warmup_steps)
            loss = _step(model, pixels.to(accelerator.device), config, accelerator)
            accelerator.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(vae)
            losses.append(loss)
            steps = step + 1
            if steps % config.log_every_steps == 0:
                mean = torch.stack(losses).mean().item()
                if not np.isfinite(mean):
                    raise ValueError(f"the loss is {mean} at step {steps}; lower --learning_rate")
                log.write(json.dumps({"step": steps, "loss": mean}) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{mean:.4f}")
                losses = []
    averaged: AutoencoderKL = average.module
    return averaged.eval(), steps


def _step(
    model: torch.nn.Module, pixels: Tensor, config: VaeConfig, accelerator: Accelerator
) -> Tensor:
    """Compute the loss of one batch and its gradients; return the loss, detached."""
    if config.channels_last:
        pixels = pixels.to(memory_format=torch.channels_last)
    vae = accelerator.unwrap_model(model)
    with accelerator.autocast():
        posterior = vae.encode(pixels).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
    loss = vae_loss(
        reconstruction,
        pixels,
        posterior.kl(),
        l2_weight=config.l2_weight,
        kl_weight=config.kl_weight,
    )
    accelerator.backward(loss)
    return loss.detach()


def _progress(step: int, config: VaeConfig, *, minutes: float) -> float:
    """Return how much of the run is done, in [0, 1], by steps or by time, whichever is further."""
    by_time = minutes / config.max_minutes if config.max_minutes else 0.0
    return max(step / config.max_steps, by_time)


def _rate(step: int, progress: float, warmup_steps: int) -> float:
    """Return the learning rate's factor: a linear warm-up, then a cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    return warm * float(0.5 * (1.0 + np.cos(np.pi * min(1.0, progress))))


def _read(root: str) -> Folder:
    folder = read_folder(root, missing_caption="empty")
    folder.check(max_bad_fraction=0.02)
    return folder
