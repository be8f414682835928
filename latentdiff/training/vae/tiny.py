"""A tiny VAE that learns another's latents, and what it is measured by next to it.

An AutoencoderTiny (the layout of TAESD, Boer Bohan 2023) decodes the scaled latents z of a frozen
VAE several times as fast. Its encoder learns the mean of z, so that stock pipelines start from
images with it too. Does not answer for: the training step (vae_step.py).
"""

import copy
import time
from dataclasses import dataclass
from statistics import median

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from latentdiff.device import best_dtype
from latentdiff.evaluation.metrics.bootstrap import bootstrap_difference
from latentdiff.evaluation.metrics.reconstruction import psnr
from latentdiff.models.latents import LatentCodec

MAX_TIMED_S, MAX_TIMED = 5.0, 9  # seconds of decoding one image again, and times


@dataclass(frozen=True)
class FrozenPosterior:
    """The frozen VAE's posterior of z for a batch, and the tiny encoder's z; all (B, C, h, w)."""

    mean: Tensor
    std: Tensor
    tiny: Tensor

    def sample(self) -> Tensor:
        """Sample z by torch's global generator."""
        return self.mean + self.std * torch.randn_like(self.mean)

    def kl(self) -> Tensor:
        """Return half the mean squared error of the tiny encoder's z of each image, (B,).

        That is the KL divergence of Gaussians of std 1 around both, a mean over each latent.
        """
        return (self.tiny.float() - self.mean).square().mean((1, 2, 3)) / 2


def encode_both(tiny: AutoencoderTiny, codec: LatentCodec, pixels: Tensor) -> FrozenPosterior:
    """Encode pixels (B, 3, H, W) by the frozen VAE of `codec` and by the tiny one in training.

    The frozen one's, the target, without autocast: a VAE in fp16 may overflow.
    """
    with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
        mean, std = codec.moments(pixels)
    return FrozenPosterior(mean, std, tiny.encode(pixels).latents)


def paired_figures(tiny: Tensor, full: Tensor, pixels: Tensor) -> dict[str, float]:
    """Return the PSNR of a tiny decoder's images to the full one's, and the PSNR that it loses.

    All (N, 3, H, W) in [-1, 1]. The loss, against the full decoder's PSNR to the pixels, is a mean
    over images, with its 95 % interval.
    """
    figures = {"psnr_db_to_full": psnr(tiny, full.clamp(-1, 1)).mean().item()}
    before, after = psnr(full, pixels), psnr(tiny, pixels)
    figures["psnr_db_lost"] = (before - after).mean().item()
    if len(pixels) > 1:
        lost = bootstrap_difference(before, after)
        figures |= {"psnr_db_lost_low": lost.low, "psnr_db_lost_high": lost.high}
    return figures


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return the root mean squared error of latents in units of the std of the wanted ones."""
    return ((found - wanted).square().mean().sqrt() / wanted.std()).item()


def decode_times(codecs: dict[str, LatentCodec], z: Tensor) -> dict[str, float]:
    """Return the processor's milliseconds in which each VAE decodes one latent on one thread.

    z: (1, C, h, w). In the dtype that sampling takes on this CPU; VAEs take turns, medians count.
    """
    cpu, num_threads = torch.device("cpu"), torch.get_num_threads()
    timed = {name: _for_sampling(codec) for name, codec in codecs.items()}
    z, seconds = z.to(cpu), {name: list[float]() for name in codecs}
    torch.set_num_threads(1)
    try:
        started = time.perf_counter()
        for round_number in range(MAX_TIMED + 1):  # the first one warms up
            for name, codec in timed.items():
                begun = time.process_time()
                codec.decode(z)
                seconds[name].append(time.process_time() - begun)
            if round_number and time.perf_counter() - started > MAX_TIMED_S:
                break
    finally:
        torch.set_num_threads(num_threads)
    return {name: 1e3 * median(times[1:]) for name, times in seconds.items()}


def _for_sampling(codec: LatentCodec) -> LatentCodec:
    """Return a copy as a pipeline has it on this CPU."""
    cpu, vae = torch.device("cpu"), copy.deepcopy(codec.vae).eval()
    nn.Module.to(vae, cpu, best_dtype(cpu))  # the class' own warns of every dtype
    return LatentCodec(vae.to(memory_format=torch.channels_last))
