"""Load the networks that metrics need: CLIP for the score, a feature network for fidelity.

The mathematics is in metrics/, which reads no file. Weights come from safetensors alone; nothing is
unpickled.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, CLIPModel, CLIPTokenizer

from latentdiff.config.options import EvalModelOptions, EvaluationOptions
from latentdiff.device import choose_device
from latentdiff.evaluation.metrics.clip import Clip, wrap_open_clip, wrap_transformers_clip
from latentdiff.evaluation.metrics.features import (
    INPUT_SIZE,
    Features,
    MobileNet,
    features_from_module,
    features_from_vision_model,
)
from latentdiff.models.weights import weights_hash

OPERATIONS = ("conv", "dw", "pool")
DINO_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")  # of transformers' configs
HALF = [0.5, 0.5, 0.5]  # mean and std where a folder tells none
OF_IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean and std of DINO's pixels


@dataclass(frozen=True, eq=False)
class MetricNets:
    """The networks that score images; None where none is given."""

    clip: Clip | None
    features: Features | None
    dino: Features | None = None

    def compared(self) -> dict[str, Features | None]:
        """Return the networks whose features images are compared in, by the report's section."""
        clip = _image_features(self.clip) if self.clip is not None else None
        return {"fidelity": self.features, "dino": self.dino, "cmmd": clip}


def load_metric_nets(options: EvaluationOptions, data: EvalModelOptions) -> MetricNets:
    """Load the given networks; ValueError or FileNotFoundError names the fault."""
    device = choose_device(data.device)
    clip = None
    if options.clip and options.clip_weights:
        clip = load_open_clip_scorer(options.clip, options.clip_weights, device=device)
    elif options.clip:
        clip = load_clip(options.clip, device=device)
    features = load_features(options.features, device=device) if options.features else None
    dino = load_dino(options.dino, device=device) if options.dino else None
    return MetricNets(clip, features, dino)


def load_clip(folder: str | Path, *, device: torch.device | str = "cpu") -> Clip:
    """Load a transformers CLIPModel and its tokenizer from a folder; safetensors only."""
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, expected the folder of a CLIP model")
    model, info = CLIPModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"the CLIP in {folder} lacks weights: {sorted(info['missing_keys'])[:8]}")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    known = model.config.text_config.vocab_size
    if len(tokenizer) > known:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and its CLIP knows {known}: "
            "they are not of one model"
        )
    clip = wrap_transformers_clip(model.eval().requires_grad_(False).to(device), tokenizer)
    return replace(clip, name=Path(folder).resolve().name, hash=weights_hash(model))


def load_open_clip_scorer(
    name: str, weights: str | Path, *, device: torch.device | str = "cpu"
) -> Clip:
    """Load a named open_clip model, such as "ViT-B-32", with weights from a safetensors file.

    ValueError or FileNotFoundError names the mismatch; pickle files are not opened.
    """
    import open_clip

    if name not in open_clip.list_models():
        raise ValueError(f"{name!r} is no open_clip model, expected one of open_clip.list_models()")
    path = Path(weights).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is not a .safetensors file; pickle files are not opened")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist, expected the weights of {name}")
    model = open_clip.create_model(name)
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of {name}: {error}") from error
    model = model.eval().requires_grad_(False).to(device)
    clip = wrap_open_clip(model, open_clip.get_tokenizer(name))
    return replace(clip, name=f"open_clip {name}", hash=weights_hash(model))


def load_features(folder: str | Path, *, device: torch.device | str = "cpu") -> Features:
    """Load a folder's network: a MobileNet, a transformers vision model, or a CLIP's image encoder.

    FileNotFoundError or ValueError names the part that the folder lacks.
    """
    folder = Path(folder).expanduser()
    if (folder / "config.json").is_file() and not (folder / "arch.json").is_file():
        return _load_vision_features(folder, torch.device(device))
    return features_from_module(load_mobilenet(folder).to(device), folder.resolve().name)


def load_dino(folder: str | Path, *, device: torch.device | str = "cpu") -> Features:
    """Load a DINO, DINOv2 or DINOv3 of transformers: its class token as features.

    At the size of its preprocessor_config.json. FileNotFoundError or ValueError names what the
    folder lacks.
    """
    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, expected the folder of a DINO")
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in DINO_TYPES:
        raise ValueError(
            f"{folder} holds a {config.model_type}, expected a DINO ({', '.join(DINO_TYPES)}); "
            "give other networks as --features or --clip"
        )
    known = _preprocessor(folder)
    return features_from_vision_model(
        _load_vision_model(folder, torch.device(device)),
        folder.resolve().name,
        size=_side(known) or config.image_size,
        mean=known.get("image_mean", OF_IMAGENET[0]),
        std=known.get("image_std", OF_IMAGENET[1]),
        class_token=True,
    )


def load_mobilenet(folder: str | Path) -> MobileNet:
    """Read a MobileNet from arch.json, its layers in their order, and model.safetensors.

    FileNotFoundError or ValueError names the part that the folder lacks.
    """
    folder = Path(folder).expanduser()
    for name in ("arch.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, expected a feature network's folder")
    layers = json.loads((folder / "arch.json").read_text(encoding="utf-8"))
    if odd := {layer["op"] for layer in layers} - set(OPERATIONS):
        raise ValueError(f"{folder}/arch.json has the operation {odd.pop()}, known: {OPERATIONS}")
    return MobileNet(layers, load_file(folder / "model.safetensors")).eval()


def _load_vision_features(folder: Path, device: torch.device) -> Features:
    """Load a vision model, its mean last state as features; a CLIP gives its embedding."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "clip":
        return _image_features(load_clip(folder, device=device))
    known = _preprocessor(folder)
    return features_from_vision_model(
        _load_vision_model(folder, device),
        folder.resolve().name,
        size=getattr(config, "image_size", INPUT_SIZE),
        mean=known.get("image_mean", HALF),
        std=known.get("image_std", HALF),
    )


def _image_features(clip: Clip) -> Features:
    """Return a CLIP's embeddings of images as features."""
    return Features(torch.no_grad()(clip.embed_pixels), clip.name, clip.hash)


def _load_vision_model(folder: Path, device: torch.device) -> Any:
    """Load a transformers vision model from a folder; ValueError where weights are missing."""
    model, info = AutoModel.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"the network in {folder} lacks weights: {missing[:8]}")
    if info["missing_keys"]:
        model.pooler = None  # not needed, and made of random numbers
    return model.eval().requires_grad_(False).to(device)


def _preprocessor(folder: Path) -> dict[str, Any]:
    """Read how a network's images are prepared: size, mean and std of pixels in [0, 1]."""
    path = folder / "preprocessor_config.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return known


def _side(known: dict[str, Any]) -> int | None:
    """Return the side in pixels of the images that a preprocessor gives, None where not told."""
    size = known.get("crop_size") or known.get("size") or {}
    side = size.get("height") if isinstance(size, dict) else size
    return None if side is None else int(side)
