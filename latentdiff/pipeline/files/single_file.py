"""A whole Stable Diffusion model in one .safetensors file, as in ComfyUI, A1111 and kohya's tools.

Opening: the weights' shapes tell the family (1.x, 2.x or XL), whose configs are bundled in
assets/single_file, so that nothing is fetched. Saving: models of the layouts of Stable Diffusion
1.x and XL. Does not answer for: the weights' names (ldm_names.py), nor for how a file states its
prediction type (prediction_marks.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentdiff.atomic import atomic_file
from latentdiff.diffusion.prediction import check_objective, parametrization
from latentdiff.models.build import FLOW_SIGMAS, make_flow_scheduler, schedule_of
from latentdiff.models.compatibility import (
    CONTROLNET,
    condition_kinds,
    latent_factor,
    read_json,
    reads_time_ids,
    sample_size_px,
)
from latentdiff.models.components import left_out, load_parts
from latentdiff.models.file_kind import describe, family_of
from latentdiff.models.open_clip import clip_tokenizer_from_open_clip
from latentdiff.models.weights import PICKLES, Shape, refuse_bad_weights, stored_shapes
from latentdiff.pipeline.files.adapter_file import stored_metadata
from latentdiff.pipeline.files.file_metadata import USAGE_HINT, model_spec, usage_hint
from latentdiff.pipeline.files.ldm_names import (
    UNET_PREFIX,
    VAE_PREFIX,
    Stored,
    check_stored,
    clip_weights,
    from_file,
    open_clip_weights,
    to_file,
    unet_weights,
    vae_weights,
)
from latentdiff.pipeline.files.model_info import info_from_json, info_to_json
from latentdiff.pipeline.files.prediction_marks import (
    ZERO_TERMINAL_SNR,
    comfyui_node,
    marks_of,
    stated_in_file,
)
from latentdiff.pipeline.schedulers import (
    scheduler_from_json,
    scheduler_to_json,
    zero_terminal_snr_scheduler,
)

CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TEXT_KEYS = tuple(  # where the prompt comes in first, in 1.x and 2.x and in XL
    f"model.diffusion_model.input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight"
    for block in (1, 4)
)
FAMILIES = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # by the width of the prompt embeddings
FAMILY_NAMES = ("Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL")
SD2_BASE_SIZE = 64  # latent pixels of Stable Diffusion 2's models that predict epsilon

DISTILLED = "latentdiff"  # key of the metadata that a distilled model has
ZEROS = "force_zeros_for_empty_prompt"
SD1_TEXT = "cond_stage_model.transformer."
SDXL_TEXT = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
Names = Callable[..., dict[str, Stored]]
LAYOUTS: dict[str, dict[str, Names]] = {  # of components: the names after each prefix
    "unet": {UNET_PREFIX: unet_weights},
    "vae": {VAE_PREFIX: vae_weights},
    "text_encoder": {
        SD1_TEXT: clip_weights,
        "cond_stage_model.model.": open_clip_weights,
        SDXL_TEXT[0]: clip_weights,
        "conditioner.embedders.0.model.": open_clip_weights,
    },
    "text_encoder_2": {SDXL_TEXT[1]: open_clip_weights},
}
CLASSES: dict[str, Callable[[Any], nn.Module]] = {
    "unet": UNet2DConditionModel.from_config,
    "vae": AutoencoderKL.from_config,
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)),
    "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)),
}


@dataclass(frozen=True)
class SingleFile:
    """What the header of a file tells: its tensors' shapes and its metadata."""

    path: Path
    shapes: Mapping[str, Shape]
    metadata: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> SingleFile:
        """Read the header alone; FileNotFoundError, or ValueError for what is no such file."""
        if path.suffix.lower() in PICKLES:
            raise ValueError(
                f"{path} is a pickle, which can run any code when it is opened; convert it to "
                ".safetensors where you trust it"
            )
        if path.is_dir():
            raise ValueError(f"{path} is a folder; open it with from_pretrained")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file here; check the spelling")
        if path.suffix.lower() != ".safetensors":
            raise ValueError(f"{path} is no .safetensors file, and only those are opened")
        return cls(path, stored_shapes([path]), stored_metadata(path))

    def family(self) -> str:
        """Return "sd1", "sd2" or "sdxl" by names and shapes; ValueError for any other file."""
        text_key = next((key for key in TEXT_KEYS if key in self.shapes), None)
        if CONV_IN not in self.shapes or text_key is None:
            raise ValueError(
                f"{self.path} is no whole Stable Diffusion 1.x, 2.x or XL model in CompVis' "
                f"naming, it holds {describe(self.shapes)}"
            )
        known = family_of(self.shapes)
        if known not in (None, *FAMILY_NAMES):
            expected = ", ".join(FAMILY_NAMES)
            raise ValueError(f"{self.path} is a model of {known}, expected one of {expected}")
        if len(self.shapes[CONV_IN]) != 4 or len(self.shapes[text_key]) != 2:
            raise ValueError(f"{self.path}: {CONV_IN} or {text_key} has other dimensions")
        channels, width = self.shapes[CONV_IN][1], self.shapes[text_key][-1]
        kinds = condition_kinds({"in_channels": channels}, latent_channels=4)
        if width in FAMILIES and kinds and kinds != ["inpaint"]:
            raise ValueError(
                f"{self.path} is a model of the kind {' or '.join(kinds)}: its U-Net takes "
                f"{channels} channels; only folders of such models are opened"
            )
        if width not in FAMILIES or channels not in (4, 9):
            raise ValueError(
                f"{self.path} reads prompt embeddings of width {width} and {channels} channels, "
                "expected 768, 1024 or 2048 and 4 or 9; pass config=, the folder of such a model"
            )
        return FAMILIES[width]


def bundled_configs(family: str) -> dict[str, dict[str, Any]]:
    """Return the components' configs of a model family, "sd1", "sd2" or "sdxl", by component."""
    source = resources.files("latentdiff") / "assets" / "single_file" / f"{family}.json"
    configs: dict[str, dict[str, Any]] = json.loads(source.read_text(encoding="utf-8"))
    return configs


def open_single_file(
    path: Path,
    *,
    config: Path | None = None,
    prediction_type: str | None = None,
    zero_terminal_snr: bool | None = None,
    vae: Any = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Return the components of a whole model in one file, by name.

    config: a folder with their configs, by default those of the family. prediction_type and
    zero_terminal_snr: by default what the file states. vae: in place of the file's. dtype: by
    default the file's. Raises FileNotFoundError or ValueError for a missing file, a pickle, another
    kind of model, missing weights, or a prediction type that is stated twice, differently.
    """
    file = SingleFile.read(path)
    configs = _configs(file, config)
    kind = prediction_type or _stated(file, configs["scheduler"], config)
    if config is None and kind == "epsilon" and configs["unet"]["cross_attention_dim"] == 1024:
        configs["unet"]["sample_size"] = SD2_BASE_SIZE
    modules = empty_modules({key: configs[key] for key in configs if key != "vae" or vae is None})
    stored = {name: _stored(file, name, module) for name, module in modules.items()}
    _check_weights(file, stored)
    given = modules | ({} if vae is None else {"vae": vae})
    if config is not None:
        others = load_parts(config, given | left_out(safety_checker=True))
    else:
        others = _tokenizers(configs)
        others |= {ZEROS: True} if "text_encoder_2" in configs else {}  # as SDXL's own folder
    is_zero = zero_terminal_snr
    if is_zero is None and ZERO_TERMINAL_SNR in file.shapes:
        is_zero = True
    scheduler = _scheduler(configs["scheduler"], prediction_type=kind, zero_terminal_snr=is_zero)
    for name, module in modules.items():
        module.load_state_dict(from_file(path, module, stored[name], dtype=dtype), assign=True)
        module.eval()
    return others | given | {"scheduler": scheduler}


def read_vae(path: Path, config: Mapping[str, Any]) -> AutoencoderKL:
    """Read the VAE of a file, alone in CompVis' or diffusers' names or in a whole model.

    config: of an AutoencoderKL of the same layout. Raises ValueError for another kind of file.
    """
    file = SingleFile.read(path)
    vae: Any = empty_modules({"vae": config})["vae"]
    alone = {key: Stored(key, tuple(tensor.shape)) for key, tensor in vae.state_dict().items()}
    layouts = (vae_weights(vae), vae_weights(vae, prefix=""), alone)
    has_most = max(layouts, key=lambda places: sum(p.name in file.shapes for p in places.values()))
    if not any(place.name in file.shapes for place in has_most.values()):
        raise ValueError(f"{path} has no VAE of this kind, it holds {describe(file.shapes)}")
    check_stored(str(path), has_most, file.shapes)
    vae.load_state_dict(from_file(path, vae, has_most), assign=True)
    return vae.eval()


def _configs(file: SingleFile, folder: Path | None) -> dict[str, dict[str, Any]]:
    """Return the configs of a file's models and scheduler: a folder's, or the family's."""
    if folder is None:
        configs = bundled_configs(file.family())
        configs["unet"]["in_channels"] = file.shapes[CONV_IN][1]
        return configs
    files = dict.fromkeys(CLASSES, "config.json") | {"scheduler": "scheduler_config.json"}
    paths = {name: folder / name / last for name, last in files.items()}
    return {name: read_json(path) for name, path in paths.items() if path.is_file()}


def _stated(file: SingleFile, scheduler: Mapping[str, Any], folder: Path | None) -> str:
    """Return the prediction type of a file; ValueError where a folder's scheduler has another."""
    own = str(scheduler.get("prediction_type", "epsilon"))
    stated = stated_in_file(str(file.path), file.shapes, file.metadata, otherwise=own)
    if folder is not None and stated != own:
        raise ValueError(
            f"{file.path} states prediction_type={stated} and the scheduler of {folder} has {own}; "
            "name the right one by prediction_type"
        )
    return stated


def empty_modules(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    """Return models by name whose parameters hold no data yet."""
    with init_empty_weights():
        return {name: make(configs[name]) for name, make in CLASSES.items() if name in configs}


def _stored(file: SingleFile, name: str, module: nn.Module) -> dict[str, Stored]:
    """Return where a file holds a component's weights; ValueError where it has none of them."""
    for prefix, names in LAYOUTS[name].items():
        if any(key.startswith(prefix) for key in file.shapes):
            return names(module, prefix=prefix)
    noun, fix = name.replace("_", " "), "; pass one by vae" if name == "vae" else ""
    begins = " or ".join(LAYOUTS[name])
    raise ValueError(f"{file.path} has no {noun}: no weight's name begins with {begins}{fix}")


def _check_weights(file: SingleFile, stored: Mapping[str, Mapping[str, Stored]]) -> None:
    """Raise ValueError for weights that are missing or misshapen, or more than a U-Net has."""
    for places in stored.values():
        check_stored(str(file.path), places, file.shapes)
    known = {place.name for place in stored["unet"].values()}
    of_unet = {key for key in file.shapes if key.startswith(UNET_PREFIX)}
    refuse_bad_weights(str(file.path), unexpected=of_unet - known)


def _scheduler(
    config: Mapping[str, Any], *, prediction_type: str, zero_terminal_snr: bool | None
) -> Any:
    """Return the scheduler of a config, for a prediction type.

    zero_terminal_snr: whether its last step is pure noise; None: as the config says.
    """
    parametrization(prediction_type)  # ValueError for an unknown name
    if prediction_type == "flow_prediction" and not config.get(FLOW_SIGMAS):
        return make_flow_scheduler(config.get("num_train_timesteps", 1000))
    changes: dict[str, Any] = {"prediction_type": prediction_type}
    if zero_terminal_snr is False and config.get("rescale_betas_zero_snr"):
        changes["rescale_betas_zero_snr"] = False
    scheduler = getattr(diffusers, config["_class_name"]).from_config({**config, **changes})
    if zero_terminal_snr:
        scheduler = zero_terminal_snr_scheduler(scheduler)
        check_objective(schedule_of(scheduler), prediction_type)
    return scheduler


def _tokenizers(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return CLIP's tokenizer for each text encoder, which pads with a token of its own."""
    found = {}
    for name in configs.keys() & {"text_encoder", "text_encoder_2"}:
        tokenizer = clip_tokenizer_from_open_clip()
        pad = configs[name]["pad_token_id"]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        found[name.replace("text_encoder", "tokenizer")] = tokenizer
    return found


def save_single_file(pipe: Any, path: str | os.PathLike[str]) -> Path:
    """Write a pipeline's models into one .safetensors file, atomically; return its path.

    Raises ValueError for a component of another layout than Stable Diffusion 1.x or XL has, for a
    kind of model that single files are not opened of, and for a loaded ControlNet.
    """
    _refuse_other_kinds(pipe.stated_info.condition_kind)
    weights = file_weights(pipe)
    schedule, unet = pipe.scheduler.config, pipe.unet.config
    weights |= {mark: torch.tensor([]) for mark in marks_of(schedule)}
    height, _ = sample_size_px(unet, factor=latent_factor(pipe.vae.config))
    info = replace(
        pipe.model_info,
        prediction_type=schedule.prediction_type,
        resolution=pipe.model_info.resolution or height,
    )
    node = comfyui_node(schedule, is_sdxl=reads_time_ids(unet))
    distilled = usage_hint(info, scheduler=pipe.scheduler).get(USAGE_HINT)
    hints = distilled, node and f"{node} in ComfyUI"
    metadata = {"format": "pt"} | model_spec(
        weights,
        info=info,
        title=Path(path).stem,
        width=unet.cross_attention_dim,
        usage_hint="; ".join(hint for hint in hints if hint),
    )
    if info.num_inference_steps:
        stored = {"model_info": info_to_json(pipe.model_info)}
        stored["scheduler"] = scheduler_to_json(pipe.scheduler)
        metadata[DISTILLED] = json.dumps(stored)
    with atomic_file(path) as temporary:
        contiguous = {key: tensor.contiguous() for key, tensor in weights.items()}
        save_file(contiguous, temporary, metadata=metadata)
    return Path(path)


def _refuse_other_kinds(kind: str | None) -> None:
    if kind == CONTROLNET:
        raise ValueError(
            "a ControlNet is loaded, and one file holds the model alone: call unload_controlnet() "
            "to write that, or keep the folder"
        )
    if kind not in (None, "inpaint"):
        raise ValueError(
            f"this model is of the kind {kind}, and one file is opened of models of text and of "
            "inpainting alone; keep the folder"
        )


def stored_usage_hint(path: Path) -> str | None:
    """Return how a single file says it is to be sampled, None where it does not."""
    return stored_metadata(path).get(USAGE_HINT)


def restore_distilled(pipe: Any, path: Path) -> None:
    """Give a pipeline the scheduler and info that the file of a distilled model states, if it does.

    ValueError where that is damaged.
    """
    if (text := stored_metadata(path).get(DISTILLED)) is None:
        return
    try:
        stored = json.loads(text)
        pipe.model_info = info_from_json(stored["model_info"])
        pipe.register_modules(scheduler=scheduler_from_json(stored["scheduler"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} has damaged metadata under {DISTILLED}: {error}") from error


def file_weights(pipe: Any) -> dict[str, Tensor]:
    """Return the weights of a pipeline's models by their names in one file.

    Raises ValueError for a component of another layout than Stable Diffusion 1.x or XL has.
    """
    unet, text_encoder = pipe.unet, pipe.text_encoder
    is_xl = reads_time_ids(unet.config)
    is_sd1 = (
        text_encoder.config.hidden_act == "quick_gelu" and not unet.config.use_linear_projection
    )
    if not (is_xl or is_sd1):
        raise ValueError(
            "one file holds models of Stable Diffusion 1.x and XL only; this one has another layout"
        )
    if type(pipe.vae).__name__ != "AutoencoderKL":
        kind = type(pipe.vae).__name__
        raise ValueError(f"one file holds an AutoencoderKL only; the VAE is a {kind}")
    weights = to_file(unet, unet_weights(unet)) | to_file(pipe.vae, vae_weights(pipe.vae))
    first = clip_weights(text_encoder, prefix=SDXL_TEXT[0] if is_xl else SD1_TEXT)
    weights |= to_file(text_encoder, first)
    if is_xl:
        second = pipe.text_encoder_2
        weights |= to_file(second, open_clip_weights(second, prefix=SDXL_TEXT[1]))
    return weights
