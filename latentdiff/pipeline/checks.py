"""Refuse nonsense before any compute: the arguments of one call, one small function a concern.

Every function raises ValueError that names the argument, what it got, what it expected and how to
mend it, and returns the value that the call goes on with. What needs a loaded file (a damaged
weight, a missing component) is checked where it is loaded, not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.pipeline.denoiser import Guidance
from latentdiff.pipeline.prompts import Text, weighted_parts

LONG_PROMPTS = ("cut", "chunks")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
MAX_SEED = 2**63 - 1
MAX_PIXELS = 4096 * 4096
MAX_GUIDANCE = 1000.0
MAX_GUIDE = 1e6
MAX_IMAGES = 4096


def texts(name: str, value: object) -> list[str]:
    """Return one text or a list of texts as a list; name the first entry that is no text."""
    if isinstance(value, str):
        return [_readable(name, value)]
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be a str or a list of str, got {_kind(value)}")
    if not value:
        raise ValueError(f"{name} is an empty list; pass at least one text")
    for index, text in enumerate(value):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{index}] must be a str, got {_kind(text)}")
    return [_readable(f"{name}[{index}]", text) for index, text in enumerate(value)]


def text(value: Text, *, unet: Any, text_encoder: Any) -> Text:
    """Check a call's prompts, or text states of the U-Net's width, and how they are to be read.

    There may be one negative prompt for all images or one for each prompt. text_encoder: None
    where the pipeline has none, which only text states can do without.
    """
    width = unet.config.cross_attention_dim
    if (value.prompt is None) == (value.prompt_embeds is None):
        got = "neither" if value.prompt is None else "both"
        raise ValueError(
            f"pass one of prompt (a str or a list of str) and prompt_embeds, got {got}"
        )
    if value.prompt_embeds is None:
        texts("prompt", value.prompt)
    else:
        embeddings("prompt_embeds", value.prompt_embeds, width=width)
    if text_encoder is None and value.prompt is not None:
        raise ValueError(
            "prompt needs a text encoder, and this pipeline has none; pass text states"
        )
    _negative(value, width=width)
    if not _is_one_of(LONG_PROMPTS, value.long_prompts):
        raise ValueError(
            f"long_prompts must be one of {', '.join(LONG_PROMPTS)}, got {value.long_prompts!r}"
        )
    num_images = count("num_images_per_prompt", value.num_images_per_prompt, most=MAX_IMAGES)
    skipped, scale = value.clip_skip, value.lora_scale
    if skipped is not None:
        skipped = _layers("clip_skip", skipped, text_encoder)
    if scale is not None:
        scale = number("lora_scale", scale, least=-10.0, most=10.0)
    return replace(value, num_images_per_prompt=num_images, clip_skip=skipped, lora_scale=scale)


def embeddings(
    name: str, value: object, *, width: int, shape: Sequence[int] | None = None
) -> Tensor:
    """Check text states: (B, L, width), of the given shape if any, floating, finite."""
    expected = f"(prompts, tokens, {width})" if shape is None else f"{tuple(shape)}"
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor of shape {expected}, got {_kind(value)}")
    fits = value.ndim == 3 and value.shape[-1] == width and value.numel() > 0
    if not fits or (shape is not None and value.shape != tuple(shape)):
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
    return _finite(name, value)


def image_size(
    height: object, width: object, *, default: tuple[int, int], multiple: int
) -> tuple[int, int]:
    """Return (height, width) in pixels; the default where one is None."""
    height = default[0] if height is None else height
    width = default[1] if width is None else width
    rows, columns = _side("height", height, multiple), _side("width", width, multiple)
    if rows * columns > MAX_PIXELS:
        raise ValueError(
            f"height x width is {rows} x {columns}, more than {MAX_PIXELS} pixels; ask for a "
            "smaller height or width"
        )
    return rows, columns


def count(name: str, value: object, *, most: int) -> int:
    """Return an int in 1..most."""
    integer = _integer(value)
    if integer is None or not 1 <= integer <= most:
        raise ValueError(f"{name} must be an int in 1..{most}, got {value!r}")
    return integer


def number(name: str, value: object, *, least: float, most: float) -> float:
    """Return a finite number in least..most."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if value < least or value > most or math.isnan(value):
        raise ValueError(f"{name} must lie in {least:g}..{most:g}, got {value!r}")
    return float(value)


def guidance(
    scale: object, rescale: object, part: object, *, guide: Any = None, guide_scale: object = 1.0
) -> Guidance:
    """Return the guidance that a call asks for."""
    if guide is not None and not callable(guide):
        raise ValueError(
            f"guide must be a function (z0, t) -> scores, one an image, got {_kind(guide)}"
        )
    return Guidance(
        number("guidance_scale", scale, least=0.0, most=MAX_GUIDANCE),
        number("guidance_rescale", rescale, least=0.0, most=1.0),
        interval("guidance_interval", part),
        guide,
        number("guide_scale", guide_scale, least=-MAX_GUIDE, most=MAX_GUIDE),
    )


def interval(name: str, value: object) -> tuple[float, float]:
    """Return (start, end) as parts of the chain, 0 <= start < end <= 1; None is all of it."""
    if value is None:
        return 0.0, 1.0
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"{name} must be (start, end) with 0 <= start < end <= 1, got {value!r}")
    start, end = (number(name, part, least=0.0, most=1.0) for part in value)
    if start >= end:
        raise ValueError(f"{name} must be (start, end) with start < end, got {value!r}")
    return start, end


def seeds(seed: object, generator: object, *, num_images: int) -> list[int] | None:
    """Return one seed an image, or None where generators were given.

    One int s means s, s + 1, ... so that every image has a seed of its own; None draws a fresh
    one from torch's global generator, so that torch.manual_seed still decides.
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
        raise ValueError(f"seed must be an int or a list of int, got {_kind(seed)}")
    if len(seed) != num_images:
        raise ValueError(f"seed has {len(seed)} entries but {num_images} images are asked for")
    return [_seed(f"seed[{index}]", value) for index, value in enumerate(seed)]


def latents(value: object, *, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
    """Check the caller's starting noise: shape, dtype, finite."""
    if value is None:
        return
    expected = f"shape {tuple(shape)} and dtype {' or '.join(str(d) for d in dtypes)}"
    if not isinstance(value, Tensor):
        raise ValueError(f"latents must be a tensor of {expected}, got {_kind(value)}")
    if tuple(value.shape) != tuple(shape) or value.dtype not in dtypes:
        raise ValueError(
            f"latents must have {expected}, got shape {tuple(value.shape)} and dtype {value.dtype}"
        )
    _finite("latents", value)


def output(output_type: object, return_dict: object) -> None:
    """Check the kind of result that is asked for."""
    if not _is_one_of(OUTPUT_TYPES, output_type):
        raise ValueError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}"
        )
    if not isinstance(return_dict, bool):
        raise ValueError(f"return_dict must be True or False, got {return_dict!r}")


def callback(
    function: Callable[..., Any] | None, names: object, *, known: Sequence[str]
) -> list[str]:
    """Return the names of the tensors that a step callback asks for."""
    if function is not None and not callable(function):
        raise ValueError(f"callback_on_step_end must be callable, got {_kind(function)}")
    names = getattr(function, "tensor_inputs", names)
    if not isinstance(names, (list, tuple)):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs must be a list of names, got {_kind(names)}"
        )
    for name in names:
        if not _is_one_of(known, name):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs knows {', '.join(known)}, got {name!r}"
            )
    return list(names)


def _layers(name: str, value: object, text_encoder: Any) -> int:
    layers = 1 if text_encoder is None else text_encoder.config.num_hidden_layers
    skipped = _integer(value)
    if skipped is None or not 0 <= skipped < layers:
        raise ValueError(f"{name} must be an int in 0..{layers - 1}, got {value!r}")
    return skipped


def _negative(value: Text, *, width: int) -> None:
    if value.negative_prompt is not None:
        if value.negative_prompt_embeds is not None:
            raise ValueError(
                "got both negative_prompt and negative_prompt_embeds; pass one of them"
            )
        number_of = len(texts("negative_prompt", value.negative_prompt))
        if number_of not in (1, value.num_prompts):
            raise ValueError(
                f"negative_prompt has {number_of} texts but there are {value.num_prompts} prompts; "
                "pass one text for all of them or one for each"
            )
    if value.negative_prompt_embeds is not None:
        if value.prompt_embeds is None:
            raise ValueError("negative_prompt_embeds needs prompt_embeds; pass both or neither")
        shape = value.prompt_embeds.shape
        embeddings("negative_prompt_embeds", value.negative_prompt_embeds, width=width, shape=shape)


def _generators(generator: object, num_images: int) -> None:
    if isinstance(generator, torch.Generator):
        return
    if not isinstance(generator, (list, tuple)):
        raise ValueError(
            f"generator must be a torch.Generator or a list of them, got {_kind(generator)}"
        )
    if len(generator) != num_images:
        raise ValueError(
            f"generator has {len(generator)} entries but {num_images} images are asked for"
        )
    for index, one in enumerate(generator):
        if not isinstance(one, torch.Generator):
            raise ValueError(f"generator[{index}] must be a torch.Generator, got {_kind(one)}")


def _is_one_of(names: Sequence[str], value: object) -> bool:
    """Say whether a value is one of some names; an array answers == with another array."""
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
    weighted_parts(text)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid Unicode text: character {error.start} is half of a surrogate pair"
        ) from None
    return text


def _side(name: str, value: object, multiple: int) -> int:
    integer = _integer(value)
    if integer is None or integer < multiple or integer % multiple:
        nearest = max(1, round((integer or 0) / multiple)) * multiple
        raise ValueError(
            f"{name} must be a positive multiple of {multiple}, this model's VAE factor, got "
            f"{value!r}; the nearest is {nearest}"
        )
    return integer


def _integer(value: object) -> int | None:
    """Return an int (a NumPy one too), None for anything else; a bool is no number here."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
