"""Single files of other programs as folders: a whole Stable Diffusion model, or a VAE alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from safetensors import safe_open

from latentdiff.atomic import atomic_folder
from latentdiff.device import DTYPES
from latentdiff.models.components import load_vae
from latentdiff.models.model_path import resolve_model
from latentdiff.models.save import save_component
from latentdiff.pipeline.files.single_file import CONV_IN, SingleFile, bundled_configs, read_vae
from latentdiff.pipeline.pipeline import LatentDiffPipeline

VAE_FAMILIES = ("sd1", "sd2", "sdxl")


def folder_of_single_file(
    file: str | os.PathLike[str],
    out: Path,
    *,
    base: str | None = None,
    vae: str | None = None,
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
    dtype: str | None = None,
) -> LatentDiffPipeline:
    """Write one file of a whole Stable Diffusion or SDXL model as a folder; return its pipeline.

    base: a model of the same layout, whose configs are taken in place of the family's. vae: a VAE's
    folder, or a .safetensors file of one, in place of the file's. prediction_type and
    zero_terminal_snr: as of `from_single_file`. dtype: of the weights, by default as in the file.
    Raises ValueError for an `out` that exists, and as `LatentDiffPipeline.from_single_file` does.
    """
    source = _checked(file, out, dtype=dtype)
    with safe_open(source.path, "pt") as opened:
        own = opened.get_tensor(CONV_IN).dtype if CONV_IN in source.shapes else None
    pipe = LatentDiffPipeline.from_single_file(
        source.path,
        config=resolve_model(base) if base else None,
        vae=None if vae is None else _vae(vae, source, base=base),
        prediction_type=prediction_type,
        zero_terminal_snr=zero_terminal_snr,
        dtype=DTYPES[dtype] if dtype else own,
    )
    pipe.save_pretrained(out)
    return pipe


def folder_of_vae(
    file: str | os.PathLike[str],
    out: Path,
    *,
    base: str | None = None,
    family: str | None = None,
    scaling_factor: float | None = None,
    dtype: str | None = None,
) -> Path:
    """Write the AutoencoderKL of a file as the folder of a VAE; return its path.

    file: of a VAE alone, in CompVis' or diffusers' naming, or a whole model. base: a model whose
    VAE has the same layout; family: "sd1", "sd2" or "sdxl" in its place, by default the whole
    model's, else "sd1", since all three have the same shapes. scaling_factor: of the latents, by
    default theirs. dtype: as of `folder_of_single_file`. Raises ValueError for another kind of
    file, weights that do not fit, or an `out` that exists.
    """
    source = _checked(file, out, dtype=dtype)
    if family not in (None, *VAE_FAMILIES):
        raise ValueError(f"family={family}, expected one of {', '.join(VAE_FAMILIES)}")
    config = _vae_config(source, base=base, family=family)
    if scaling_factor is not None:
        config["scaling_factor"] = scaling_factor
    vae = read_vae(source.path, config)
    with atomic_folder(out) as folder:
        save_component(vae.to(DTYPES[dtype]) if dtype else vae, folder)
    return out


def _vae(name: str, source: SingleFile, *, base: str | None) -> Any:
    """Open the VAE of a folder or of a file, for the model of a file."""
    path = Path(name).expanduser()
    if path.suffix.lower() != ".safetensors":
        return load_vae(name)
    return read_vae(path, _vae_config(source, base=base, family=None))


def _vae_config(source: SingleFile, *, base: str | None, family: str | None) -> dict[str, Any]:
    """Return the config of a base model's VAE, else of a family's, else of the file's family."""
    if base:
        return dict(AutoencoderKL.load_config(os.fspath(resolve_model(base)), subfolder="vae"))
    if family is None:
        family = source.family() if CONV_IN in source.shapes else "sd1"
    return dict(bundled_configs(family)["vae"])


def _checked(file: str | os.PathLike[str], out: Path, *, dtype: str | None) -> SingleFile:
    """Return the file's header; ValueError for what can be told before its weights are read."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype={dtype}, expected one of {', '.join(DTYPES)}")
    if out.exists():
        raise ValueError(f"{out} already exists, expected the name of a new folder")
    return SingleFile.read(Path(file).expanduser())
