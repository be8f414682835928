"""Images as feature vectors, by a network or as thumbnails. Networks are loaded in metric_nets.py.

`MobileNet` (Howard et al. 2017) has its batch norms folded into its convolutions; any other torch
module becomes `Features` through `features_from_module`, a transformers vision model through
`features_from_vision_model`, by its mean state or its class token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.evaluation.metrics.clip import preprocess
from latentdiff.image_grid import from_uint8
from latentdiff.models.weights import weights_hash

INPUT_SIZE = 224
THUMBNAIL = 16  # pixels a side


@dataclass(frozen=True)
class Features:
    """A network as a function, with its name."""

    embed: Callable[[Tensor], Tensor]  # (B, 3, H, W) in [-1, 1] -> (B, D) float32
    name: str
    hash: str  # sha256 of the weights


@dataclass(frozen=True, eq=False)
class FeatureSets:
    """Features of the generated (M K, D), held-out (H, D) and training (T, D) images."""

    name: str
    hash: str
    generated: Tensor
    heldout: Tensor
    train: Tensor  # (0, D) where there are none

    def unit_length(self) -> "FeatureSets":
        """Return the features scaled to length 1."""
        sets = (F.normalize(x, dim=1) for x in (self.generated, self.heldout, self.train))
        return FeatureSets(self.name, self.hash, *sets)


def embed_sets(
    features: Features,
    generated: Tensor,
    heldout: Tensor,
    train: Tensor | None,
    *,
    batch_size: int,
    device: torch.device,
) -> FeatureSets:
    """Embed three sets of images (N, 3, H, W) uint8; train: None where there are none."""
    sets = [generated, heldout] + ([] if train is None else [train])
    found = [embed_in_batches(features.embed, x, size=batch_size, device=device) for x in sets]
    of_train = found[2] if train is not None else torch.zeros(0, found[0].shape[1])
    return FeatureSets(features.name, features.hash, found[0], found[1], of_train)


def embed_in_batches(
    embed: Callable[[Tensor], Tensor], images: Tensor, *, size: int, device: torch.device
) -> Tensor:
    """Apply a function of pixels (B, 3, H, W) in [-1, 1] on a device to (N, 3, H, W) uint8.

    The result is on the CPU.
    """
    parts = (from_uint8(part.to(device)) for part in images.split(size))
    return torch.cat([embed(pixels).cpu() for pixels in parts])


def thumbnail_features(pixels: Tensor) -> Tensor:
    """Return thumbnails of pixels (B, 3, H, W) in [-1, 1] as features (B, 768) on the CPU.

    The distance of two is the root mean square difference of their values, in [0, 2]. Thumbnails
    need no network, and find copies and near copies, not images of the same thing.
    """
    small = F.adaptive_avg_pool2d(pixels.float(), THUMBNAIL).flatten(1).cpu()
    return small / small.shape[1] ** 0.5


THUMBNAILS = Features(thumbnail_features, "thumbnails of 16 pixels", "")


def features_from_module(module: nn.Module, name: str) -> Features:
    """Wrap a module on its device that maps pixels (B, 3, H, W) in [-1, 1] to features (B, ...)."""
    module.eval()
    device = next((x.device for x in module.state_dict().values()), torch.device("cpu"))

    @torch.no_grad()
    def embed(pixels: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            found: Tensor = module(pixels.to(device)).float()
        return found.flatten(1)

    return Features(embed, name, weights_hash(module))


def features_from_vision_model(
    model: Any,
    name: str,
    *,
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    class_token: bool = False,
) -> Features:
    """Wrap a transformers vision model: the mean of its last hidden state over positions or tokens.

    size: of its images in pixels; mean, std: of pixels in [0, 1] that it was trained with.
    class_token: take a vision transformer's class token after the last layer norm instead, which of
    DINOv2 is what FD-DINOv2 is computed in (Stein et al. 2023).
    """

    @torch.no_grad()
    def embed(pixels: Tensor) -> Tensor:
        seen = preprocess(pixels.to(model.device), size=size, mean=mean, std=std)
        hidden: Tensor = model(pixel_values=seen).last_hidden_state
        if hidden.ndim == 4:  # (B, D, h, w) of a convolutional network
            return hidden.float().mean((2, 3))
        if class_token:  # the first of (B, L, D)
            return hidden[:, 0].float()
        return hidden.float().mean(1)  # (B, L, D) of a transformer

    return Features(embed, name, weights_hash(model))


class MobileNet(nn.Module):
    """Images to pooled features."""

    def __init__(self, layers: list[dict[str, Any]], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers = layers
        for name, tensor in weights.items():
            self.register_buffer(name.replace(".", "_"), tensor.float())

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (B, D) of pixels (B, 3, H, W) in [-1, 1], of any size."""
        size = (INPUT_SIZE, INPUT_SIZE)
        if pixels.shape[-2:] != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        x = pixels
        for number, layer in enumerate(self.layers):
            if layer["op"] == "pool":
                return x.mean((2, 3))
            x = self._convolve(x, number, layer)
        raise ValueError("the network has no pooling layer, expected one before its classifier")

    def _convolve(self, x: Tensor, number: int, layer: dict[str, Any]) -> Tensor:
        weight, bias = (self.get_buffer(f"l{number}_{name}") for name in ("weight", "bias"))
        stride, groups = layer["s"], x.shape[1] if layer["op"] == "dw" else 1
        height, width = (_same_padding(n, layer["k"], stride) for n in x.shape[2:])
        y = F.conv2d(F.pad(x, (*width, *height)), weight, bias, stride=stride, groups=groups)
        return y.clamp(0, 6) if layer["relu6"] else y


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the padding before and after, as TensorFlow's "SAME" has it."""
    padding = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return padding // 2, padding - padding // 2
