"""What a VAE is trained by: reconstruction, KL, a patch discriminator, LPIPS.

After Esser et al. 2021 (VQGAN, Sec. 3.1) and Rombach et al. 2022 (Appendix G).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

LARGEST_ADAPTIVE_WEIGHT = 1e4
# Where torchvision's VGG16 is tapped: after relu1_2, 2_2, 3_3, 4_3, 5_3 (Zhang et al. 2018).
TAPS = (3, 8, 15, 22, 29)
VGG_WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: pool
LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)


def vae_loss(
    reconstruction: Tensor, pixels: Tensor, kl: Tensor, *, l2_weight: float, kl_weight: float
) -> Tensor:
    """Return mean |error| + l2_weight * mean error^2 + kl_weight * mean over images of their KL.

    reconstruction, pixels: (B, 3, H, W); kl: (B,), in nats, summed over each latent.
    """
    error = reconstruction.float() - pixels
    return error.abs().mean() + l2_weight * error.square().mean() + kl_weight * kl.mean()


class PatchDiscriminator(nn.Module):
    """Classifies each patch as real or not: logits (B, 1, h, w) of (B, 3, H, W) (Isola 2017)."""

    def __init__(self, width: int = 32, *, num_layers: int = 2) -> None:
        """num_layers: halvings; patches are 16, 34 or 70 pixels wide for 1, 2 or 3."""
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        before = width
        for k in range(1, num_layers + 1):
            after = width * min(2**k, 8)
            stride = 2 if k < num_layers else 1
            layers += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                nn.GroupNorm(min(8, after), after),  # batch norm would tie images together
                nn.LeakyReLU(0.2),
            ]
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, 1, 4, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits, high for real."""
        logits: Tensor = self.layers(pixels)
        return logits


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss from its logits (Lim & Ye 2017)."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def adaptive_weight(reconstruction_loss: Tensor, generator_loss: Tensor, last: Tensor) -> Tensor:
    """Return |grad of the first| / |grad of the second| at the decoder's last weight, detached.

    Weighed so, the discriminator pulls as hard as the reconstruction (Esser et al. 2021, Eq. 7).
    """
    ours = torch.autograd.grad(reconstruction_loss, last, retain_graph=True)[0]
    theirs = torch.autograd.grad(generator_loss, last, retain_graph=True)[0]
    ratio = ours.float().norm() / (theirs.float().norm() + 1e-4)
    return ratio.clamp(0, LARGEST_ADAPTIVE_WEIGHT).detach()


class Lpips(nn.Module):
    """Learned perceptual distance of images (Zhang et al. 2018), from a local file.

    The file holds torchvision's VGG16 convolutions (`features.N.weight`, `.bias`) and the five
    linear heads (`lin0.weight` to `lin4.weight`, (1, C, 1, 1)).
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, expected LPIPS weights (safetensors)")
        self.features = _vgg16()
        self.heads = nn.ParameterList(
            nn.Parameter(torch.zeros(1, width, 1, 1)) for width in (64, 128, 256, 512, 512)
        )
        stored = load_file(path)
        wanted = {f"features.{name}": p for name, p in self.features.named_parameters()}
        wanted |= {f"lin{k}.weight": head for k, head in enumerate(self.heads)}
        odd = [
            name
            for name, p in wanted.items()
            if name not in stored or stored[name].shape != p.shape
        ]
        if odd:
            raise ValueError(f"{path} lacks, or has in another shape: {', '.join(odd[:8])}")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(stored[name])
        self.register_buffer("shift", torch.tensor(LPIPS_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(LPIPS_SCALE).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair, (B,). a, b: (B, 3, H, W) in [-1, 1]."""
        shift, scale = self.get_buffer("shift"), self.get_buffer("scale")
        x, y = ((p.float() - shift) / scale for p in (a, b))
        total = torch.zeros(len(a), device=a.device)
        taps = iter(self.heads)
        for place, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if place in TAPS:
                difference = (_unit(x) - _unit(y)).square() * next(taps)
                total = total + difference.sum(1).mean((1, 2))
        return total


def _vgg16() -> nn.Sequential:
    """Return VGG16's convolutions as torchvision numbers them (Simonyan & Zisserman 2015)."""
    layers: list[nn.Module] = []
    before = 3
    for width in VGG_WIDTHS:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
        before = width
    return nn.Sequential(*layers)


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
