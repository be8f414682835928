"""PNG metadata: the settings that make an image again, as JSON in the image's own PNG file.

Written with the image, read back by `read_settings`; next to them A1111's text
(webui_parameters.py), which is read where there is no JSON.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from PIL import Image, PngImagePlugin
from torch import nn
from torch.distributed.tensor import DTensor

from latentdiff.atomic import atomic_file
from latentdiff.pipeline.conditioning.canvas import WindowInputs
from latentdiff.pipeline.conditioning.image_condition import ConditionInputs
from latentdiff.pipeline.conditioning.prompt import Prompt, PromptInputs
from latentdiff.pipeline.conditioning.sizes import SizeInputs
from latentdiff.pipeline.files.model_info import public_name
from latentdiff.pipeline.image_inputs import ImageInputs
from latentdiff.pipeline.schedulers import DenoisingSteps
from latentdiff.pipeline.webui_parameters import KEY as WEBUI_KEY
from latentdiff.pipeline.webui_parameters import parameters_text, read_parameters

SAMPLED_VALUES = 64
TINY_VAE = AutoencoderTiny.__name__


def generation_metadata(
    pipe: Any,
    prompts: PromptInputs,
    images: ImageInputs,
    chain: DenoisingSteps,
    *,
    sizes: SizeInputs,
    seeds: Sequence[int] | None,
    shape: Sequence[int],
    condition: ConditionInputs,
    windows: WindowInputs,
) -> list[dict[str, Any]]:
    """Return one JSON object an image; `pipe(**settings["call"])` makes that image alone.

    shape: (B, C, h, w) of the latents. The caller's embeddings, generators and score functions are
    not recorded, and of images, masks and conditions their digests alone, as "inputs".
    """
    guidance, is_edit = pipe.guidance, condition.kind == "instruct_pix2pix"
    common = {
        "height": shape[-2] * pipe.vae_scale_factor,
        "width": shape[-1] * pipe.vae_scale_factor,
        **chain.settings,
        "guidance_scale": guidance.scale,
        "guidance_rescale": guidance.rescale,
        "guidance_interval": list(guidance.interval),
        "image_guidance_scale": guidance.image_scale if is_edit else None,
        "strength": images.strength,
        "padding_mask_crop": images.padding_mask_crop,
        "keep_unmasked": images.keep_unmasked or None,  # None: the default
        "long_prompts": prompts.long_prompts,
        "clip_skip": prompts.clip_skip,
        "lora_scale": prompts.lora_scale,
        "prompt_weighting": None if prompts.prompt_weighting else False,  # None: the default
        **sizes.settings(),
        **condition.settings(),
        **windows.settings(),
    }
    made_by, digests = environment_metadata(pipe), images.digests() | condition.digests()
    settings = []
    for k in range(prompts.num_images):
        own = _texts(prompts, k // prompts.num_images_per_prompt)
        own["seed"] = None if seeds is None else seeds[k]
        call = {key: value for key, value in (own | common).items() if value is not None}
        inputs = {
            name: values[k * len(values) // prompts.num_images] for name, values in digests.items()
        }
        settings.append({"call": call, **({"inputs": inputs} if inputs else {}), **made_by})
    return settings


def environment_metadata(pipe: Any) -> dict[str, Any]:
    """Return the scheduler, the model and the versions of the libraries."""
    return {
        "scheduler": scheduler_metadata(pipe.scheduler),
        "model": model_metadata(pipe),
        "versions": versions(),
    }


def model_metadata(pipe: Any) -> dict[str, Any]:
    """Return the name without a path, fingerprint and dtype of a pipeline's model.

    And "vae", its class, where that is a tiny one.
    """
    name = pipe.config.get("_name_or_path")
    names = "unet", "vae", "text_encoder", "text_encoder_2", "controlnet"
    parts = {name: getattr(pipe, name) for name in names}
    return {
        "name": name and public_name(name),
        "fingerprint": model_fingerprint(parts),
        "dtype": str(pipe.unet.dtype),
        **({"vae": TINY_VAE} if isinstance(pipe.vae, AutoencoderTiny) else {}),
    }


def scheduler_metadata(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's class name and those settings that differ from its defaults."""
    known = inspect.signature(type(scheduler).__init__).parameters
    changed = {
        name: value
        for name, value in scheduler.config.items()
        if name in known and known[name].default != value
    }
    return {"class": type(scheduler).__name__} | changed


@cache
def versions() -> dict[str, str]:
    """Return the versions of the libraries that compute."""
    found = {}
    for name in ("latentdiff", "diffusers", "transformers", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def model_fingerprint(modules: Mapping[str, nn.Module | None]) -> str | None:
    """Return 16 hex digits that tell models apart, in milliseconds.

    None with weights that are offloaded, or sharded over processes. Of each tensor its name, dtype,
    shape and up to 64 evenly spaced values count, so training, merging or loading an adapter all
    change it. No protection against a forger.
    """
    digest = hashlib.sha256()
    values = []
    for name, module in sorted(modules.items()):
        if module is None:
            continue
        for key, tensor in sorted(module.state_dict().items()):
            if tensor.is_meta or isinstance(tensor, DTensor):
                return None
            digest.update(f"{name}.{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            flat = tensor.reshape(-1)
            step = max(1, len(flat) // SAMPLED_VALUES)
            values.append(flat[: step * SAMPLED_VALUES : step].float())
    if values:
        digest.update(torch.cat([value.cpu() for value in values]).numpy().tobytes())
    return digest.hexdigest()[:16]


def _texts(prompts: PromptInputs, index: int) -> dict[str, Any]:
    """Return a prompt and its negative prompt by argument; and second ones if they differ."""
    named = {
        "prompt": (prompts.prompts, prompts.second),
        "negative_prompt": (prompts.negative_prompts, prompts.negative_second),
    }
    found: dict[str, Any] = {}
    for name, (first, second) in named.items():
        found[name], other = _text(first, index), _text(second, index)
        found[f"{name}_2"] = None if other == found[name] else other
    return found


def _text(prompts: Sequence[Prompt] | None, index: int) -> str | None:
    if prompts is None:
        return None
    return prompts[index if len(prompts) > 1 else 0].text


KEY = "latentdiff"
UNREADABLE = (  # by Pillow from damaged files; unidentified and truncated ones are OSErrors
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def attach_settings(image: Image.Image, settings: Any) -> Image.Image:
    """Make `image.save("x.png")` write the settings into the file's text chunks; return the image.

    settings: JSON values. They stay in `image.info` too, so that copies keep them.
    """
    text = json.dumps(settings, ensure_ascii=True)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(KEY, text)
    image.info[KEY] = text
    if parameters := parameters_text(settings):
        chunks.add_text(WEBUI_KEY, parameters)
        image.info[WEBUI_KEY] = parameters
    image.encoderinfo = {"pnginfo": chunks}
    return image


def read_settings(png: str | os.PathLike[str] | Image.Image) -> Any:
    """Return the settings of an image that LatentDiff made, from its PNG file or as it was made.

    A dict for one image, a list of them for a sheet; of a PNG file of A1111's web UI those that
    its "parameters" text states, under the same names. Raises FileNotFoundError, and ValueError
    for a file that is no image, or one without settings, or with settings that are damaged: what
    is no JSON object, a key twice, NaN, text that is no Unicode.
    """
    if isinstance(png, Image.Image):
        name, info = "this image", png.info
    else:
        name = os.fspath(png)
        try:
            with Image.open(png) as image:
                image.load()
                info = dict(image.info)
        except (FileNotFoundError, PermissionError):
            raise
        except UNREADABLE as error:
            raise ValueError(f"{name} is not a readable image: {error}") from error
    if KEY not in info and WEBUI_KEY not in info:
        raise ValueError(
            f"{name} holds no settings of LatentDiff or A1111; only PNG files as they wrote them "
            "do, a copy in another format or by another program may have lost them"
        )
    try:
        return _parse_settings(info[KEY]) if KEY in info else read_parameters(info[WEBUI_KEY])
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} holds damaged settings: {error}") from error


def read_image_settings(png: str | os.PathLike[str] | Image.Image) -> dict[str, Any]:
    """Return the settings of one image, "call" among them; ValueError for those of a sheet."""
    settings = read_settings(png)
    name = "this image" if isinstance(png, Image.Image) else os.fspath(png)
    if isinstance(settings, list):
        raise ValueError(f"{name} is a sheet of {len(settings)} images, expected one image")
    if not isinstance(settings.get("call"), dict):
        raise ValueError(f'{name} holds damaged settings: "call" is no object')
    return settings


def _parse_settings(text: str) -> dict[str, Any] | list[dict[str, Any]]:
    """Read an object or a list of objects; ValueError or RecursionError for another text."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("an object has a key twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"a value is {constant}")

    settings: Any = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    json.dumps(settings, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    entries = settings if isinstance(settings, list) else [settings]
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("expected an object, or a list of them")
    return entries if isinstance(settings, list) else entries[0]


def save_png(image: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write a PNG file atomically, with the image's settings if it has some; return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG")
    return path
