"""Pictures as feature vectors: a small classifier's pooled last layer, read from a folder.

The folder holds arch.json, a list of layers in their order, and model.safetensors: a MobileNet
(Howard et al. 2017) with its batch norms folded into its convolutions. Nothing is unpickled.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

INPUT_SIZE = 224
OPERATIONS = ("conv", "dw", "pool")


class MobileNet(nn.Module):
    """Pictures to pooled features."""

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


def load_features(folder: str | Path) -> MobileNet:
    """Read the network. FileNotFoundError or ValueError says what the folder lacks."""
    folder = Path(folder)
    for name in ("arch.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, expected a feature network's folder")
    layers = json.loads((folder / "arch.json").read_text(encoding="utf-8"))
    if odd := {layer["op"] for layer in layers} - set(OPERATIONS):
        raise ValueError(f"{folder}/arch.json has the operation {odd.pop()}, known: {OPERATIONS}")
    return MobileNet(layers, load_file(folder / "model.safetensors")).eval()


def _same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the padding before and after, as TensorFlow's "SAME" has it."""
    padding = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return padding // 2, padding - padding // 2
