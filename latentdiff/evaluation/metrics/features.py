"""Images as feature vectors: a network's pooled last layer, read from a folder.

The folder holds either arch.json, a list of layers in their order, and model.safetensors: a
MobileNet (Howard et al. 2017) with its batch norms folded into its convolutions; or a transformers
vision model or CLIP. Nothing is unpickled. Any other torch module goes through `from_module`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from latentdiff.models.weights import weights_hash

INPUT_SIZE = 224
OPERATIONS = ("conv", "dw", "pool")


@dataclass(frozen=True)
class Features:
    """A network as a function, and which one it is."""

    embed: Callable[[Tensor], Tensor]  # (B, 3, H, W) in [-1, 1] -> (B, D) float32
    name: str
    hash: str  # sha256 of the weights


def open_features(folder: str | Path, *, device: torch.device | str = "cpu") -> Features:
    """Open a folder with a MobileNet, a transformers vision model, or a CLIP's image encoder.

    FileNotFoundError or ValueError says what the folder lacks.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file() and not (folder / "arch.json").is_file():
        return _from_transformers(folder, torch.device(device))
    return from_module(load_features(folder).to(device), folder.resolve().name)


def from_module(module: nn.Module, name: str) -> Features:
    """Wrap a module on its device that maps pixels (B, 3, H, W) in [-1, 1] to features (B, ...)."""
    module.eval()
    place = next((x.device for x in module.state_dict().values()), torch.device("cpu"))

    @torch.no_grad()
    def embed(pixels: Tensor) -> Tensor:
        with torch.autocast(place.type, enabled=False):
            found: Tensor = module(pixels.to(place)).float()
        return found.flatten(1)

    return Features(embed, name, weights_hash(module))


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


def _from_transformers(folder: Path, device: torch.device) -> Features:
    """Open a vision model, its mean last state as features; a CLIP gives its embedding."""
    from transformers import AutoConfig, AutoModel

    from latentdiff.evaluation.metrics.clip import load_clip, preprocess

    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "clip":
        clip = load_clip(folder, device=device)
        return Features(torch.no_grad()(clip.embed_pixels), clip.name, clip.hash)
    model, info = AutoModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"the network in {folder} lacks weights: {missing[:8]}")
    if info["missing_keys"]:
        model.pooler = None  # not needed, and made of random numbers
    model = model.eval().requires_grad_(False).to(device)
    size = getattr(config, "image_size", INPUT_SIZE)
    mean, std = _preparation(folder)

    @torch.no_grad()
    def embed(pixels: Tensor) -> Tensor:
        seen = preprocess(pixels.to(device), size=size, mean=mean, std=std)
        output = model(pixel_values=seen)
        hidden: Tensor = output.last_hidden_state
        if hidden.ndim == 4:  # (B, D, h, w) of a convolutional network
            return hidden.float().mean((2, 3))
        return hidden.float().mean(1)  # (B, L, D) of a transformer

    return Features(embed, folder.resolve().name, weights_hash(model))


def _preparation(folder: Path) -> tuple[list[float], list[float]]:
    """Read the mean and std, of pixels in [0, 1], that a network was trained with."""
    path = folder / "preprocessor_config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    half = [0.5, 0.5, 0.5]
    return known.get("image_mean", half), known.get("image_std", half)
