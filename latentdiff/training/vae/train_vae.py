"""Train an AutoencoderKL on random crops (Rombach et al. 2022, Appendix G).

Crops are taken at a random scale between the image's own and the one where its shorter side just
fills the crop, so one VAE serves several resolutions. The EMA weights are what is saved, with the
scalar scaling measured on training crops. Held-out PSNR is reported over whole images.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from latentdiff.config.io import to_yaml
from latentdiff.config.vae import VaeConfig
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.data.images import resize_and_crop, to_pixels
from latentdiff.evaluation.metric_nets import load_mobilenet
from latentdiff.image_io import load_image
from latentdiff.models.build import build_vae
from latentdiff.models.components import load_vae
from latentdiff.models.latents import LatentCodec, latent_stats, set_scalar_scaling
from latentdiff.training.distributed import single_process_accelerator
from latentdiff.training.metrics_log import LossLog
from latentdiff.training.optim.lr import TimedRate
from latentdiff.training.vae.pca import keep_principal
from latentdiff.training.vae.reconstruction_report import heldout_report
from latentdiff.training.vae.vae_step import VaeTrainStep


def train_vae(config: VaeConfig) -> dict[str, float]:
    """Train; save `output_dir`/vae, metrics.json and a sheet; return the figures.

    ValueError when there is no image to train on, or the loss is no number any more.
    """
    folders = [_read(root) for root in config.roots]
    if not folders or not any(len(folder.split("train")) for folder in folders):
        raise ValueError(f"roots={list(config.roots)} hold no training images; give --roots")
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(to_yaml(config))
    torch.manual_seed(config.seed)
    accelerator = single_process_accelerator(config.mixed_precision)
    crops = Crops([f.split("train") for f in folders], config.resolution, seed=config.seed)
    vae = _initial_vae(config, crops).to(accelerator.device)
    if config.channels_last:
        vae.to(memory_format=torch.channels_last)
    average, steps = _train_steps(vae, crops, config, accelerator)
    codec = LatentCodec(average)
    if config.train_part == "all":
        with torch.no_grad():
            pixels = (batch.to(average.device) for batch in crops.some(config))
            set_scalar_scaling(average, latent_stats(codec, pixels))
    report = {"steps": float(steps), "scaling_factor": codec.scale}
    network = load_mobilenet(config.features).to(average.device) if config.features else None
    if accelerator.is_main_process:
        for root, folder in zip(config.roots, folders, strict=True):
            if len(heldout := folder.heldout()):
                name = Path(root).name
                found = heldout_report(
                    codec,
                    heldout,
                    resolution=config.resolution,
                    network=network,
                    sheet=output / f"reconstructions_{name}.png",
                )
                report |= {f"{key}/{name}": value for key, value in found.items()}
        saved = average.to(torch.float16 if config.save_dtype == "fp16" else torch.float32)
        saved.to(memory_format=torch.contiguous_format).save_pretrained(output / "vae")
        (output / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


@dataclass(frozen=True)
class Crops(Dataset[Tensor]):
    """Random square crops of the images of several folders; item k is a function of (seed, k)."""

    folders: list[Folder]
    resolution: int
    seed: int

    def __getitem__(self, k: int) -> Tensor:
        """Return the k-th crop of the run, (3, H, W) in [-1, 1]; folders take turns evenly."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, k]))
        folder = self.folders[k % len(self.folders)]
        image = load_image(BytesIO(folder.read_bytes(int(rng.integers(len(folder))))))
        room = min(image.size) / self.resolution  # how much smaller the image may be made
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

    def some(self, config: VaeConfig) -> Iterator[Tensor]:
        """Yield the first twenty batches, to measure latents on."""
        return (batch for _, batch in zip(range(20), self.loader(config, start=0), strict=False))


class _Counting(Sampler[int]):
    """0, 1, 2, ... from `start`."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        k = self.start
        while True:
            yield k
            k += 1


def _initial_vae(config: VaeConfig, crops: Crops) -> AutoencoderKL:
    """Load the VAE to go on from, or build a new one; freeze what does not learn."""
    if not config.pretrained:
        if config.train_part != "all" or config.pca_channels:
            raise ValueError(
                "train_part=decoder and pca_channels need --pretrained, a VAE to go on from"
            )
        return build_vae(
            block_out_channels=config.block_out_channels,
            latent_channels=config.latent_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            sample_size=config.resolution,
        )
    vae = load_vae(config.pretrained)
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(
            f"pretrained={config.pretrained} is a {type(vae).__name__}, expected AutoencoderKL"
        )
    if config.pca_channels:
        vae = keep_principal(vae, crops.some(config), config.pca_channels)
    if config.train_part == "decoder":
        vae.requires_grad_(False)
        for part in (vae.decoder, vae.post_quant_conv):
            if part is not None:
                part.requires_grad_(True)
    return vae.train()


def _train_steps(
    vae: AutoencoderKL, crops: Crops, config: VaeConfig, accelerator: Accelerator
) -> tuple[AutoencoderKL, int]:
    """Run the training loop; return the EMA model and the number of steps."""
    objective = VaeTrainStep(vae, config, accelerator)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    rates = TimedRate(
        config.learning_rate,
        lr_warmup_steps=config.lr_warmup_steps,
        max_steps=config.max_steps,
        max_minutes=config.max_minutes,
    )
    steps = 0
    bar = tqdm(range(config.max_steps), disable=not accelerator.is_main_process, unit="step")
    log = LossLog(config.output_dir, every_steps=config.log_every_steps, bar=bar)
    for step, pixels in zip(bar, crops.loader(config, start=0), strict=False):
        if (rate := rates.at(step)) is None:
            break
        losses = objective.step(pixels.to(accelerator.device), step=step, rate=rate)
        average.update_parameters(vae)
        steps = step + 1
        log.add(steps, losses)
    averaged: AutoencoderKL = average.module
    return averaged.eval(), steps


def _read(root: str) -> Folder:
    folder = read_folder(root, missing_caption="empty")
    folder.check(max_invalid_fraction=0.02)
    return folder
