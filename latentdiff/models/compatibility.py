"""Check that the components of a model fit together, by their JSON configs alone.

So a mistake is found before any weight is loaded.
"""

import json
import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ComponentConfig = Mapping[str, Any]
NUM_NOISE_LEVELS = 1000  # of low-resolution images
CONTROLNET = "controlnet"  # a kind that is no U-Net's; the folder of one; a component's name


@dataclass(frozen=True)
class ImageCondition:
    """A kind of condition: channels for latents of C channels, and diffusers' pipeline.

    num_class_embeds: of the class embedding by which the U-Net reads a noise level, if it does.
    """

    num_channels: Callable[[int], int]
    pipeline: str
    reads: str
    num_class_embeds: int | None = None


CONDITION_KINDS: dict[str, ImageCondition] = {
    "inpaint": ImageCondition(
        lambda c: c + 1, "StableDiffusionInpaintPipeline", "a mask and the rest of an image"
    ),
    "instruct_pix2pix": ImageCondition(
        lambda c: c, "StableDiffusionInstructPix2PixPipeline", "an image to edit"
    ),
    "upscale": ImageCondition(
        lambda c: 3,
        "StableDiffusionUpscalePipeline",
        "an image in low resolution",
        num_class_embeds=NUM_NOISE_LEVELS,
    ),
    "depth": ImageCondition(
        lambda c: 1, "StableDiffusionDepth2ImgPipeline", "a depth map or another of one channel"
    ),
}


def check_compatible(
    configs: Mapping[str, ComponentConfig], *, image_size: int | tuple[int, int] | None = None
) -> None:
    """Raise ValueError with every mismatch between components.

    configs: by component name ("unet", "vae", "text_encoder", "tokenizer", of SDXL also
    "text_encoder_2", "tokenizer_2"), each the content of its JSON file; absent components are not
    checked. image_size: pixels, one side or (height, width),
    of the images to be trained.
    """
    _check_complete(configs)
    problems = [
        *_channels(configs),
        *_text_width(configs),
        *_pooled_width(configs),
        *_text_length(configs, "tokenizer", "text_encoder"),
        *_text_length(configs, "tokenizer_2", "text_encoder_2"),
        *_text_lengths_differ(configs),
        *_shift(configs),
        *_image_size(configs, image_size),
    ]
    if problems:
        raise ValueError("the components of this model do not fit: " + "; ".join(problems))


def read_configs(folder: Path, *, without: Container[str] = ()) -> dict[str, dict[str, Any]]:
    """Read the configs of a Stable-Diffusion-format folder's components; its JSON files only.

    without: names of components that are left out.
    """
    files = {
        "unet": "config.json",
        "vae": "config.json",
        "text_encoder": "config.json",
        "tokenizer": "tokenizer_config.json",
        "text_encoder_2": "config.json",
        "tokenizer_2": "tokenizer_config.json",
        "scheduler": "scheduler_config.json",
    }
    paths = {name: folder / name / file for name, file in files.items()}
    read = {name: path for name, path in paths.items() if name not in without}
    return {name: read_json(path) for name, path in read.items() if path.is_file()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError names the file and line when it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def latent_factor(config: ComponentConfig) -> int:
    """Return image pixels along one side of a latent pixel, from a VAE's config."""
    levels = len(config.get("encoder_block_out_channels") or config["block_out_channels"])
    return 1 << (levels - 1)


def reads_time_ids(unet_config: ComponentConfig) -> bool:
    """Return whether a U-Net, by its config, reads pooled embeddings and time_ids as SDXL does."""
    return unet_config.get("addition_embed_type") == "text_time"


def unet_factor(config: ComponentConfig) -> int:
    """Return the latent pixels along one side of a pixel of the U-Net's lowest level."""
    return 1 << (len(config["block_out_channels"]) - 1)


def sample_size_px(unet: ComponentConfig, *, factor: int) -> tuple[int, int]:
    """Return (height, width) in pixels that a U-Net was trained at; factor: the VAE's."""
    size = unet.get("sample_size") or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height) * factor, int(width) * factor


def size_in_reach(
    height: int, width: int, *, trained: tuple[int, int], multiple: int
) -> tuple[int, int] | None:
    """Return a size of the same shape that a model can make, for one far beyond what it can.

    That is twice the trained pixels and more, where subjects repeat and parts come apart; None for
    any other size. trained: (height, width) in pixels. multiple: of pixels that sides must have.
    """
    times = height * width / (trained[0] * trained[1])
    if times < 2:
        return None
    sides = (
        max(multiple, round(side / math.sqrt(times) / multiple) * multiple)
        for side in (height, width)
    )
    rows, columns = sides
    return rows, columns


TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
REQUIRED = {
    "unet": ("in_channels", "out_channels", "cross_attention_dim", "block_out_channels"),
    "vae": ("latent_channels",),
    "text_encoder": ("hidden_size", "max_position_embeddings"),
    "text_encoder_2": ("hidden_size", "max_position_embeddings", "projection_dim"),
}


def _check_complete(configs: Mapping[str, ComponentConfig]) -> None:
    for name, keys in REQUIRED.items():
        missing = [key for key in keys if name in configs and key not in configs[name]]
        if missing:
            raise ValueError(
                f"the config of the {name} has no {', '.join(missing)}; take the config.json that "
                "the model was saved with"
            )


def _channels(configs: Mapping[str, ComponentConfig]) -> list[str]:
    if "unet" not in configs or "vae" not in configs:
        return []
    channels = configs["vae"]["latent_channels"]
    unet_in, unet_out = configs["unet"]["in_channels"], configs["unet"]["out_channels"]
    learned_variance = 2 * channels
    problems = []
    if unet_in != channels and not condition_kinds(configs["unet"], latent_channels=channels):
        others = ", ".join(
            f"{channels + kind.num_channels(channels)} for {name}"
            for name, kind in CONDITION_KINDS.items()
        )
        problems.append(
            f"the U-Net takes {unet_in} channels (in_channels) and the VAE's latents have "
            f"{channels}, expected {channels}, or with an image condition {others}"
        )
    if unet_out not in (channels, learned_variance):
        problems.append(
            f"the U-Net gives {unet_out} channels (out_channels) and the VAE's latents have "
            f"{channels}, expected {channels} ({learned_variance} with learned variance)"
        )
    return problems


def _text_width(configs: Mapping[str, ComponentConfig]) -> list[str]:
    if "unet" not in configs or "text_encoder" not in configs:
        return []
    widths = [configs[name]["hidden_size"] for name in TEXT_ENCODERS if name in configs]
    expected = configs["unet"].get("encoder_hid_dim") or configs["unet"]["cross_attention_dim"]
    expected = {*expected} if isinstance(expected, (list, tuple)) else {expected}
    if expected == {sum(widths)} or (reads_time_ids(configs["unet"]) and len(widths) == 1):
        return []
    plural = "s' widths (hidden_size) are" if len(widths) > 1 else "'s width (hidden_size) is"
    return [
        f"the U-Net attends to prompt embeddings of width {', '.join(map(str, expected))} "
        f"(cross_attention_dim) and the text encoder{plural} {' + '.join(map(str, widths))}"
    ]


def _pooled_width(configs: Mapping[str, ComponentConfig]) -> list[str]:
    """Check that a U-Net of SDXL's kind has a second text encoder, of the width that it reads."""
    unet, second = configs.get("unet"), configs.get("text_encoder_2")
    if unet is None:
        return []
    if not reads_time_ids(unet):
        if second is None and not unet.get("addition_embed_type"):
            return []
        kind = unet.get("addition_embed_type")
        return [
            f"the U-Net's addition_embed_type is {kind}, expected text_time, as SDXL's is, next to "
            "text_encoder_2, and none without"
        ]
    if second is None:
        return []
    width = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    if width == second["projection_dim"]:
        return []
    return [
        f"the U-Net reads pooled embeddings of width {width} "
        "(projection_class_embeddings_input_dim less 6 addition_time_embed_dim) and the second "
        f"text encoder's projection_dim is {second['projection_dim']}"
    ]


def _text_length(
    configs: Mapping[str, ComponentConfig], tokenizer: str, text_encoder: str
) -> list[str]:
    tokens = configs.get(tokenizer, {}).get("model_max_length")
    positions = configs.get(text_encoder, {}).get("max_position_embeddings")
    if tokens is None or positions is None or tokens <= positions:
        return []
    return [
        f"the {tokenizer}'s model_max_length is {tokens} and the {text_encoder} has {positions} "
        "positions (max_position_embeddings)"
    ]


def _text_lengths_differ(configs: Mapping[str, ComponentConfig]) -> list[str]:
    lengths = [
        configs.get(name, {}).get("model_max_length") for name in ("tokenizer", "tokenizer_2")
    ]
    if None in lengths or lengths[0] == lengths[1]:
        return []
    return [f"the two tokenizers' model_max_length are {lengths[0]} and {lengths[1]}, expected one"]


def _shift(configs: Mapping[str, ComponentConfig]) -> list[str]:
    if configs.get("vae", {}).get("latents_mean"):
        return [
            "the VAE's latents_mean and latents_std normalise each channel on its own, expected "
            "scaling_factor alone"
        ]
    if not configs.get("vae", {}).get("shift_factor"):
        return []
    return [
        f"the VAE's shift_factor is {configs['vae']['shift_factor']} and Stable Diffusion "
        "pipelines ignore it, expected none: fold it into the weights with "
        "latentdiff.models.latents.fold_normalisation"
    ]


def _image_size(
    configs: Mapping[str, ComponentConfig], image_size: int | tuple[int, int] | None
) -> list[str]:
    if image_size is None or "vae" not in configs:
        return []
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    vae = latent_factor(configs["vae"])
    unet = unet_factor(configs["unet"]) if "unet" in configs else 1
    if all(side > 0 and side % (vae * unet) == 0 for side in sides):
        return []
    return [
        f"the image size is {sides[0]} x {sides[1]} and its sides must be multiples of "
        f"{vae * unet} (VAE factor {vae} x U-Net factor {unet})"
    ]


def condition_kinds(unet_config: ComponentConfig, *, latent_channels: int) -> list[str]:
    """Return the kinds whose channels a U-Net, by its config, reads; none for text alone."""
    extra = unet_config["in_channels"] - latent_channels
    reads_level = unet_config.get("num_class_embeds") is not None
    return [
        name
        for name, kind in CONDITION_KINDS.items()
        if kind.num_channels(latent_channels) == extra
        and (kind.num_class_embeds is not None or not reads_level)
    ]


def check_condition(unet_config: ComponentConfig, kind: str, *, latent_channels: int) -> bool:
    """Return whether a U-Net, by its config, has the channels of a kind already; "none": none.

    ValueError for one that reads a condition of another kind.
    """
    extra = unet_config["in_channels"] - latent_channels
    known = condition_kinds(unet_config, latent_channels=latent_channels)
    if not extra and not known:
        return kind == "none"
    if kind in known:
        return True
    what = f"is of the kind {' or '.join(known)}" if known else "reads an unknown image condition"
    fix = f"set condition.kind={known[0]}" if known else "start from another model"
    raise ValueError(
        f"model.pretrained {what}: its U-Net takes {unet_config['in_channels']} channels, of which "
        f"{latent_channels} are noisy latents, and this run has condition.kind={kind}; {fix}"
    )
