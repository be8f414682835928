"""What a VAE does to images it has not seen."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.atomic import atomic_file
from latentdiff.data.folder.folder import Folder
from latentdiff.evaluation.eval_set import read_pixels
from latentdiff.evaluation.metrics.bootstrap import bootstrap_mean
from latentdiff.evaluation.metrics.fd_kid import frechet_distance
from latentdiff.evaluation.metrics.reconstruction import (
    channel_moments,
    psnr,
    reconstruction_sheet,
    ssim,
)
from latentdiff.models.latents import LatentCodec

NUM_SHOWN = 16


@torch.no_grad()
def heldout_report(
    codec: LatentCodec,
    folder: Folder,
    *,
    resolution: int,
    network: Callable[[Tensor], Tensor] | None = None,
    sheet: Path | None = None,
    max_images: int = 256,
    batch_size: int = 32,
) -> dict[str, float]:
    """Return PSNR and SSIM with 95 % intervals, FD, and each latent channel's moments.

    Over the centre crops of at most max_images images; FD, which is biased upwards in small
    samples, in the features of `network`. Latents are scaled; a Gaussian's kurtosis is 0.
    """
    device = codec.vae.device
    number = min(len(folder), max_images)
    pixels = torch.stack(
        [read_pixels(folder, i, height=resolution, width=resolution) for i in range(number)]
    )
    latents = torch.cat([codec.encode(part.to(device)) for part in pixels.split(batch_size)])
    decoded = torch.cat([codec.decode(z).cpu() for z in latents.split(batch_size)])
    report = {"num_images": float(number)} | _fidelity(decoded, pixels)
    if network is not None and number > 1:
        both = (
            torch.cat([network(part.to(device)).cpu() for part in x.split(batch_size)])
            for x in (pixels, decoded.clamp(-1, 1))
        )
        report["fd"] = frechet_distance(*both).value
    for k, channel in enumerate(channel_moments(latents.cpu())):
        report |= {
            f"latent{k}_mean": channel.mean,
            f"latent{k}_std": channel.std,
            f"latent{k}_kurtosis": channel.kurtosis,
        }
    if sheet is not None:
        with atomic_file(sheet) as temporary:
            shown = reconstruction_sheet(pixels[:NUM_SHOWN], decoded[:NUM_SHOWN])
            shown.save(temporary, format="PNG")
    return report


def _fidelity(decoded: Tensor, pixels: Tensor) -> dict[str, float]:
    """Return mean PSNR and, of images large enough for it, SSIM, with their intervals."""
    figures = {"psnr_db": psnr(decoded, pixels)}
    if min(pixels.shape[2:]) >= 11:
        figures["ssim"] = ssim(decoded, pixels)
    report = {name: values.mean().item() for name, values in figures.items()}
    for name, values in figures.items() if len(pixels) > 1 else ():
        interval = bootstrap_mean(values)
        report |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    return report
