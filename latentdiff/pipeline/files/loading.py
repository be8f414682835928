"""Loading and saving a pipeline by diffusers' loaders, with safetensors only; see also adapters.py.

Pickles are never opened. A missing weight is an error that names it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from diffusers import AutoencoderTiny, ControlNetModel, MultiControlNetModel
from diffusers.loaders import FromSingleFileMixin
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from torch import nn

from latentdiff.atomic import atomic_files, write_text
from latentdiff.models.compatibility import (
    CONTROLNET,
    check_compatible,
    condition_kinds,
    read_configs,
    read_json,
)
from latentdiff.models.components import Components, Download, choose_vae, load_parts
from latentdiff.models.latents import LatentCodec
from latentdiff.models.model_path import (
    BUNDLED,
    model_of_run,
    not_fetched,
    refuse_wrong_path,
    resolve_model,
)
from latentdiff.models.save import complete_component, remove_origin
from latentdiff.models.unet.controlnet import check_controlnet, open_controlnet
from latentdiff.models.weights import check_weights
from latentdiff.pipeline.files.adapters import AdaptersMixin
from latentdiff.pipeline.files.model_card import folder_title, model_card
from latentdiff.pipeline.files.model_info import (
    FILE_NAME,
    ModelInfo,
    read_model_info,
    write_model_info,
)
from latentdiff.pipeline.files.prediction_marks import check_folder
from latentdiff.pipeline.files.single_file import open_single_file, restore_distilled
from latentdiff.pipeline.files.stock_format import (
    extra_entries,
    info_of_stock,
    of_stock,
    scale_as_stock,
    stock_class,
    write_extras,
)

PathLike: TypeAlias = str | os.PathLike[str]


class LoadingMixin(AdaptersMixin, FromSingleFileMixin):
    """Loading and saving of a pipeline; a mixin for DiffusionPipeline."""

    model_info: ModelInfo
    vae: Any
    unet: Any
    text_encoder: Any
    text_encoder_2: Any
    controlnet: Any

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        requires_safety_checker: bool = True,
        controlnet: Any = None,
        **components: Any,
    ) -> Self:
        """Open a Stable Diffusion or SDXL folder, a model that ships, or fetch one from the hub.

        A training run's folder stands for the model that it exported.

        dtype: of the weights, float32 by default; torch_dtype is its older name. variant: of the
        weight files, such as "fp16". components: vae, unet, scheduler and so on, in the place of
        the stored ones, which are not loaded; None leaves one out, as in safety_checker=None. vae
        may be a name too: "tiny" for the AutoencoderTiny that the folder carries in vae_tiny/, or
        the folder or hub id of a VAE of the same latents. controlnet: as of `load_controlnet`, by
        default, None, those that the folder holds; [] leaves them out. requires_safety_checker is
        noted in what is saved. Raises FileNotFoundError or ValueError where a file or a weight is
        missing, damaged, a pickle, or does not fit, or the folder states two prediction types.
        """
        dtype = _one_dtype(dtype, torch_dtype)
        if unknown := sorted(components.keys() - {one.name for one in fields(Components)}):
            raise TypeError(f"from_pretrained() knows no argument {', '.join(unknown)}")
        if not use_safetensors:
            raise ValueError("use_safetensors=False would open pickles, which can run any code")
        if os.fspath(pretrained_model_name_or_path) not in BUNDLED:
            pretrained_model_name_or_path = model_of_run(pretrained_model_name_or_path)
            refuse_wrong_path(pretrained_model_name_or_path, known=BUNDLED)
        path = os.fspath(resolve_model(pretrained_model_name_or_path))
        if isinstance(vae := components.get("vae"), str):
            model = os.fspath(pretrained_model_name_or_path)  # as it was named, for messages
            components["vae"] = choose_vae(model, vae, torch_dtype=dtype)
        if not os.path.isdir(path):
            path = _fetch(
                path,
                components | ({} if controlnet is None else {CONTROLNET: controlnet}),
                variant=variant,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        index = read_json(Path(path) / "model_index.json")
        info = info_of_stock(read_model_info(path), Path(path), index)
        scheduler = read_configs(Path(path), without=components).get("scheduler", {})
        check_folder(path, scheduler, info.prediction_type)
        parts = load_parts(path, components, torch_dtype=dtype, variant=variant)
        pipe: Any = cls(**parts, requires_safety_checker=requires_safety_checker)
        pipe.register_to_config(_name_or_path=os.fspath(pretrained_model_name_or_path))
        pipe.model_info = info
        if pipe.condition_kind == "instruct_pix2pix":
            _check_same_vae(pipe.vae, index)
        scale_as_stock(pipe.vae, index)
        hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        if controlnet is None:
            controlnet = _stored_controlnets(Path(path), index, variant=variant, dtype=dtype)
        if controlnet not in ([], ()):
            pipe._load_controlnets(controlnet, hub=hub | {"force_download": force_download})
        return pipe

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        config: str | os.PathLike[str] | None = None,
        prediction_type: str | None = None,
        zero_terminal_snr: bool | None = None,
        vae: Any = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Open one local .safetensors file of a whole Stable Diffusion or SDXL model, offline.

        config: a folder with the components' configs, by default those of the model family that
        the weights' shapes tell. prediction_type, zero_terminal_snr: by default what the file
        states, by its entries v_pred and ztsnr or its metadata; one that states nothing predicts
        epsilon, of Stable Diffusion 2 "v_prediction" (768 px; pass "epsilon" for the 512 px base
        models). vae: a loaded one in place of the file's, or where the file has none. Raises
        FileNotFoundError or ValueError for another kind of file, missing weights, or one that
        states two prediction types.
        """
        path, dtype = Path(pretrained_model_link_or_path), _one_dtype(dtype, torch_dtype)
        parts = open_single_file(
            path,
            config=None if config is None else Path(config),
            prediction_type=prediction_type,
            zero_terminal_snr=zero_terminal_snr,
            vae=None if vae is None else vae.to(dtype),
            dtype=dtype,
        )
        pipe: Any = cls(**parts)
        pipe.register_to_config(_name_or_path=str(path))
        restore_distilled(pipe, path)
        return pipe

    @property
    def condition_kind(self) -> str:
        """The kind of image that the U-Net reads, as its file says or its channels; else "none"."""
        if self.unet is None:
            return "none"
        kinds = condition_kinds(self.unet.config, latent_channels=self.num_channels)
        known = self.model_info.condition_kind
        return known if known in kinds else [*kinds, "none"][0]

    def to_json_string(self) -> str:
        """Return model_index.json, with the class name that stock diffusers opens the folder by."""
        name = self.stock_class_name
        config = self._of_stock(json.loads(super().to_json_string())) | {"_class_name": name}
        config |= extra_entries(name, self.model_info)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @property
    def components(self) -> dict[str, Any]:
        """The components by name, those alone that the stock class of this kind has."""
        return self._of_stock(super().components)

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings by name, those alone that the stock class of this kind has."""
        return self._of_stock(super().parameters)

    @property
    def controlnets(self) -> list[ControlNetModel]:
        """The ControlNets that are loaded."""
        if self.controlnet is None:
            return []
        nets = self.controlnet.nets if isinstance(self.controlnet, MultiControlNetModel) else None
        return [self.controlnet] if nets is None else list(nets)

    def load_controlnet(
        self, controlnet: ControlNetModel | PathLike | Sequence[ControlNetModel | PathLike]
    ) -> None:
        """Load a ControlNet in place of those before: a folder, a run, a hub id, a loaded one.

        Several, in a list, add up; a call gives an image for each. FileNotFoundError or ValueError
        where one cannot be opened or is of another model. A loaded one is moved to this model's
        device and dtype.
        """
        self._load_controlnets(controlnet, hub={})

    def _load_controlnets(self, controlnet: Any, *, hub: dict[str, Any]) -> None:
        """Do what load_controlnet says. hub: options of fetching from the hub."""
        given = list(controlnet) if isinstance(controlnet, (list, tuple)) else [controlnet]
        if isinstance(controlnet, MultiControlNetModel):
            given = list(controlnet.nets)
        if not given:
            raise ValueError("controlnet is an empty list; pass one, or call unload_controlnet()")
        if any(hasattr(part, "_hf_hook") for part in self.components.values()):
            raise ValueError(
                "the model is offloaded, and a ControlNet that comes now would not be: load it "
                "before enable_model_cpu_offload() or enable_sequential_cpu_offload()"
            )
        nets = []
        for one in given:
            net: Any = one
            if isinstance(one, (str, os.PathLike)):
                net = open_controlnet(one, torch_dtype=self.unet.dtype, hub=hub)
            nets.append(net)
        self._check_controlnets(nets)
        for net in nets:
            net.to(self.unet.device)
            if net.dtype != self.unet.dtype:  # diffusers warns of each cast
                net.to(self.unet.dtype)
        self.register_modules(controlnet=nets[0] if len(nets) == 1 else MultiControlNetModel(nets))

    def unload_controlnet(self) -> None:
        """Sample without a ControlNet again."""
        self.register_modules(controlnet=None)

    def _check_controlnets(self, nets: Sequence[Any]) -> None:
        """Raise ValueError where ControlNets are of another model than the one that is here."""
        if not nets or self.unet is None or self.vae is None:
            return
        if self.condition_kind != "none":
            raise ValueError(
                f"this model is of the kind {self.condition_kind} and reads an image itself; a "
                "ControlNet steers models of text alone"
            )
        for net in nets:
            check_controlnet(net, self.unet, factor=LatentCodec(self.vae).factor)

    @property
    def stock_class_name(self) -> str:
        """The pipeline of diffusers that opens what is saved, else our own class' name."""
        kind = CONTROLNET if self.controlnet is not None else self.condition_kind
        return stock_class(kind, is_sdxl=self.is_sdxl, vae=self.vae)

    @property
    def stated_info(self) -> ModelInfo:
        """The model's info as what is saved states it: of the kind that the pipeline is now."""
        kind = CONTROLNET if self.controlnet is not None else self.condition_kind
        return replace(self.model_info, condition_kind=None if kind == "none" else kind)

    def _of_stock(self, named: dict[str, Any]) -> dict[str, Any]:
        return of_stock(named, self.stock_class_name)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write a folder that stock diffusers opens, with the model's info and a model card.

        Programs with transformers 4 read it as well. Weights keep their dtype; whoever opens the
        folder without naming one gets float32 for all components. It names no path of this
        machine. A README.md that is there already stays as it is.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write pickles; leave it True")
        loaded: dict[str, list[str]] = self.get_list_adapters()
        if adapters := sorted({name for names in loaded.values() for name in names}):
            raise ValueError(
                f"the LoRA {', '.join(adapters)} is loaded, and a folder holds plain weights: call "
                "fuse_lora() and then unload_lora_weights() to keep it, or the latter alone"
            )
        final = Path(save_directory)
        with atomic_files(final) as folder:
            super().save_pretrained(str(folder), variant=variant, max_shard_size=max_shard_size)
            for name, part in self.components.items():
                complete_component(
                    part, folder / name, variant=variant, max_shard_size=max_shard_size
                )
            write_extras(self, folder, self.stock_class_name, variant=variant)
            for path in (folder, *folder.glob(f"{CONTROLNET}_*")):
                remove_origin(path)
            info = self.stated_info
            if info != ModelInfo():
                write_model_info(folder, info)
            if not (final / "README.md").exists():
                title, stock = folder_title(final), self.stock_class_name
                write_text(folder / "README.md", model_card(info, name=title, stock=stock))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload a LatentDiff pipeline",
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        variant: str | None = None,
    ) -> str:
        """Upload the pipeline with its model card to a hub repository; return the commit's URL."""
        hub = HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as scratch:
            card = model_card(self.stated_info, name=repo_id, stock=self.stock_class_name)
            write_text(Path(scratch) / "README.md", card)
            self.save_pretrained(scratch, variant=variant)
            commit = hub.upload_folder(
                repo_id=repo_id,
                folder_path=scratch,
                commit_message=commit_message,
                create_pr=create_pr,
            )
        return str(commit.commit_url)

    def _check_fit(self) -> None:
        """Raise ValueError where components do not fit each other, by their configs alone."""
        if self.vae is not None:
            LatentCodec(self.vae)  # checks its class
        configs = {
            "vae": self.vae and dict(self.vae.config),
            "unet": self.unet and dict(self.unet.config),
            "text_encoder": self.text_encoder and self.text_encoder.config.to_dict(),
            "text_encoder_2": self.text_encoder_2 and self.text_encoder_2.config.to_dict(),
        }
        check_compatible({name: config for name, config in configs.items() if config is not None})
        self._check_controlnets(self.controlnets)

    def _check_components(self) -> None:
        """Raise ValueError where components do not fit each other, or a weight is missing."""
        self._check_fit()
        for name, module in self.components.items():
            if isinstance(module, nn.Module) and not hasattr(module, "_hf_hook"):
                check_weights(module, name)


def _check_same_vae(vae: Any, index: dict[str, Any]) -> None:
    """Raise ValueError for a tiny VAE that is not a model's own, where it encodes a condition.

    Such a model reads latents without their scale, which a tiny VAE's have in them.
    """
    own = (index.get("vae") or ["", ""])[1]
    if isinstance(vae, AutoencoderTiny) and own != AutoencoderTiny.__name__:
        raise ValueError(
            "this model edits images by the latents of its own VAE, which a tiny VAE gives at "
            "another scale; leave vae out"
        )


def _stored_controlnets(
    folder: Path, index: dict[str, Any], *, variant: str | None, dtype: torch.dtype
) -> list[ControlNetModel]:
    """Open the ControlNets that a model's index names."""
    if not all(index.get(CONTROLNET) or [None]):
        return []
    folders = [folder / CONTROLNET, *sorted(folder.glob(f"{CONTROLNET}_[0-9]*"))]
    return [open_controlnet(one, torch_dtype=dtype, variant=variant) for one in folders]


def _one_dtype(dtype: Any, torch_dtype: Any) -> torch.dtype:
    """Return the dtype under either of its names, float32 where there is none."""
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise ValueError(
            f"dtype={dtype} and torch_dtype={torch_dtype} contradict; pass dtype alone"
        )
    chosen = torch_dtype if dtype is None else dtype
    if chosen is not None and not isinstance(chosen, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype such as torch.bfloat16, got {chosen!r}")
    return chosen or torch.float32


def _fetch(path_or_id: str, given: dict[str, Any], *, variant: str | None, **where: Any) -> str:
    """Return the local folder of a hub repository, with its latentdiff.json where it has one.

    given: components that need not be fetched.
    """
    try:
        options = where | {"variant": variant, "use_safetensors": True} | given
        folder = Download.download(path_or_id, **options)
        stored = read_json(Path(folder) / "model_index.json").get(CONTROLNET) or []
        if MultiControlNetModel.__name__ in stored and CONTROLNET not in given:
            patterns = [f"{CONTROLNET}_*/config.json"]  # of the others than the first
            snapshot_download(path_or_id, allow_patterns=patterns, **where)
    except (OSError, ValueError, HFValidationError) as error:
        raise not_fetched(path_or_id, error) from error
    with contextlib.suppress(EntryNotFoundError):  # most models have none
        hf_hub_download(path_or_id, FILE_NAME, **where)
    return os.fspath(folder)
