"""Pixels to latents and back, for AutoencoderKL and AutoencoderTiny alike.

Answers for: the latents' scale and shift, z = (raw - shift_factor) * scaling_factor (Rombach et
al. 2022, D.1), their measured statistics, and normalisations that stock diffusers decodes right.
Its StableDiffusionPipeline decodes `z / scaling_factor` and has no shift: any other normalisation
must be folded into the weights. Does not answer for: loading models (components.py) or training
them (training/vae/).
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn

from latentdiff.models.compatibility import latent_factor

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny


@dataclass(frozen=True)
class LatentCodec:
    """Encode pixels to normalised latents and decode them with one VAE.

    Pixels are (B, 3, H, W) in [-1, 1], latents z (B, C, H / factor, W / factor), on the device
    where the VAE computes; results are float32. Scale and shift are read from the VAE's config at
    each call. Gradients flow when the caller lets them.
    """

    vae: Autoencoder

    def __post_init__(self) -> None:
        if not isinstance(self.vae, (AutoencoderKL, AutoencoderTiny)):
            raise ValueError(
                f"the VAE is a {type(self.vae).__name__}, expected AutoencoderKL or "
                "AutoencoderTiny; load one of these two classes"
            )

    @property
    def factor(self) -> int:
        """Image pixels along one side of a latent pixel."""
        return latent_factor(self.vae.config)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.config["latent_channels"])

    @property
    def scale(self) -> float:
        """The factor that takes shifted raw latents to z."""
        return float(self.vae.config["scaling_factor"])

    @property
    def shift(self) -> float:
        """The value subtracted from raw latents before scaling; 0 when the config has none."""
        return float(self.vae.config.get("shift_factor") or 0.0)

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the posterior of z, each (B, C, h, w) float32.

        AutoencoderTiny has no distribution: its standard deviation is 0.
        """
        mean, std = self.raw_moments(pixels)
        return (mean - self.shift) * self.scale, std * self.scale

    def encode(self, pixels: Tensor, eps: Tensor | None = None) -> Tensor:
        """Sample z = mean + std * eps for noise eps (B, C, h, w); without eps, the mean."""
        mean, std = self.moments(pixels)
        if eps is None:
            return mean
        if eps.shape != mean.shape:
            raise ValueError(
                f"eps has shape {tuple(eps.shape)}, expected that of the latents, "
                f"{tuple(mean.shape)}"
            )
        return mean + std * eps.to(mean)

    def decode(self, z: Tensor, *, chunk_size: int | None = None) -> Tensor:
        """Return pixels (B, 3, H, W) for z, not clamped; at most `chunk_size` latents at once."""
        if z.ndim != 4 or z.shape[1] != self.channels:
            raise ValueError(
                f"latents have shape {tuple(z.shape)}, expected (B, {self.channels}, h, w) for "
                "this VAE"
            )
        chunks = torch.split(z, chunk_size) if chunk_size is not None else (z,)
        with _safe_precision(self.vae, z.device):
            return torch.cat([self._decode_chunk(chunk) for chunk in chunks])

    def raw_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the posterior's mean and standard deviation before scale and shift, float32."""
        self._check_pixels(pixels)
        if pixels.device.type == "cpu":  # 1.2 to 1.4 times as fast
            pixels = pixels.contiguous(memory_format=torch.channels_last)
        with _safe_precision(self.vae, pixels.device):
            encoded = self.vae.encode(pixels.to(self.vae.dtype))
        if isinstance(self.vae, AutoencoderTiny):
            mean = encoded.latents.float()
            return mean, torch.zeros_like(mean)
        posterior = encoded.latent_dist
        return posterior.mean.float(), torch.exp(0.5 * posterior.logvar.float())

    def _decode_chunk(self, z: Tensor) -> Tensor:
        raw = z / self.scale + self.shift
        pixels: Tensor = self.vae.decode(raw.to(self.vae.dtype)).sample
        return pixels.float()

    def _check_pixels(self, pixels: Tensor) -> None:
        fits = pixels.ndim == 4 and pixels.shape[1] == 3
        if not fits or any(side % self.factor or side == 0 for side in pixels.shape[2:]):
            raise ValueError(
                f"pixels have shape {tuple(pixels.shape)}, expected (B, 3, H, W) with H and W "
                f"multiples of {self.factor}, the VAE's factor; crop or resize the images"
            )


@dataclass(frozen=True)
class LatentStats:
    """Mean and standard deviation of raw latents, that is before scale and shift."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    overall_mean: float
    overall_std: float
    num_images: int


@torch.no_grad()
def latent_stats(codec: LatentCodec, pixel_batches: Iterable[Tensor]) -> LatentStats:
    """Measure raw latents over batches of pixels (B, 3, H, W).

    The posterior's own variance counts in full: these are the statistics of sampled latents,
    without their noise. Sums are float64 and weight every latent pixel alike. ValueError when there
    is no image.
    """
    count = num_images = 0
    total = torch.zeros(codec.channels, dtype=torch.float64)
    total_square = torch.zeros(codec.channels, dtype=torch.float64)
    for pixels in pixel_batches:
        mean, std = (moment.double().cpu() for moment in codec.raw_moments(pixels))
        total += mean.sum((0, 2, 3))
        total_square += (mean.square() + std.square()).sum((0, 2, 3))  # E[raw^2]
        count += mean[:, 0].numel()
        num_images += len(mean)
    if not num_images:
        raise ValueError("latents cannot be measured: there is no image; give at least one batch")
    mean, square = total / count, total_square / count
    overall = mean.mean()
    return LatentStats(
        mean=tuple(mean.tolist()),
        std=tuple((square - mean.square()).clamp_min(0).sqrt().tolist()),
        overall_mean=overall.item(),
        overall_std=(square.mean() - overall.square()).clamp_min(0).sqrt().item(),
        num_images=num_images,
    )


def set_scalar_scaling(vae: Autoencoder, stats: LatentStats) -> None:
    """Give z unit overall variance: scaling_factor = 1 / overall std, kept in the VAE's config.

    The shift is set to none, since stock StableDiffusionPipeline ignores it when it decodes.
    """
    _check_positive([stats.overall_std], "overall_std")
    set_scale(vae, 1.0 / stats.overall_std)


@torch.no_grad()
def fold_normalisation(
    vae: AutoencoderKL,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    scaling_factor: float = 1.0,
) -> None:
    """Make z = (raw - mean) / std by channel, exactly, in the VAE's two 1x1 convolutions.

    mean, std: (C,) of raw latents, as in LatentStats. The VAE then has the given scaling_factor
    and no shift, and any program that decodes `z / scaling_factor` (stock diffusers) decodes it
    right. Missing convolutions are created as identities first. A scaling_factor of 0.18215
    serves tools that assume Stable Diffusion's. Fold in float32. AutoencoderTiny clamps its
    latents in between and cannot be folded: ValueError.
    """
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(
            f"a per-channel normalisation cannot be folded into {type(vae).__name__}: its "
            "decoder starts with a clamp; use set_scalar_scaling or an AutoencoderKL"
        )
    channels = int(vae.config["latent_channels"])
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"got {len(mean)} means and {len(std)} stds, expected {channels}: one a latent channel"
        )
    _check_positive([*std, scaling_factor], "std and scaling_factor")
    quant, post_quant = _quant_convs(vae, channels)
    offset = torch.tensor(mean, dtype=torch.float64, device=quant.weight.device)
    scale = torch.tensor(std, dtype=torch.float64, device=quant.weight.device) * scaling_factor
    # (2C,): the means are divided by the scale, the log-variances shifted
    gain = torch.cat([1 / scale, torch.ones_like(scale)])
    added = torch.cat([-offset / scale, -2 * scale.log()])
    weight, bias = quant.weight.double(), _bias(quant).double()
    quant.weight.copy_(gain[:, None, None, None] * weight)
    _bias(quant).copy_(gain * bias + added)
    weight, bias = post_quant.weight.double(), _bias(post_quant).double()
    post_quant.weight.copy_(weight * scale[None, :, None, None])
    _bias(post_quant).copy_(bias + weight[:, :, 0, 0] @ offset)
    set_scale(vae, scaling_factor)


def _quant_convs(vae: AutoencoderKL, channels: int) -> tuple[nn.Conv2d, nn.Conv2d]:
    """Return quant_conv and post_quant_conv, made as identities where the model has none."""
    if vae.quant_conv is None:
        vae.quant_conv = _identity_conv(2 * channels, like=vae)
        vae.register_to_config(use_quant_conv=True)
    if vae.post_quant_conv is None:
        vae.post_quant_conv = _identity_conv(channels, like=vae)
        vae.register_to_config(use_post_quant_conv=True)
    return vae.quant_conv, vae.post_quant_conv


def _identity_conv(channels: int, *, like: AutoencoderKL) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, 1, device=like.device, dtype=like.dtype)
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(_bias(conv))
    return conv


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias


def set_scale(vae: Autoencoder, scaling_factor: float) -> None:
    """Make z = raw * scaling_factor, without a shift, in the VAE's config."""
    shift = 0.0 if isinstance(vae, AutoencoderTiny) else None
    vae.register_to_config(scaling_factor=scaling_factor, shift_factor=shift)
    if isinstance(vae, AutoencoderTiny):
        vae.scaling_factor = scaling_factor  # the class keeps a second copy


def _check_positive(values: Sequence[float], name: str) -> None:
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ValueError(
            f"{name} is {list(values)}, expected finite numbers above 0; "
            "measure the latents on images that differ"
        )


@contextlib.contextmanager
def _safe_precision(vae: Autoencoder, device: torch.device) -> Iterator[None]:
    """Compute in float32 with a VAE that overflows in float16 (config force_upcast).

    Its weights are float16 again after. Weights that accelerate streams in by layer stay as they
    are: they cannot be converted from here.
    """
    if not vae.config.get("force_upcast"):
        yield
        return
    upcast = vae.dtype == torch.float16 and not any(p.is_meta for p in vae.parameters())
    with _without_float16_autocast(device.type):
        if upcast:
            vae.to(torch.float32)
        try:
            yield
        finally:
            if upcast:
                vae.to(torch.float16)


def _without_float16_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    autocast = torch.is_autocast_enabled(device_type)
    if autocast and torch.get_autocast_dtype(device_type) == torch.float16:
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
