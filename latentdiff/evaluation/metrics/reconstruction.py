"""The reconstruction error of a VAE, and the moments of its latents: PSNR, SSIM, kurtosis."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from latentdiff.image_grid import to_pil

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian
RANGE = 2.0  # pixels lie in [-1, 1]


@dataclass(frozen=True)
class ChannelMoments:
    """The distribution of one latent channel over images and latent pixels."""

    mean: float
    std: float
    kurtosis: float  # excess: 0 for a Gaussian


def psnr(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio in dB of each image: (B, 3, H, W) in [-1, 1]."""
    error = F.mse_loss(reconstruction.clamp(-1, 1), pixels, reduction="none").mean((1, 2, 3))
    return 10 * torch.log10(RANGE**2 / error.clamp_min(1e-10))


def ssim(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Return the structural similarity of each image, 1 for equal ones (Wang et al. 2004).

    (B, 3, H, W) in [-1, 1], at least 11 pixels a side; the mean over channels and over every
    position where the window of 11 x 11 (sigma 1.5) fits.
    """
    if min(pixels.shape[2:]) < WINDOW:
        raise ValueError(f"images are {tuple(pixels.shape[2:])}, expected {WINDOW} a side or more")
    x, y = reconstruction.float().clamp(-1, 1), pixels.float()
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    small_mean, small_var = (0.01 * RANGE) ** 2, (0.03 * RANGE) ** 2
    luminance = (2 * mean_x * mean_y + small_mean) / (mean_x**2 + mean_y**2 + small_mean)
    structure = (2 * covariance + small_var) / (var_x + var_y + small_var)
    return (luminance * structure).mean((1, 2, 3))


def _blurred(x: Tensor) -> Tensor:
    """Average over the window, where it fits."""
    offsets = torch.arange(WINDOW, device=x.device) - WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * SIGMA**2)).to(x)
    line = (line / line.sum()).repeat(x.shape[1], 1, 1, 1)  # (C, 1, 1, WINDOW)
    x = F.conv2d(x, line, groups=x.shape[1])
    return F.conv2d(x, line.transpose(2, 3), groups=x.shape[1])


def channel_moments(z: Tensor) -> list[ChannelMoments]:
    """Return the moments of each channel of latents (N, C, h, w)."""
    values = z.double().transpose(0, 1).flatten(1)  # (C, N h w)
    mean, std = values.mean(1), values.std(1, correction=0)
    fourth = ((values - mean[:, None]) ** 4).mean(1) / std.clamp_min(1e-12) ** 4
    return [
        ChannelMoments(float(m), float(s), float(k) - 3)
        for m, s, k in zip(mean, std, fourth, strict=True)
    ]


def reconstruction_sheet(pixels: Tensor, *reconstructions: Tensor, columns: int = 8) -> Image.Image:
    """Return rows of images, each above its reconstructions. All (N, 3, H, W) in [-1, 1]."""
    rows = []
    for start in range(0, len(pixels), columns):
        for x in (pixels, *reconstructions):
            row = x[start : start + columns]
            blank = row.new_ones(columns - len(row), *row.shape[1:])
            rows.append(torch.cat([row, blank]).permute(1, 2, 0, 3).flatten(2))  # (3, H, columns W)
    return to_pil(torch.cat(rows, 1))
