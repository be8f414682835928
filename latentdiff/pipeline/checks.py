"""Check the arguments of one call before any compute, one small function a concern.

Every function raises ValueError that names the argument, the value it got, the values it expected
and how to fix it, and returns the checked value. Loaded files (a damaged weight, a missing
component) are checked where they are loaded, not here.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

LONG_PROMPTS = ("truncate", "chunks")
OLD_TRUNCATE = "cut"  # its name in older calls and in the settings of older images
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_SEED = 2**63 - 1
MAX_PIXELS = 4096 * 4096
MAX_IMAGES = 4096
UNSUPPORTED = {  # arguments of stock pipelines
    "ip_adapter_image": "IP-Adapters are read by StableDiffusionPipeline.from_pipe(pipe)",
    "ip_adapter_image_embeds": "IP-Adapters are read by StableDiffusionPipeline.from_pipe(pipe)",
    "masked_image_latents": "pass the masked image's own image and mask_image",
    "control_image": "pass the image that a ControlNet reads as condition",
    "depth_map": "pass it as condition",
    "guess_mode": "StableDiffusionControlNetPipeline.from_pipe(pipe) has it",
    "control_guidance_start": "StableDiffusionControlNetPipeline.from_pipe(pipe) has it",
    "control_guidance_end": "StableDiffusionControlNetPipeline.from_pipe(pipe) has it",
}
STOCK_DEFAULTS = {  # of unsupported arguments that are not None
    "guess_mode": False,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
}

logger = logging.getLogger(__name__)


def no_others(others: Mapping[str, object], known: Iterable[str]) -> None:
    """Refuse keywords that a call does not know; stock's unsupported ones may be their default."""
    for name, value in others.items():
        if name not in UNSUPPORTED:
            near = difflib.get_close_matches(name, list(known), n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"a call has no argument {name}{meant}")
        is_plain = isinstance(value, (bool, int, float))
        is_default = name in STOCK_DEFAULTS and is_plain and value == STOCK_DEFAULTS[name]
        if value is not None and not is_default:
            raise ValueError(f"{name} is not supported here; {UNSUPPORTED[name]}")


def texts(name: str, value: object) -> list[str]:
    """Return one text or a list of texts as a list; ValueError names the first bad entry."""
    if isinstance(value, str):
        return [_readable(name, value)]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a str or a list of str, got {kind(value)}")
    if not value:
        raise ValueError(f"{name} is an empty list; pass at least one text")
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{index}] must be a str, got {kind(text)}")
    return [_readable(f"{name}[{index}]", text) for index, text in enumerate(value)]


def long_prompts(value: object) -> str:
    """Return "truncate" or "chunks"; the old name "cut" is still read, with one warning."""
    if isinstance(value, str) and value == OLD_TRUNCATE:
        _warn_of_cut()
        return "truncate"
    if not _is_one_of(LONG_PROMPTS, value):
        raise ValueError(f"long_prompts must be one of {', '.join(LONG_PROMPTS)}, got {value!r}")
    return str(value)


def clip_skip(value: object, *, text_encoder: Any) -> int | None:
    """Return a number of skipped layers, at most all but one of the text encoder's."""
    if value is None:
        return None
    layers = 1 if text_encoder is None else text_encoder.config.num_hidden_layers
    skipped = _integer(value)
    if skipped is None or not 0 <= skipped < layers:
        raise ValueError(f"clip_skip must be an int in 0..{layers - 1}, got {value!r}")
    return skipped


def lora_scale(value: object, cross_attention_kwargs: object = None) -> float | None:
    """Return the scale of LoRAs, in -10..10, from either argument; None leaves their own."""
    scale = None if value is None else in_range("lora_scale", value, low=-10.0, high=10.0)
    if cross_attention_kwargs is None or cross_attention_kwargs == {}:
        return scale
    if not isinstance(cross_attention_kwargs, Mapping) or {*cross_attention_kwargs} != {"scale"}:
        raise ValueError(
            'cross_attention_kwargs may hold the scale of LoRAs alone, {"scale": 0.5}, got '
            f"{cross_attention_kwargs!r:.200}"
        )
    name = 'cross_attention_kwargs["scale"]'
    other = in_range(name, cross_attention_kwargs["scale"], low=-10.0, high=10.0)
    if scale not in (None, other):
        raise ValueError(f"got lora_scale={scale:g} and {name}={other:g}; pass one of them")
    return other


def prompt_embeds(
    name: str, value: object, *, width: int | None, shape: Sequence[int] | None = None
) -> Tensor:
    """Check prompt embeddings: (B, L, width), of the given shape if any, floating, finite."""
    expected = f"(prompts, tokens, {width or 'width'})" if shape is None else f"{tuple(shape)}"
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {expected}, got {kind(value)}")
    fits = value.ndim == 3 and value.shape[-1] == (width or value.shape[-1]) and value.numel() > 0
    if not fits or (shape is not None and value.shape != tuple(shape)):
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
    return _finite(name, value)


def pooled_embeds(name: str, value: object, *, num: int) -> Tensor:
    """Check pooled embeddings of num prompts: (num, width), floating, finite."""
    expected = f"must be a tensor of shape ({num}, width)"
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} {expected}, got {kind(value)}")
    if value.ndim != 2 or len(value) != num:
        raise ValueError(f"{name} {expected}, got {tuple(value.shape)}")
    return _finite(name, value)


def size_px(
    height: object, width: object, *, default: tuple[int, int], multiple: int
) -> tuple[int, int]:
    """Return (height, width) in pixels; the default where one is None."""
    height = default[0] if height is None else height
    width = default[1] if width is None else width
    rows, columns = (
        side("height", height, multiple=multiple),
        side("width", width, multiple=multiple),
    )
    if rows * columns > MAX_PIXELS:
        raise ValueError(
            f"height x width is {rows} x {columns}, more than {MAX_PIXELS} pixels; ask for a "
            "smaller height or width"
        )
    return rows, columns


def pair_px(name: str, value: object, *, low: int, high: int) -> tuple[int, int]:
    """Return two ints in low..high."""
    pair = [_integer(one) for one in value] if isinstance(value, (list, tuple)) else []
    if len(pair) != 2 or any(one is None or not low <= one <= high for one in pair):
        raise ValueError(f"{name} must be two ints, each in {low}..{high}, got {value!r:.200}")
    first, second = pair
    assert first is not None
    assert second is not None
    return first, second


def count(name: str, value: object, *, maximum: int) -> int:
    """Return an int in 1..maximum."""
    integer = _integer(value)
    if integer is None or not 1 <= integer <= maximum:
        raise ValueError(f"{name} must be an int in 1..{maximum}, got {value!r}")
    return integer


def descending(name: str, value: object, *, high: float, is_integer: bool) -> list[float] | None:
    """Return timesteps (integers) or sigmas, in 0..high, each below the one before; None stays."""
    if value is None:
        return None
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist()
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{name} must be a list of numbers, noisiest first, got {value!r:.200}")
    numbers = [in_range(f"{name}[{k}]", one, low=0.0, high=high) for k, one in enumerate(value)]
    if is_integer and any(number != int(number) for number in numbers):
        raise ValueError(f"{name} must be whole numbers, got {value!r:.200}")
    if any(later >= before for before, later in pairwise(numbers)):
        raise ValueError(f"{name} must descend, the noisiest first, got {value!r:.200}")
    return [int(number) for number in numbers] if is_integer else numbers


def in_range(name: str, value: object, *, low: float, high: float) -> float:
    """Return a finite number in low..high."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if value < low or value > high or math.isnan(value):
        raise ValueError(f"{name} must lie in {low:g}..{high:g}, got {value!r}")
    return float(value)


def true_or_false(name: str, value: object) -> bool:
    """Return a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


def interval(name: str, value: object) -> tuple[float, float]:
    """Return (start, end) as parts of the chain, 0 <= start < end <= 1; None is all of it."""
    if value is None:
        return 0.0, 1.0
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{name} must be (start, end) with 0 <= start < end <= 1, got {value!r}")
    start, end = (in_range(name, part, low=0.0, high=1.0) for part in value)
    if start >= end:
        raise ValueError(f"{name} must be (start, end) with start < end, got {value!r}")
    return start, end


def seeds(seed: object, generator: object, *, num_images: int) -> list[int] | None:
    """Return one seed an image, or None where generators were given.

    One int s means s, s + 1, ... so that every image has a seed of its own; None draws a random
    one from torch's global generator, so that torch.manual_seed still fixes it.
    """
    if generator is not None:
        if seed is not None:
            raise ValueError("got both seed and generator; pass one of them")
        _generators(generator, num_images)
        return None
    if seed is None:
        seed = int(torch.randint(2**32, ()))
    first = _integer(seed)
    if first is not None:
        return [_seed("seed", first + index) for index in range(num_images)]
    if not isinstance(seed, (list, tuple)):
        raise ValueError(f"seed must be an int or a list of int, got {kind(seed)}")
    if len(seed) != num_images:
        raise ValueError(f"seed has {len(seed)} entries but {num_images} images are asked for")
    return [_seed(f"seed[{index}]", value) for index, value in enumerate(seed)]


def latents(value: object, *, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
    """Check the caller's starting noise: shape, dtype, finite."""
    if value is None:
        return
    expected = f"shape {tuple(shape)} and dtype {' or '.join(str(d) for d in dtypes)}"
    if not isinstance(value, Tensor):
        raise ValueError(f"latents must be a tensor of {expected}, got {kind(value)}")
    if tuple(value.shape) != tuple(shape) or value.dtype not in dtypes:
        raise ValueError(
            f"latents must have {expected}, got shape {tuple(value.shape)} and dtype {value.dtype}"
        )
    _finite("latents", value)


def output(output_type: object, return_dict: object) -> None:
    """Check output_type and return_dict."""
    if not _is_one_of(OUTPUT_TYPES, output_type):
        raise ValueError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}"
        )
    true_or_false("return_dict", return_dict)


def callback(
    function: Callable[..., Any] | None, names: object, *, known: Sequence[str]
) -> list[str]:
    """Return the names of the tensors that a step callback takes."""
    if function is not None and not callable(function):
        raise ValueError(f"callback_on_step_end must be callable, got {kind(function)}")
    names = getattr(function, "tensor_inputs", names)
    if not isinstance(names, (list, tuple)):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs must be a list of names, got {kind(names)}"
        )
    for name in names:
        if not _is_one_of(known, name):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs knows {', '.join(known)}, got {name!r}"
            )
    return list(names)


def _generators(generator: object, num_images: int) -> None:
    if isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, (list, tuple)):
        raise ValueError(
            f"generator must be a torch.Generator or a list of them, got {kind(generator)}"
        )
    if len(generator) != num_images:
        raise ValueError(
            f"generator has {len(generator)} entries but {num_images} images are asked for"
        )
    for index, one in enumerate(generator):
        if not isinstance(one, torch.Generator):
            raise ValueError(f"generator[{index}] must be a torch.Generator, got {kind(one)}")


@cache
def _warn_of_cut() -> None:
    logger.warning('long_prompts="cut" is now called "truncate"; the old name still works')


def _is_one_of(names: Sequence[str], value: object) -> bool:
    """Return whether a value is one of some names; an array answers == with another array."""
    return isinstance(value, str) and value in names


def _seed(name: str, value: object) -> int:
    integer = _integer(value)
    if integer is None or not 0 <= integer <= MAX_SEED:
        raise ValueError(f"{name} must be an int in 0..{MAX_SEED}, got {value!r}")
    return integer


def _finite(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} holds NaN or Inf")
    return value


def _readable(name: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid Unicode text: character {error.start} is half of a surrogate pair"
        ) from None
    return text


def side(name: str, value: object, *, multiple: int) -> int:
    """Return a side in pixels, a positive multiple."""
    integer = _integer(value)
    if integer is None or integer < multiple or integer % multiple:
        nearest = max(1, round((integer or 0) / multiple)) * multiple
        raise ValueError(
            f"{name} must be a positive multiple of {multiple}, this model's VAE factor, got "
            f"{value!r}; the nearest is {nearest}"
        )
    return integer


def _integer(value: object) -> int | None:
    """Return an int (a NumPy one too), None for anything else; a bool is not an int here."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def kind(value: object) -> str:
    """Return the type's name that a message shows."""
    return "None" if value is None else type(value).__name__
