"""Train a VAE on random crops: an AutoencoderKL (Rombach et al. 2022, Appendix G), or a tiny one.

Crops are taken at a random scale between the image's own and the one where its shorter side just
fills the crop, so one VAE serves several resolutions. The EMA weights are exported, with the scalar
scaling measured on training crops. Held-out PSNR is reported over whole images. A tiny VAE
(tiny.py) learns the latents of a frozen one.
"""

import copy
import json
import logging
import shlex
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from latentdiff.atomic import atomic_folder, write_text
from latentdiff.config.vae import VaeConfig
from latentdiff.data.folder.folder import Folder
from latentdiff.evaluation.metric_nets import load_mobilenet
from latentdiff.models.build import build_tiny_vae, build_vae
from latentdiff.models.components import TINY_VAE, load_vae
from latentdiff.models.latents import (
    Autoencoder,
    LatentCodec,
    latent_stats,
    set_scalar_scaling,
)
from latentdiff.models.save import save_component
from latentdiff.training.bill.folder_runs import MAX_INVALID, read_roots
from latentdiff.training.checkpoint import Parts
from latentdiff.training.loop import train_in_one_process
from latentdiff.training.metrics_log import MeanLosses
from latentdiff.training.optim.lr import learning_rate
from latentdiff.training.recipe import Recipe
from latentdiff.training.vae.crops import Crops
from latentdiff.training.vae.pca import keep_principal
from latentdiff.training.vae.reconstruction_report import heldout_report
from latentdiff.training.vae.vae_step import VaeTrainStep

logger = logging.getLogger(__name__)


def train_vae(config: VaeConfig) -> int:
    """Train; return the exit status: 0 done, 143 or 130 stopped by a signal, its state saved.

    Writes config.yaml, metrics.jsonl, checkpoints/, tensorboard/ and, at the end, vae/ (a tiny one:
    vae_tiny/), metrics.json and a sheet of reconstructions into config.output_dir. ValueError when
    there is no image to train on, FloatingPointError when a loss is not finite any more.
    """
    folders = read_roots(VaeConfig, config.roots)
    for folder in folders:
        folder.check(max_invalid_fraction=MAX_INVALID)
    if not folders or not any(len(folder.split("train")) for folder in folders):
        raise ValueError(f"roots={list(config.roots)} hold no training images; give --roots")

    def build(settings: VaeConfig, folder: Path, accelerator: Accelerator) -> VaeRecipe:
        return VaeRecipe(settings, folder, folders, accelerator)

    return train_in_one_process(config, build, folders=folders)


class VaeRecipe(Recipe):
    """Training of a VAE on the training images of folders."""

    def __init__(
        self, config: VaeConfig, folder: Path, folders: list[Folder], accelerator: Accelerator
    ) -> None:
        """folder: of the run; folders: of the images."""
        super().__init__()
        self.config, self.folder, self.folders = config, folder, folders
        self.device, self.losses = accelerator.device, MeanLosses()
        torch.manual_seed(config.seed)
        self.crops = Crops([f.split("train") for f in folders], config.resolution, config.seed)
        self.codec = _frozen_codec(config, self.device) if config.decoder == "tiny" else None
        vae = _initial_vae(config, self.crops, self.codec).to(self.device)
        if config.channels_last:
            vae.to(memory_format=torch.channels_last)
        self.steps_per_epoch = sum(map(len, self.crops.folders)) / config.batch_size
        self.train_step = VaeTrainStep(vae, config, accelerator, codec=self.codec)
        self.learning_rate = partial(  # half a cosine over the whole run, times the warm-up
            learning_rate,
            base=config.learning_rate,
            schedule="cosine",
            lr_warmup_steps=config.lr_warmup_steps,
            max_steps=config.max_steps,
            decay_from=0,
        )

    def batches(self, first_step: int) -> Iterator[Tensor]:
        """Return crops (B, 3, H, W) in [-1, 1], without end."""
        return self.crops.loader(self.config, start=first_step)

    def step(self, batches: Iterator[Tensor], step: int) -> int:
        """Do optimiser step `step`."""
        pixels = next(batches).to(self.device)
        rate = self.learning_rate(step)
        self.losses.add(self.train_step.step(pixels, step=step, learning_rate=rate))
        return len(pixels)

    def figures(self, step: int) -> dict[str, float]:
        """Return the mean losses."""
        return self.losses.close(step) | {"learning_rate": self.learning_rate(step - 1)}

    def tensors(self) -> Parts:
        """Return weights, optimiser states, averages, generators, and losses not logged yet."""
        return {**self.train_step.tensors(), **self.losses.tensors()}

    def state(self) -> dict[str, Any]:
        """Return the numbers next to them."""
        made_of = self.materials.to_json() if self.materials else None
        return self.train_step.state() | {"materials": made_of}

    def load(self, tensors: Parts, state: Mapping[str, Any]) -> None:
        """Take both back."""
        self.train_step.load(tensors, state)
        self.losses.load(tensors, self.device)

    def export(self) -> None:
        """Write the VAE with the EMA weights, metrics.json and reconstructions of held-out images.

        Into vae/, a tiny one into vae_tiny/.
        """
        config, vae = self.config, self.train_step.vae.eval()
        with self.train_step.ema.swap_weights(vae):
            if config.train_part == "all":
                with torch.no_grad():
                    pixels = (batch.to(self.device) for batch in self.crops.some(config))
                    set_scalar_scaling(vae, latent_stats(LatentCodec(vae), pixels))
            report = self._heldout_report(LatentCodec(vae))
            dtype = torch.float16 if config.save_dtype == "fp16" else torch.float32
            saved = copy.deepcopy(vae).to(dtype).to(memory_format=torch.contiguous_format)
        out = self.folder / (TINY_VAE if self.codec else "vae")
        with atomic_folder(out) as temporary:
            save_component(saved, temporary)
            if self.materials is not None:
                self.materials.attach_to_folder(temporary, artifact=out.name)
        write_text(self.folder / "metrics.json", json.dumps(report, indent=2) + "\n")
        logger.info("wrote %s: %s", out, report)

    def next_commands(self) -> list[str]:
        """Return how to train a model on the latents of this VAE, or to decode by a tiny one."""
        if self.codec is not None:
            vae = shlex.quote(f"{self.folder / TINY_VAE}")
            return [f'sample MODEL "a cat" --vae {vae} --out sheet.png']
        vae = shlex.quote(f"{self.folder / 'vae'}")
        return [f"train --config CONFIG --data.root=FOLDER --model.vae={vae}"]

    def _heldout_report(self, codec: LatentCodec) -> dict[str, float]:
        """Measure the VAE on the held-out images of each folder."""
        config = self.config
        report = {"steps": float(config.max_steps), "scaling_factor": codec.scale}
        full, tiny = (codec, None) if self.codec is None else (self.codec, codec)
        network = load_mobilenet(config.features).to(self.device) if config.features else None
        for root, folder in zip(config.roots, self.folders, strict=True):
            if len(heldout := folder.heldout()):
                name = Path(root).name
                found = heldout_report(
                    full,
                    heldout,
                    resolution=config.resolution,
                    tiny=tiny,
                    network=network,
                    sheet=self.folder / f"reconstructions_{name}.png",
                )
                report |= {f"{key}/{name}": value for key, value in found.items()}
        return report


def _initial_vae(config: VaeConfig, crops: Crops, codec: LatentCodec | None) -> Autoencoder:
    """Load the VAE to continue from, or build a new one; freeze all but the trainable part.

    codec: of the frozen VAE for whose latents a tiny one is built.
    """
    if codec is not None:
        return build_tiny_vae(
            factor=codec.factor, latent_channels=codec.channels, width=config.decoder_width
        ).train()
    if not config.pretrained:
        return build_vae(
            block_out_channels=config.block_out_channels,
            latent_channels=config.latent_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            sample_size=config.resolution,
        )
    vae = _load_pretrained(config)
    if config.pca_channels:
        vae = keep_principal(vae, crops.some(config), config.pca_channels)
    if config.train_part == "decoder":
        vae.requires_grad_(False)
        for part in (vae.decoder, vae.post_quant_conv):
            if part is not None:
                part.requires_grad_(True)
    return vae.train()


def _frozen_codec(config: VaeConfig, device: torch.device) -> LatentCodec:
    """Load the VAE whose latents a tiny one is to learn."""
    return LatentCodec(_load_pretrained(config).to(device).eval().requires_grad_(False))


def _load_pretrained(config: VaeConfig) -> AutoencoderKL:
    vae = load_vae(config.pretrained)
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(
            f"pretrained={config.pretrained} is a {type(vae).__name__}, expected AutoencoderKL"
        )
    return vae
