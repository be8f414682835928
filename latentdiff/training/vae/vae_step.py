"""One training step of a VAE: its losses, the updates of the weights, and their state."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderTiny
from torch import Tensor

from latentdiff.config.vae import VaeConfig
from latentdiff.models.latents import Autoencoder, LatentCodec
from latentdiff.training.checkpoint import Parts
from latentdiff.training.optim.ema import Ema
from latentdiff.training.optim.mixed_precision import AmpStep
from latentdiff.training.vae.losses import (
    Lpips,
    PatchDiscriminator,
    adaptive_weight,
    hinge_loss,
    vae_loss,
)
from latentdiff.training.vae.tiny import encode_both


class VaeTrainStep:
    """A VAE in training, its EMA, and the discriminator where there is one.

    codec: of a frozen VAE, whose latents an AutoencoderTiny learns; None: an AutoencoderKL learns
    its own.
    """

    def __init__(
        self,
        vae: Autoencoder,
        config: VaeConfig,
        accelerator: Accelerator,
        *,
        codec: LatentCodec | None = None,
    ) -> None:
        self.vae, self.config, self.accelerator, self.codec = vae, config, accelerator, codec
        self.kl_weight = config.kl_weight if codec is None else 1.0
        self.lpips = Lpips(config.lpips).to(accelerator.device) if config.lpips else None
        fp16 = config.mixed_precision == "fp16"
        optimizer = torch.optim.AdamW(
            [weight for weight in vae.parameters() if weight.requires_grad],
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=1e-3,
        )
        self.vae_step = AmpStep(vae, optimizer, fp16=fp16, max_norm=1.0)
        self.ema = Ema(vae, decay=config.ema_decay)
        self.discriminator: torch.nn.Module | None = None
        self.disc_step: AmpStep | None = None
        if config.discriminator_weight:
            self.discriminator = PatchDiscriminator(config.discriminator_width).to(vae.device)
            weights = self.discriminator.parameters()
            optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, betas=(0.5, 0.9))
            self.disc_step = AmpStep(self.discriminator, optimizer, fp16=fp16, name="discriminator")

    def step(self, pixels: Tensor, *, step: int, learning_rate: float) -> dict[str, Tensor]:
        """Compute the losses of one batch, and update the VAE, its EMA and the discriminator.

        pixels: (B, 3, H, W) in [-1, 1]. Returns the losses, detached.
        """
        if self.config.channels_last:
            pixels = pixels.to(memory_format=torch.channels_last)
        with self.accelerator.autocast():
            posterior = self._encode(pixels)
            z, wanted = self._augment(posterior.sample(), pixels, step=step)
            reconstruction = self.vae.decode(add_noise(z, self.config.latent_noise)).sample
        loss = vae_loss(
            reconstruction,
            wanted,
            kl := posterior.kl(),
            l2_weight=self.config.l2_weight,
            kl_weight=self.kl_weight,
        )
        if self.lpips is not None:
            distance = self.lpips(reconstruction.float(), wanted).mean()
            loss = loss + self.config.lpips_weight * distance
        losses = {"loss": loss.detach()}
        if self.codec is not None:
            losses["latent_loss"] = kl.detach().mean()
        has_discriminator = step >= self.config.discriminator_start and self.disc_step is not None
        if has_discriminator:
            loss, losses["generator_loss"] = self._with_generator_loss(loss, reconstruction)
        self.vae_step.step(loss, learning_rate=learning_rate)
        self.ema.update()
        if has_discriminator:
            losses["discriminator_loss"] = self._discriminator_step(
                wanted, reconstruction.detach(), learning_rate=learning_rate
            )
        return losses

    def _encode(self, pixels: Tensor) -> Any:
        """Return the posterior of pixels' latents, with `sample` and `kl`."""
        if isinstance(self.vae, AutoencoderTiny):
            assert self.codec is not None
            return encode_both(self.vae, self.codec, pixels)
        return self.vae.encode(pixels).latent_dist

    def tensors(self) -> Parts:
        """Return all weights, optimiser states, averages and the states of torch's generators."""
        parts = {**self.vae_step.tensors(), "ema": self.ema.state_dict(), "rng": _rng_states()}
        return parts if self.disc_step is None else {**parts, **self.disc_step.tensors()}

    def state(self) -> dict[str, Any]:
        """Return the numbers next to them, as JSON."""
        state = self.vae_step.state()
        return state if self.disc_step is None else state | self.disc_step.state()

    def load(self, tensors: Parts, state: Mapping[str, Any]) -> None:
        """Take both back; ValueError names what does not fit."""
        for update in (self.vae_step, self.disc_step):
            if update is not None:
                update.load(tensors, state)
        self.ema.load_state_dict(tensors["ema"])
        torch.set_rng_state(tensors["rng"]["cpu"])
        if self.vae.device.type == "cuda" and "cuda" in tensors["rng"]:
            torch.cuda.set_rng_state(tensors["rng"]["cuda"], self.vae.device)

    def _augment(self, z: Tensor, pixels: Tensor, *, step: int) -> tuple[Tensor, Tensor]:
        """Transform latents and images alike, at the share of steps that the config names."""
        rng = np.random.default_rng([self.config.seed, step])
        if rng.random() >= self.config.equivariance_prob:
            return z, pixels
        turns, mirrored = int(rng.integers(4)), bool(rng.random() < 0.5)
        z, pixels = (rot90(x, turns=turns, mirrored=mirrored) for x in (z, pixels))
        if rng.random() < 0.5:
            return F.avg_pool2d(z, 2), F.avg_pool2d(pixels, 2)
        factor = pixels.shape[2] // z.shape[2]
        down, right = (int(offset) for offset in rng.integers(factor, size=2))
        return shift(z, pixels, down=down, right=right)

    def _with_generator_loss(self, loss: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """Add the generator's loss; return the sum, and it alone, detached."""
        assert self.discriminator is not None
        self.discriminator.requires_grad_(False)
        with self.accelerator.autocast():
            gen_loss = -self.discriminator(reconstruction).float().mean()
        self.discriminator.requires_grad_(True)
        scaled = self.vae_step.scaler.scale
        decoder = self.vae.decoder
        last = decoder.layers[-1] if isinstance(self.vae, AutoencoderTiny) else decoder.conv_out
        weight = adaptive_weight(scaled(loss), scaled(gen_loss), last.weight)
        return loss + self.config.discriminator_weight * weight * gen_loss, gen_loss.detach()

    def _discriminator_step(self, real: Tensor, fake: Tensor, *, learning_rate: float) -> Tensor:
        """Do the discriminator's own update; return its loss, detached."""
        assert self.discriminator is not None
        assert self.disc_step is not None
        with self.accelerator.autocast():
            loss = hinge_loss(self.discriminator(real).float(), self.discriminator(fake).float())
        self.disc_step.step(loss, learning_rate=learning_rate)
        return loss.detach()


def _rng_states() -> dict[str, Tensor]:
    """Return the states of the generators that posteriors and noise are sampled from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def add_noise(z: Tensor, largest: float) -> Tensor:
    """Add noise of a strength of its own, uniform in [0, largest] stds of z, to each of (B, ...).

    Noise-augmented decoding: Zheng et al. 2025, Diffusion transformers with representation
    autoencoders.
    """
    if not largest:
        return z
    strength = largest * z.detach().std() * torch.rand(len(z), 1, 1, 1, device=z.device)
    return z + strength.to(z.dtype) * torch.randn_like(z)


def rot90(x: Tensor, *, turns: int, mirrored: bool) -> Tensor:
    """Turn (B, C, H, W) by quarters, and mirror it."""
    x = torch.rot90(x, turns, (2, 3))
    return x.flip(3) if mirrored else x


def shift(z: Tensor, pixels: Tensor, *, down: int, right: int) -> tuple[Tensor, Tensor]:
    """Move the window by less than a latent pixel: latents are interpolated, pixels are cut.

    z: (B, C, h, w); pixels: (B, 3, f h, f w); down, right: pixels in [0, f). Latents lose a row and
    a column.
    """
    height, width = z.shape[2:]
    factor = pixels.shape[2] // height
    z = torch.lerp(z[:, :, :-1], z[:, :, 1:], down / factor)
    z = torch.lerp(z[..., :-1], z[..., 1:], right / factor)
    rows = slice(down, down + factor * (height - 1))
    columns = slice(right, right + factor * (width - 1))
    return z, pixels[:, :, rows, columns]
