"""Single files of other programs as folders: a whole Stable Diffusion model, or a VAE alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch import Tensor

from latentdiff.atomic import atomic_folder
from latentdiff.device import DTYPES
from latentdiff.models.file_kind import describe
from latentdiff.models.model_path import resolve_model
from latentdiff.models.save import save_component
from latentdiff.models.weights import PICKLES, SAFETENSORS_ERRORS, damage, refuse_bad_weights
from latentdiff.pipeline.files.single_file import CONV_IN, VAE_PREFIX, bundled_configs, vae_name
from latentdiff.pipeline.pipeline import LatentDiffPipeline

VAE_CONV_IN = "encoder.conv_in.weight"


def folder_of_single_file(
    file: str | os.PathLike[str],
    out: Path,
    *,
    base: str | None = None,
    prediction_type: str | None = None,
    dtype: str | None = None,
) -> Path:
    """Write one file of a whole Stable Diffusion 1.x or 2.x model as a folder; return its path.

    base: a model of the same layout, whose configs are taken in place of the family's.
    prediction_type: Stable Diffusion 2's 512 px base models need "epsilon". dtype: of the weights,
    by default as in the file. Raises ValueError for an `out` that exists, and as
    `LatentDiffPipeline.from_single_file` does.
    """
    path = _checked(file, out, dtype=dtype)
    pipe = LatentDiffPipeline.from_single_file(
        path, config=resolve_model(base) if base else None, prediction_type=prediction_type
    )
    with safe_open(path, "pt") as opened:
        kind = DTYPES[dtype] if dtype else opened.get_tensor(CONV_IN).dtype
    pipe.to(kind).save_pretrained(out)
    return out


def folder_of_vae(
    file: str | os.PathLike[str],
    out: Path,
    *,
    base: str | None = None,
    scaling_factor: float | None = None,
    dtype: str | None = None,
) -> Path:
    """Write the AutoencoderKL of a file as the folder of a VAE; return its path.

    file: of a VAE alone, in CompVis' or diffusers' naming, or a whole model. base: a model whose
    VAE has the same layout, by default Stable Diffusion 1's. scaling_factor: of the latents, by
    default the base's. dtype: as of `folder_of_single_file`. Raises ValueError for another kind of
    file, weights that do not fit, or an `out` that exists.
    """
    path = _checked(file, out, dtype=dtype)
    config = dict(bundled_configs("sd1")["vae"])
    if base:
        config = dict(AutoencoderKL.load_config(os.fspath(resolve_model(base)), subfolder="vae"))
    if scaling_factor is not None:
        config["scaling_factor"] = scaling_factor
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(config)
    weights = _vae_weights(path, vae)
    kind = DTYPES[dtype] if dtype else next(iter(weights.values())).dtype
    vae.load_state_dict({key: tensor.to(kind) for key, tensor in weights.items()}, assign=True)
    with atomic_folder(out) as folder:
        save_component(vae, folder)
    return out


def _vae_weights(path: Path, vae: AutoencoderKL) -> dict[str, Tensor]:
    """Return a file's weights for a VAE, by its own names."""
    expected = vae.state_dict()
    levels = len(vae.config.block_out_channels)
    with safe_open(path, "pt") as opened:
        stored = {name.removeprefix(VAE_PREFIX): name for name in opened.keys()}  # noqa: SIM118 - no dict
        if not stored.keys() >= {VAE_CONV_IN}:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in stored.values()}
            raise ValueError(f"{path} has no VAE of this kind, it holds {describe(shapes)}")
        is_ours = expected.keys() <= stored.keys()
        names = {key: key if is_ours else vae_name(key, levels=levels) for key in expected}
        refuse_bad_weights(str(path), missing={n for n in names.values() if n not in stored})
        found = {key: opened.get_tensor(stored[name]) for key, name in names.items()}
    return _fitted(path, found, expected)


def _fitted(
    path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return weights in the VAE's shapes: a linear layer may be stored as a 1x1 convolution."""
    wrong = [
        (key, tuple(tensor.shape), tuple(expected[key].shape))
        for key, tensor in found.items()
        if tensor.numel() != expected[key].numel() or tensor.shape[:2] != expected[key].shape[:2]
    ]
    refuse_bad_weights(str(path), mismatched=wrong)
    return {key: tensor.reshape(expected[key].shape) for key, tensor in found.items()}


def _checked(file: str | os.PathLike[str], out: Path, *, dtype: str | None) -> Path:
    """Return the file's path; ValueError for what can be told before it is read."""
    path = Path(file).expanduser()
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype}, expected one of {', '.join(DTYPES)}")
    if out.exists():
        raise ValueError(f"{out} already exists, expected the name of a new folder")
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run any code when it is opened; convert it to "
            ".safetensors where you trust it"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file here; check the spelling")
    try:
        with safe_open(path, "pt"):
            return path
    except SAFETENSORS_ERRORS as error:
        raise ValueError(damage(path, error)) from error
