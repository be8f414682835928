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
from latentdiff.training.vae.tiny import decode_times, paired_figures, relative_error

NUM_SHOWN = 16


@torch.no_grad()
def heldout_report(
    codec: LatentCodec,
    folder: Folder,
    *,
    resolution: int,
    tiny: LatentCodec | None = None,
    network: Callable[[Tensor], Tensor] | None = None,
    sheet: Path | None = None,
    max_images: int = 256,
    batch_size: int = 32,
) -> dict[str, float]:
    """Return PSNR and SSIM with 95 % intervals, FD, and each latent channel's moments.

    Over the centre crops of at most max_images images; FD, which is biased upwards in small
    samples, in the features of `network`. Latents are scaled; a Gaussian's kurtosis is 0. tiny:
    decodes the latents too; the figures are then its own, next to the VAE's, named "full_...".
    """
    device, number = codec.vae.device, min(len(folder), max_images)
    size = {"height": resolution, "width": resolution}
    pixels = torch.stack([read_pixels(folder, i, **size) for i in range(number)])

    def in_batches(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return torch.cat([function(part.to(device)).cpu() for part in x.split(batch_size)])

    latents = in_batches(codec.encode, pixels)
    codecs = {"": codec} if tiny is None else {"full_": codec, "": tiny}
    decoded = {prefix: in_batches(one.decode, latents) for prefix, one in codecs.items()}
    report = {"num_images": float(number)}
    for prefix, images in decoded.items():
        report |= {f"{prefix}{name}": x for name, x in _fidelity(images, pixels).items()}
        if network is not None and number > 1:
            both = (in_batches(network, x) for x in (pixels, images.clamp(-1, 1)))
            report[f"{prefix}fd"] = frechet_distance(*both).value
    report |= _moments(latents)
    if tiny is not None:
        report |= paired_figures(decoded[""], decoded["full_"], pixels)
        report["latent_error"] = relative_error(in_batches(tiny.encode, pixels), latents)
        report |= decode_times({f"{p}decode_ms": one for p, one in codecs.items()}, latents[:1])
    if sheet is not None:
        shown = (x[:NUM_SHOWN] for x in (pixels, *decoded.values()))
        with atomic_file(sheet) as temporary:
            reconstruction_sheet(*shown).save(temporary, format="PNG")
    return report


def _moments(latents: Tensor) -> dict[str, float]:
    """Return mean, std and kurtosis of each channel of latents (N, C, h, w)."""
    report: dict[str, float] = {}
    for k, channel in enumerate(channel_moments(latents)):
        report |= {
            f"latent{k}_mean": channel.mean,
            f"latent{k}_std": channel.std,
            f"latent{k}_kurtosis": channel.kurtosis,
        }
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
