"""The safetensors file that is meant as a LoRA or an embedding: found here or on the hub, and read.

Nothing but safetensors is opened, whatever a file's name is. Does not answer for: what the weights
mean (lora_file.py, embedding_file.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import safe_open
from torch import Tensor

from latentdiff.models.model_path import hub_reason, is_local
from latentdiff.models.weights import PICKLES, SAFETENSORS_ERRORS, damage

PEFT_NAME, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA_NAMES = ("pytorch_lora_weights.safetensors", PEFT_NAME)
EMBEDDING_NAMES = ("learned_embeds.safetensors",)
RUN_LORA = Path("lora") / LORA_NAMES[0]  # in the folder of a training run
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class AdapterFile:
    """Weights by name, the file's name in messages, and its settings.

    path: where it lies, None for weights given as a dict. settings: peft's, by `lora_config`.
    """

    name: str
    weights: Mapping[str, Tensor]
    path: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def open_adapter(
    source: object,
    *,
    names: Sequence[str],
    weight_name: str | None,
    subfolder: str | None,
    **hub: Any,
) -> AdapterFile:
    """Read a file, the one of these names in a folder or a hub repository, or a dict of tensors.

    hub: revision, token, cache_dir and local_files_only. Raises FileNotFoundError where there is
    none, ValueError for a pickle, a damaged file, or a folder of several.
    """
    if isinstance(source, Mapping):
        return AdapterFile("the dict of weights", _checked_tensors(source))
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"expected a path, a hub id or a dict of tensors, got {type(source).__name__}"
        )
    if weight_name is not None:
        _refuse_other_suffix(Path(weight_name))
    path, where = Path(source), {"weight_name": weight_name, "subfolder": subfolder}
    if os.path.isfile(path):  # False for a name that no file can have
        found = path
    elif os.path.isdir(path):
        found = _file_in(path / (subfolder or ""), names, weight_name=weight_name)
    else:
        found = _fetch(os.fspath(source), names, **where, **hub)
    return _read(found)


def stored_metadata(path: Path) -> dict[str, str]:
    """Return the texts that a safetensors file holds next to its tensors."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _checked_tensors(source: Mapping[Any, Any]) -> dict[str, Tensor]:
    for name, tensor in source.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"the dict of weights holds {name!r}: {type(tensor).__name__}, expected names and "
                "tensors"
            )
    return dict(source)


def _file_in(folder: Path, names: Sequence[str], *, weight_name: str | None) -> Path:
    """Return the file that is meant in a folder here."""
    wanted = [weight_name] if weight_name is not None else [*names]
    if names is LORA_NAMES and weight_name is None:
        wanted.append(os.fspath(RUN_LORA))
    for name in wanted:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path.name for path in folder.glob("*") if path.suffix.lower() == SUFFIX)
    if len(found) == 1 and weight_name is None:
        return folder / found[0]
    if found and weight_name is None:
        raise ValueError(f"{folder} holds several files, {_some(found)}: choose one by weight_name")
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix.lower() in PICKLES)
    there = f"; there are {_some(found)}" if found else ""
    there += f"; {_some(pickles)} are pickles, which are not opened" if pickles else ""
    raise FileNotFoundError(f"{folder} holds no {' or '.join(map(str, wanted))}{there}")


def _fetch(
    repo_id: str,
    names: Sequence[str],
    *,
    weight_name: str | None,
    subfolder: str | None,
    **hub: Any,
) -> Path:
    """Return the file that is meant in a hub repository, fetched."""
    if is_local(repo_id) or "/" not in repo_id:
        raise FileNotFoundError(f"there is no file or folder {repo_id}; check the spelling")
    options = hub | {"subfolder": subfolder}
    try:
        if weight_name is not None:
            return Path(hf_hub_download(repo_id, weight_name, **options))
        for name in names:
            try:
                path = Path(hf_hub_download(repo_id, name, **options))
            except EntryNotFoundError:
                continue
            if name == PEFT_NAME:
                hf_hub_download(repo_id, PEFT_CONFIG, **options)
            return path
        files = HfApi(token=hub["token"]).list_repo_files(repo_id, revision=hub["revision"])
        found = [name for name in files if Path(name).suffix.lower() == SUFFIX]
        if len(found) == 1:
            return Path(hf_hub_download(repo_id, found[0], **hub))
    except (OSError, ValueError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{repo_id!r} is no file or folder here and could not be fetched from the hub: "
            f"{hub_reason(error)}"
        ) from error
    raise FileNotFoundError(
        f"the hub's {repo_id} holds {_some(found) or 'no .safetensors file'}, expected "
        f"{' or '.join(names)}: choose one by weight_name"
    )


def _read(path: Path) -> AdapterFile:
    _refuse_other_suffix(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except SAFETENSORS_ERRORS as error:
        raise ValueError(damage(path, error)) from error
    return AdapterFile(os.fspath(path), weights, path, _settings(path, metadata))


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the LoRA's settings: in diffusers' metadata, or in peft's file next to it."""
    text, place = metadata.get("lora_adapter_metadata"), f"the metadata of {path}"
    config = path.with_name(PEFT_CONFIG)
    if text is None and path.name == PEFT_NAME and config.is_file():
        text, place = config.read_text(encoding="utf-8", errors="replace"), os.fspath(config)
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{place} must be a JSON object, got {type(settings).__name__}")
    return settings


def _refuse_other_suffix(path: Path) -> None:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run any code when it is opened; convert it to {SUFFIX}"
        )
    if suffix != SUFFIX:
        raise ValueError(f"{path} is no {SUFFIX} file, and only those are opened")


def _some(names: Sequence[str], *, limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
