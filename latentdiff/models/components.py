"""The components of a text-to-image latent diffusion model, opened from a folder or a hub id.

Answers for: Stable Diffusion's folder format, stock diffusers / transformers classes only,
safetensors only, and no component with a missing, extra or misshapen weight. Does not answer for
models by name (model_path.py), building components from plain values (build.py), nor their
mathematics (latents.py, text.py, diffusion/).
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub import snapshot_download
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from latentdiff.atomic import atomic_folder
from latentdiff.models.compatibility import (
    check_compatible,
    read_configs,
    read_json,
    reads_time_ids,
)
from latentdiff.models.latents import Autoencoder
from latentdiff.models.model_path import BUNDLED, fetched, refuse_wrong_path, resolve_model
from latentdiff.models.text import TextEncoders
from latentdiff.models.weights import (
    check_loaded,
    load_diffusers_model,
    stored_shapes,
    weight_files,
    weight_patterns,
)
from latentdiff.program import program


@dataclass(frozen=True)
class Components:
    """The components of one model, named as in a Stable-Diffusion-format folder.

    text_encoder_2, tokenizer_2: of SDXL. force_zeros_for_empty_prompt: whether zeros take the place
    of the empty prompt's embeddings where no negative prompt is given.
    """

    unet: UNet2DConditionModel
    vae: Autoencoder
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any
    safety_checker: StableDiffusionSafetyChecker | None = None
    feature_extractor: CLIPImageProcessor | None = None
    image_encoder: CLIPVisionModelWithProjection | None = None
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    force_zeros_for_empty_prompt: bool = False

    def __post_init__(self) -> None:
        """Check that the components fit (ValueError)."""
        if reads_time_ids(self.unet.config) and None in (self.text_encoder_2, self.tokenizer_2):
            raise ValueError(
                "the U-Net is SDXL's (addition_embed_type is text_time) and text_encoder_2 or "
                "tokenizer_2 is absent, expected both"
            )
        check_compatible(self.configs())
        _check_vocabulary(self.text_encoder, self.tokenizer)
        _check_vocabulary(self.text_encoder_2, self.tokenizer_2)

    @property
    def text_encoders(self) -> TextEncoders:
        """The text encoders with their tokenizers."""
        return TextEncoders(
            self.text_encoder, self.tokenizer, self.text_encoder_2, self.tokenizer_2
        )

    def configs(self) -> dict[str, dict[str, Any]]:
        """Return the components' configs as their JSON files hold them."""
        configs = {
            "unet": dict(self.unet.config),
            "vae": dict(self.vae.config),
            "text_encoder": self.text_encoder.config.to_dict(),
            "tokenizer": {"model_max_length": self.tokenizer.model_max_length},
            "scheduler": dict(self.scheduler.config),
        }
        if self.text_encoder_2 is not None:
            configs["text_encoder_2"] = self.text_encoder_2.config.to_dict()
        if self.tokenizer_2 is not None:
            configs["tokenizer_2"] = {"model_max_length": self.tokenizer_2.model_max_length}
        return configs

    def as_dict(self) -> dict[str, Any]:
        """Return the components by name, without copying them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


COMPONENT_CLASSES: dict[str, tuple[type, ...]] = {
    "unet": (UNet2DConditionModel,),
    "vae": (AutoencoderKL, AutoencoderTiny),
    "text_encoder": (CLIPTextModel,),
    "text_encoder_2": (CLIPTextModelWithProjection,),
    "safety_checker": (StableDiffusionSafetyChecker,),
    "image_encoder": (CLIPVisionModelWithProjection,),
}


OF_DEPTH = "DPT"  # begins the class of a feature extractor that a depth estimator has
TOKENIZERS = {"tokenizer", "tokenizer_2"}
SECOND = ("text_encoder_2", "tokenizer_2")  # of SDXL, whose model_index.json names them


TINY_VAE = "vae_tiny"  # folder, in a model's, of an AutoencoderTiny of the same latents


class Download(diffusers.DiffusionPipeline):
    """Fetches the files of a model's components, of whatever class its model_index.json names.

    DiffusionPipeline.download knows its own classes alone, and not ours. A component that is given
    to `download` is not fetched.
    """

    _optional_components: ClassVar = ["controlnet", *(field.name for field in fields(Components))]

    def __init__(
        self,
        *,
        unet: Any = None,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        scheduler: Any = None,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        controlnet: Any = None,
    ) -> None:
        super().__init__()


def load_components(
    path_or_id: str | Path,
    *,
    torch_dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    safety_checker: bool = True,
) -> Components:
    """Open a Stable Diffusion or SDXL folder, a model that ships, or fetch one from the hub.

    Models come in eval mode on the CPU in `torch_dtype`; safety checker and image encoder in the
    dtype of their configs. `variant` picks weight files such as "fp16". safety_checker: False
    leaves the stored one out, unread. FileNotFoundError or ValueError names the mistake, before any
    weight is read where the configs show it.
    """
    given = left_out(safety_checker=not safety_checker)
    return Components(**load_parts(path_or_id, given, torch_dtype=torch_dtype, variant=variant))


def left_out(*, safety_checker: bool) -> dict[str, Any]:
    """Return the components that are opened as None where the safety checker is left out."""
    return dict.fromkeys(("safety_checker", "feature_extractor")) if safety_checker else {}


def load_parts(
    path_or_id: str | Path,
    given: Mapping[str, Any],
    *,
    torch_dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> dict[str, Any]:
    """Return a model's components by name, opened as load_components does.

    given: components that take the place of the stored ones, None for none. Of these, neither
    files nor classes in the folder are looked at.
    """
    for name, part in given.items():
        if isinstance(part, (str, Path)):
            raise TypeError(f"{name} must be a loaded component or None, got {str(part)!r}")
    folder = _folder(path_or_id, given, variant=variant)
    names = _component_classes(folder, given)
    check_compatible(read_configs(folder, without=given))
    dtypes = dict.fromkeys(("unet", "vae", "text_encoder", "text_encoder_2"), torch_dtype)
    loaded = {
        name: _load_model(
            name,
            names[name],
            folder / name,
            torch_dtype=dtypes.get(name),
            variant=variant,
        )
        for name in COMPONENT_CLASSES
        if name in names
    }
    if not names.get("feature_extractor", OF_DEPTH).startswith(OF_DEPTH):
        path = folder / "feature_extractor"
        loaded["feature_extractor"] = CLIPImageProcessor.from_pretrained(path)
    for name in TOKENIZERS & names.keys():
        loaded[name] = _load_tokenizer(folder / name)
    index = read_json(folder / "model_index.json")
    if SECOND[0] in index:
        loaded["force_zeros_for_empty_prompt"] = index.get("force_zeros_for_empty_prompt", True)
    if "scheduler" in names:
        cls = _scheduler_class(names["scheduler"])
        loaded["scheduler"] = cls.from_pretrained(folder / "scheduler")
    parts = loaded | dict(given)
    _check_vocabulary(parts["text_encoder"], parts["tokenizer"])
    _check_vocabulary(parts.get("text_encoder_2"), parts.get("tokenizer_2"))
    return parts


def load_vae(
    path_or_id: str | Path,
    *,
    torch_dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Autoencoder:
    """Open an AutoencoderKL or AutoencoderTiny: its own folder, a model's, a run's, or a hub id."""
    folder = resolve_model(path_or_id)
    if not folder.exists():
        refuse_wrong_path(path_or_id, known=BUNDLED)
        patterns = ["config.json", *weight_patterns(variant)]
        folder = fetched(
            lambda: snapshot_download(str(path_or_id), allow_patterns=patterns), path_or_id
        )
    for name in ("vae", TINY_VAE):
        if (folder / name / "config.json").is_file():
            folder = folder / name
            break
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, expected the folder of a VAE")
    name = read_json(folder / "config.json").get("_class_name", "")
    vae: Autoencoder = _load_model("vae", name, folder, torch_dtype=torch_dtype, variant=variant)
    return vae


def choose_vae(
    model: str | Path, choice: str, *, torch_dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Open a VAE that decodes in the place of a model's own.

    choice: "tiny", the one that the model's folder carries in vae_tiny/, or what load_vae opens.
    """
    if choice != "tiny":
        return load_vae(choice, torch_dtype=torch_dtype)
    folder = resolve_model(model)
    if not folder.exists():
        patterns = f"{TINY_VAE}/*"
        folder = fetched(lambda: snapshot_download(str(model), allow_patterns=patterns), model)
    if not (folder / TINY_VAE).is_dir():
        raise FileNotFoundError(
            f"{model} carries no tiny VAE, expected a folder {TINY_VAE}; train one: {program()} "
            f"train-vae --train_part=decoder --decoder=tiny --pretrained={model} --roots='[DIR]'"
        )
    return load_vae(folder / TINY_VAE, torch_dtype=torch_dtype)


def carry_tiny_vae(source: str | Path, folder: Path) -> None:
    """Copy the tiny VAE that a model carries, if any, to one of the same latents; "": no model."""
    stored = resolve_model(source) / TINY_VAE
    if os.fspath(source) and stored.is_dir():
        with atomic_folder(folder / TINY_VAE) as temporary:
            shutil.copytree(stored, temporary, dirs_exist_ok=True)


def _folder(path_or_id: str | Path, given: Mapping[str, Any], *, variant: str | None) -> Path:
    """Return the local folder of a pipeline; from the hub, without given components, elsewhere."""
    folder = resolve_model(path_or_id)
    refuse_wrong_path(folder, known=BUNDLED)
    if not folder.exists():
        options: dict[str, Any] = {"use_safetensors": True, "variant": variant, **given}
        folder = fetched(lambda: Download.download(str(path_or_id), **options), path_or_id)
        refuse_wrong_path(folder, known=BUNDLED)
    return folder


def _component_classes(folder: Path, given: Mapping[str, Any]) -> dict[str, str]:
    """Return class names by component from model_index.json, but for the given components.

    Refuses classes that are not ours.
    """
    index = read_json(folder / "model_index.json")
    specs = {name: spec for name, spec in index.items() if isinstance(spec, list) and all(spec)}
    names = {name: spec[1] for name, spec in specs.items() if name not in given}
    second = SECOND if SECOND[0] in index else ()
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler", *second):
        if name in given:
            continue
        if name not in names:
            refiner = "; SDXL's refiner has none, take the base model" if second else ""
            raise ValueError(f"{folder}/model_index.json names no {name}, expected one{refiner}")
        if not (folder / name).is_dir():
            raise FileNotFoundError(
                f"{folder} has no folder {name}, which its model_index.json names"
            )
    for name in COMPONENT_CLASSES.keys() & names.keys():
        _component_class(name, names[name])
    if "scheduler" in names:
        _scheduler_class(names["scheduler"])
    return names


def _component_class(name: str, class_name: str) -> Any:
    for known in COMPONENT_CLASSES[name]:
        if known.__name__ == class_name:
            return known
    expected = " or ".join(known.__name__ for known in COMPONENT_CLASSES[name])
    raise ValueError(f"the {name} is a {class_name}, expected {expected}")


def _check_vocabulary(
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection | None,
    tokenizer: CLIPTokenizer | None,
) -> None:
    """Raise ValueError where a tokenizer has tokens that the text encoder does not know."""
    if text_encoder is None or tokenizer is None:
        return
    known, used = text_encoder.config.vocab_size, len(tokenizer)
    if used > known:
        raise ValueError(
            f"the tokenizer has {used} tokens and the text encoder's vocab_size is {known}, "
            "expected at least as many; take both from one model"
        )


def _scheduler_class(class_name: str) -> Any:
    known = getattr(diffusers, class_name, None)
    if not (isinstance(known, type) and issubclass(known, diffusers.SchedulerMixin)):
        raise ValueError(f"the scheduler is a {class_name}, expected one of diffusers' schedulers")
    return known


def _load_model(
    name: str,
    class_name: str,
    folder: Path,
    *,
    torch_dtype: torch.dtype | None,
    variant: str | None,
) -> Any:
    """Load one model and refuse it when its weights are not exactly those of its config."""
    try:
        return _load_whole_model(name, class_name, folder, torch_dtype=torch_dtype, variant=variant)
    except (OSError, ValueError) as error:
        if name != "safety_checker":
            raise
        raise ValueError(
            f"{error}; without it the model opens by safety_checker=None in from_pretrained, or "
            "safety_checker=false in a command (model.safety_checker=false in training)"
        ) from error


def _load_whole_model(
    name: str,
    class_name: str,
    folder: Path,
    *,
    torch_dtype: torch.dtype | None,
    variant: str | None,
) -> Any:
    cls = _component_class(name, class_name)
    where = f"{name} ({folder})"
    if issubclass(cls, diffusers.ModelMixin):
        return load_diffusers_model(cls, folder, where, torch_dtype=torch_dtype, variant=variant)
    stored_shapes(weight_files(folder, variant=variant))  # refuses damaged files
    module, info = cls.from_pretrained(
        folder,
        dtype=torch_dtype or "auto",
        variant=variant,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, all of them
    )
    check_loaded(module, info, where)
    return module.eval()


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load a tokenizer; without its files transformers would make an empty one."""
    names = {path.name for path in folder.iterdir()}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise FileNotFoundError(
            f"{folder} has no tokenizer.json, expected it, or vocab.json with merges.txt"
        )
    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise ValueError(f"{folder} is not a readable CLIP tokenizer: {error}") from error


def load_text(folder: Path, *, torch_dtype: torch.dtype = torch.float32) -> TextEncoders:
    """Open text_encoder/ and tokenizer/ of a model's folder, and the second ones where it has."""

    def load(name: str) -> Any:
        (cls,) = COMPONENT_CLASSES[name]
        return _load_model(name, cls.__name__, folder / name, torch_dtype=torch_dtype, variant=None)

    first = load("text_encoder"), _load_tokenizer(folder / "tokenizer")
    if not (folder / "text_encoder_2").is_dir():
        return TextEncoders(*first)
    return TextEncoders(*first, load("text_encoder_2"), _load_tokenizer(folder / "tokenizer_2"))
