"""A LoRA's matrices by the layers of a model, whatever program named them, at their own strength.

A layer gives W x + (alpha / rank) B A x. Names are diffusers' (unet.X.to_q.lora_A.weight, and older
ones), peft's (base_model.model.X.lora_A.weight) or kohya's (lora_unet_X_to_q.lora_down.weight, X by
diffusers' or CompVis' names); alpha is a tensor next to the matrices, or a setting of peft, and
each layer has its own. It is folded into B, so that every layer acts at scale 1. The factors of a
LoKr (Yeh et al. 2023) are multiplied out to the LoRA that does the same. SDXL's text encoders are
text_encoder and text_encoder_2, in kohya's names te1 and te2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.models.file_kind import LORA, describe, family_of, kind_of
from latentdiff.models.weights import Shape
from latentdiff.pipeline.files.adapter_file import AdapterFile
from latentdiff.pipeline.files.ldm_names import bare_text_name, unet_name

UNET, TEXT, TEXT_2 = PARTS = ("unet", "text_encoder", "text_encoder_2")
PREFIXES = (  # of layers' names, and the part of the model that each says
    ("lora_unet_", UNET),
    ("lora_te_", TEXT),
    ("lora_te1_", TEXT),
    ("lora_te2_", TEXT_2),
    ("base_model.model.unet.", UNET),
    ("base_model.model.text_encoder.", TEXT),
    ("base_model.model.text_encoder_2.", TEXT_2),
    ("base_model.model.", None),
    ("model.diffusion_model.", UNET),
    ("diffusion_model.", UNET),
    ("unet.", UNET),
    ("text_encoder.", TEXT),
    ("text_encoder_2.", TEXT_2),
    ("", None),
)
MATRIX = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?P<new>A|B|down|up|mid)(?:\.default)?\.weight"
    r"|(?:_lora|\.lora|\.lora_linear_layer)\.(?P<old>down|up)\.weight"
    r"|(?:\.lora_(?:down|A))?\.(?P<scale>alpha)"
    r"|\.(?P<lokr>lokr_w[12](?:_[ab])?)(?:\.default)?"
    r"|\.(?P<dora>dora_scale|lora_magnitude_vector)(?:(?:\.default)?\.weight)?"
    r")"
)
MAGNITUDES = {  # as diffusers' U-Nets and transformers' models read them
    UNET: "lora_magnitude_vector",
    TEXT: "lora_magnitude_vector.weight",
    TEXT_2: "lora_magnitude_vector.weight",
}
ROLES = {"A": "down", "B": "up"}
OTHER_KINDS = (  # of adapters: LyCORIS', peft's and OneTrainer's
    ("LoHa", r"\.hada_"),
    ("LoKr in Tucker form", r"\.lokr_t"),
    ("OFT", r"\.oft_|\.boft_"),
    ("(IA)3", r"\.on_input$|\.ia3_"),
    ("GLoRA", r"\.[ab][12]\.weight$"),
    ("whole weights", r"\.diff(_b)?$|\.[wb]_norm$"),
    ("biases", r"\.lora_B(\.default)?\.bias$"),
    ("a bundled embedding", r"^bundle_emb\."),
)
LOKR_FACTORS = (  # that a layer may have
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
    {"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"},
)


@dataclass(frozen=True)
class LoraLayers:
    """A LoRA for one model: peft's weights by part and name, and the layers without a place."""

    parts: Mapping[str, Mapping[str, Tensor]]
    unused: tuple[str, ...]
    num_layers: int


@dataclass(frozen=True)
class Place:
    """A layer that a LoRA can act on: its part of the model, its path there and its weight."""

    part: str
    path: str
    weight: Tensor


def lora_layers(file: AdapterFile, models: Mapping[str, nn.Module | None]) -> LoraLayers:
    """Return a LoRA's matrices for a model's U-Net and text encoders, by the names in PARTS.

    Raises ValueError, with the file's name, for another kind of file or of adapter, a LoRA that is
    damaged, non-finite, or for another model.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in file.weights.items()}
    _refuse_other_kinds(file.name, shapes)
    found = _by_layer(file)
    places = {part: dict(_places(part, models.get(part))) for part in PARTS}
    parts: dict[str, dict[str, Tensor]] = {}
    unused, taken = [], set[tuple[str, str]]()
    for layer, matrices in found.items():
        where = f"{file.name}: layer {layer}"
        if (place := _place_of(layer, places)) is None:
            unused.append(layer)
            continue
        if (place.part, place.path) in taken:
            raise ValueError(f"{where} is there twice, by two names")
        taken.add((place.part, place.path))
        try:
            weights = _peft_weights(place, matrices, where=where, settings=file.settings)
        except ShapeError as error:
            raise ValueError(_of_another_model(str(error), shapes)) from error
        parts.setdefault(place.part, {}).update(weights)
    if not parts:
        reason = f"{file.name} has no layer of this model's U-Net or text encoder"
        raise ValueError(_of_another_model(reason, shapes))
    _refuse_partial_dora(file.name, parts)
    return LoraLayers(parts, tuple(unused), len(found))


class ShapeError(ValueError):
    """A matrix that does not fit its layer, as a LoRA for another model has."""


def _refuse_other_kinds(name: str, shapes: Mapping[str, Shape]) -> None:
    for kind, pattern in OTHER_KINDS:
        if any(re.search(pattern, key) for key in shapes):
            raise ValueError(
                f"{name} holds {kind} besides or in place of LoRA matrices, and only LoRA, DoRA "
                "and LoKr are read here; merge it into a model with the program that made it"
            )
    if not shapes:
        raise ValueError(f"{name} holds no weights, expected a LoRA")
    if kind_of(shapes) is not LORA:
        raise ValueError(f"{name} is no LoRA, it holds {describe(shapes)}")


def _of_another_model(reason: str, shapes: Mapping[str, Shape]) -> str:
    family = family_of(shapes)
    return f"{reason}; the LoRA was trained for {family or 'another kind of model'}"


def _by_layer(file: AdapterFile) -> dict[str, dict[str, Tensor]]:
    """Return matrices by layer and role: down, up, mid, alpha, dora_scale, ..."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.weights.items():
        if (match := MATRIX.fullmatch(name)) is None:
            raise ValueError(
                f"{file.name} is no LoRA that is known here: {name[:200]!r} is the name of no "
                "matrix of one"
            )
        role = next(one for one in match.groups()[1:] if one is not None)
        matrices = layers.setdefault(match["layer"], {})
        if ROLES.get(role, role) in matrices:
            raise ValueError(f"{file.name}: {name[:200]} is there twice, by two names")
        matrices[ROLES.get(role, role)] = tensor
    for layer, matrices in layers.items():
        if not _is_whole(matrices):
            has = ", ".join(matrices)
            raise ValueError(
                f"{file.name}: layer {layer} has {has} alone, expected a matrix down and one up, "
                "or LoKr's factors w1 and w2"
            )
    return layers


def _is_whole(matrices: Iterable[str]) -> bool:
    """Return whether a layer has the matrices of a LoRA, or those of a LoKr and no other."""
    own = set(matrices) - {"alpha"}
    if not any(name.startswith("lokr_") for name in own):
        return {"down", "up"} <= own
    return own in LOKR_FACTORS


def _places(part: str, module: nn.Module | None) -> Iterator[tuple[str, Place]]:
    """Yield a model's layers by each of their names, flat: X_to_q for X.to_q."""
    for path, layer in module.named_modules() if module is not None else ():
        base: Any = getattr(layer, "base_layer", layer)  # below the LoRAs that are loaded already
        is_inside = ".base_layer" in path or ".lora_" in path
        if isinstance(base, (nn.Linear, nn.Conv2d)) and not is_inside:
            place = Place(part, path, base.weight)
            names = _unet_names(path, module) if part == UNET else _text_names(path)
            yield from ((name.replace(".", "_"), place) for name in names)


def _unet_names(path: str, unet: Any) -> Iterator[str]:
    yield path
    yield path.removesuffix(".0") if path.endswith("to_out.0") else path
    try:
        name = unet_name(f"{path}.weight", unet.config)
    except (ValueError, KeyError, TypeError):  # CompVis has no such layer
        return
    yield name.removesuffix(".weight")


def _text_names(path: str) -> Iterator[str]:
    inner = bare_text_name(path)
    for name in (inner, f"text_model.{inner}"):
        yield name
        yield re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", name)  # in diffusers' old files


def _place_of(layer: str, places: Mapping[str, Mapping[str, Place]]) -> Place | None:
    for prefix, part in PREFIXES:
        if layer.startswith(prefix):
            flat = layer.removeprefix(prefix).replace(".processor", "").replace(".", "_")
            parts = (part,) if part is not None else PARTS
            return next((places[one][flat] for one in parts if flat in places[one]), None)
    return None


@torch.no_grad()
def _peft_weights(
    place: Place,
    matrices: Mapping[str, Tensor],
    *,
    where: str,
    settings: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Return one layer's matrices by peft's names, with alpha / rank folded into B."""
    if any(name.startswith("lokr_") for name in matrices):
        matrices = _lokr_as_lora(place, matrices, settings=settings, where=where)
        settings = {}
    down, up = matrices["down"].float(), matrices["up"].float()
    if "mid" in matrices:
        down = _with_kernel(down, matrices["mid"].float(), where=where)
    rank = up.shape[1] if up.ndim > 1 else 0
    down = _fitted(down, (rank, *place.weight.shape[1:]), what=f"{where}, down or lora_A")
    up = _fitted(
        up, (len(place.weight), rank, *[1] * (place.weight.ndim - 2)), what=f"{where}, up or lora_B"
    )
    if rank == 0:
        raise ValueError(f"{where} has rank 0")
    scale = _scale(place, matrices.get("alpha"), rank=rank, settings=settings, where=where)
    weights = {"lora_A.weight": down, "lora_B.weight": up * scale}
    if {"dora_scale", "lora_magnitude_vector"} & matrices.keys():
        weights[MAGNITUDES[place.part]] = _magnitude(place, matrices, where=where)
    kind = place.weight.dtype if place.weight.is_floating_point() else torch.float32
    cast = {f"{place.path}.{name}": w.to(kind).contiguous() for name, w in weights.items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in cast.values()):
        raise ValueError(
            f"{where} is not finite in {kind}: NaN or infinite, so every image would be"
        )
    return cast


def _lokr_as_lora(
    place: Place, factors: Mapping[str, Tensor], *, settings: Mapping[str, Any], where: str
) -> dict[str, Tensor]:
    """Return down and up of the LoRA that is a LoKr: w1 kron a b = (w1 kron a) (1 kron b).

    Its rank is that of w2 times the columns of w1, or the layer's outputs where they are fewer.
    """
    parts = {name: part.float() for name, part in factors.items() if name != "alpha"}
    num_out, num_in = len(place.weight), place.weight[0].numel()
    if "lokr_w2" in parts:
        parts["lokr_w2"] = parts["lokr_w2"].flatten(1) if parts["lokr_w2"].ndim else torch.ones(0)
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    try:
        w1, w2 = (
            parts[name] if name in parts else parts[f"{name}_a"] @ parts[f"{name}_b"]
            for name in ("lokr_w1", "lokr_w2")
        )
        (rows1, columns1), (rows2, columns2) = w1.shape, w2.shape
    except (RuntimeError, ValueError):
        raise ShapeError(f"{where}: the factors of its LoKr do not fit: {shapes}") from None
    if (rows1 * rows2, columns1 * columns2) != (num_out, num_in):
        raise ShapeError(f"{where} has a LoKr of {shapes}, expected {tuple(place.weight.shape)}")
    a, b = (parts.get(f"lokr_w2_{end}") for end in "ab")
    if a is None or b is None:
        a, b = torch.eye(rows2, device=w2.device), w2
    up, down = torch.kron(w1, a), torch.kron(torch.eye(columns1, device=w1.device), b)
    if len(down) > num_out:
        up, down = torch.eye(num_out, device=w1.device), up @ down
    up = up * _lokr_scale(place, factors, settings=settings, where=where)
    ones = [1] * (place.weight.ndim - 2)
    return {"down": down.view(-1, *place.weight.shape[1:]), "up": up.view(*up.shape, *ones)}


def _lokr_scale(
    place: Place, factors: Mapping[str, Tensor], *, settings: Mapping[str, Any], where: str
) -> float:
    """Return alpha / rank; LyCORIS and ComfyUI scale only factors that are matrix products."""
    rank = next((len(factors[f"lokr_w{k}_b"]) for k in "21" if f"lokr_w{k}_b" in factors), None)
    own = {key.removeprefix(f"{place.part}."): value for key, value in settings.items()}
    if "alpha" in factors:
        return (
            1.0
            if rank is None
            else _scale(place, factors["alpha"], rank=rank, settings={}, where=where)
        )
    if own.get("rank_pattern") or own.get("alpha_pattern"):
        raise ValueError(f"{where}: a LoKr with ranks or alphas of single layers cannot be read")
    renamed = {"lora_alpha": own["alpha"]} if "alpha" in own and "r" in own else {}
    return _scale(place, None, rank=own.get("r", 1), settings=renamed, where=where)


def _fitted(matrix: Tensor, shape: tuple[int, ...], *, what: str) -> Tensor:
    """Return a matrix in a layer's shape: a 1x1 convolution may be stored as a linear layer."""
    found = tuple(matrix.shape)
    core, wanted = (one[:2] if set(one[2:]) <= {1} else one for one in (found, shape))
    if core != wanted:
        raise ShapeError(f"{what} is {found}, expected {shape}")
    return matrix.reshape(shape)


def _with_kernel(down: Tensor, mid: Tensor, *, where: str) -> Tensor:
    """Return one convolution for a 1x1 `down` (s, C) and a k x k `mid` (r, s, k, k) after it."""
    if down.shape[2:].numel() != 1 or mid.ndim != 4 or mid.shape[1] != len(down):
        shapes = f"{tuple(down.shape)} and {tuple(mid.shape)}"
        raise ShapeError(f"{where}: lora_down and lora_mid do not fit each other: {shapes}")
    return torch.einsum("rsxy,sc->rcxy", mid, down.flatten(1))


def _scale(
    place: Place,
    alpha: Tensor | None,
    *,
    rank: int,
    settings: Mapping[str, Any],
    where: str,
) -> float:
    """Return alpha / rank of a layer; 1 where alpha is nowhere, or 0, as in kohya's files."""
    own = {key.removeprefix(f"{place.part}."): value for key, value in settings.items()}
    if alpha is not None:
        if alpha.numel() != 1 or not math.isfinite(alpha.item()):
            raise ValueError(
                f"{where}: alpha must be one finite number, got {alpha.tolist()!r:.80}"
            )
        return float(alpha.item()) / rank or 1.0
    value = own.get("lora_alpha", rank)
    for pattern, special in dict(own.get("alpha_pattern") or {}).items():
        name = pattern.removeprefix("^").replace("\\.", ".")
        value = special if f".{place.path}".endswith(f".{name}") else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{where}: lora_alpha must be a finite number, got {value!r:.80}")
    return value / (math.sqrt(rank) if own.get("use_rslora") else rank)


def _magnitude(place: Place, matrices: Mapping[str, Tensor], *, where: str) -> Tensor:
    """Return DoRA's norm of each output (Liu et al. 2024), in peft's shape."""
    num, dims = len(place.weight), place.weight.ndim
    given = matrices.get("dora_scale", matrices.get("lora_magnitude_vector"))
    assert given is not None
    is_by_input = "dora_scale" in matrices and given.shape[:1] != (num,)
    if given.numel() != num or is_by_input:
        raise ValueError(
            f"{where} has a DoRA scale of shape {tuple(given.shape)}, expected one number for each "
            f"of the layer's {num} outputs; scales of the inputs cannot be loaded"
        )
    return given.float().reshape([num] if dims == 2 else [1, num, 1, 1])


def _refuse_partial_dora(name: str, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    for part, weights in parts.items():
        num = sum(".lora_magnitude_vector" in key for key in weights)
        total = sum(key.endswith("lora_A.weight") for key in weights)
        if num not in (0, total):
            raise ValueError(
                f"{name} has DoRA scales for {num} of its {total} layers of the {part}; all or "
                "none can be loaded"
            )
