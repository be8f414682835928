"""A VAE with fewer latent channels, made of one with more: its latents' principal components.

Diffusion learns few channels faster; training on from here is far shorter than from noise.
"""

from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL
from torch import Tensor


@torch.no_grad()
def keep_principal(vae: AutoencoderKL, batches: Iterable[Tensor], channels: int) -> AutoencoderKL:
    """Return a copy with `channels` latent channels, each of mean 0 and std 1 over the batches.

    batches: pixels (B, 3, H, W) in [-1, 1]. Encoding is exact: the components of the old means.
    Decoding is as good as the omitted components allow, but for the outermost latent pixels, whose
    padding was zero before the mean was subtracted. ValueError unless `channels` is smaller than
    the VAE's own number.
    """
    old = vae.config["latent_channels"]
    if not 0 < channels < old:
        raise ValueError(
            f"pca_channels={channels}, expected fewer latent channels than the VAE's {old}"
        )
    if vae.quant_conv is None or vae.post_quant_conv is None:
        raise ValueError("the VAE has no quant_conv and post_quant_conv, expected both")
    mean, basis, stds, variance = _components(vae, batches, channels)
    shape = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    made = AutoencoderKL.from_config(shape | {"latent_channels": channels})
    _copy_other_weights(vae, made)
    to_new = basis.T / stds[:, None]  # (k, C)
    quant, after = vae.quant_conv, vae.encoder.conv_out
    rows = to_new @ quant.weight[:old, :, 0, 0]  # (k, 2 C)
    weight = torch.einsum("kc,chij->khij", rows, after.weight)
    made.encoder.conv_out.weight.copy_(torch.cat([weight, torch.zeros_like(weight)]))
    bias = rows @ after.bias + to_new @ (quant.bias[:old] - mean)
    made.encoder.conv_out.bias.copy_(torch.cat([bias, (to_new.square() @ variance).log()]))
    back = vae.post_quant_conv.weight[:, :, 0, 0] @ (basis * stds)  # (C, k)
    constant = vae.post_quant_conv.weight[:, :, 0, 0] @ mean + vae.post_quant_conv.bias
    first = vae.decoder.conv_in
    made.decoder.conv_in.weight.copy_(torch.einsum("hcij,ck->hkij", first.weight, back))
    made.decoder.conv_in.bias.copy_(first.bias + first.weight.sum((2, 3)) @ constant)
    for conv in (made.quant_conv, made.post_quant_conv):
        conv.weight.copy_(torch.eye(conv.weight.shape[0])[:, :, None, None])
        conv.bias.zero_()
    return made


def _components(
    vae: AutoencoderKL, batches: Iterable[Tensor], channels: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the mean (C,), components (C, k), stds along them (k,), posterior variance (C,)."""
    means, variances = [], []
    for pixels in batches:
        posterior = vae.encode(pixels.to(vae.device)).latent_dist
        means.append(posterior.mean.transpose(0, 1).flatten(1))
        variances.append(posterior.var.mean((0, 2, 3)))
    z = torch.cat(means, 1).double()  # (C, N)
    mean = z.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(z))  # rising
    stds = values.flip(0)[:channels].clamp_min(1e-12).sqrt()
    basis = vectors.flip(1)[:, :channels]
    variance = torch.stack(variances).mean(0)
    return mean.float(), basis.float(), stds.float(), variance


def _copy_other_weights(vae: AutoencoderKL, made: AutoencoderKL) -> None:
    """Copy every weight whose shape does not depend on the number of channels."""
    own = made.state_dict()
    same = {name: w for name, w in vae.state_dict().items() if own[name].shape == w.shape}
    made.load_state_dict(own | same)
