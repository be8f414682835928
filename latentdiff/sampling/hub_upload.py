"""Upload of a model, a LoRA or an embedding to the Hugging Face Hub, with its card, in one commit.

The files go up as they lie here, none is copied. A card that a user wrote is kept; one that we made
is made again under the repository's name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public

from latentdiff.models.file_kind import EMBEDDING, LORA, describe, kind_of
from latentdiff.models.model_path import INDEX, model_of_run, refuse_wrong_path, resolve_model
from latentdiff.pipeline.files.adapter_file import (
    EMBEDDING_NAMES,
    LORA_NAMES,
    RUN_LORA,
    open_adapter,
    stored_metadata,
)
from latentdiff.pipeline.files.model_card import (
    adapter_card,
    bill_root_in,
    class_of_folder,
    folder_title,
    model_card,
)
from latentdiff.pipeline.files.model_info import (
    BILL_NAME,
    CONTENT_NAME,
    ModelInfo,
    read_model_info,
)
from latentdiff.sampling.release import refuse_local_paths

Part = Literal["model", "lora", "embedding"]
CARD, IMAGE = "README.md", "sample.png"
KOHYA = "lora_kohya.safetensors"
HUB = {"revision": None, "token": None, "cache_dir": None, "local_files_only": True}
REFUSED = (401, 403)
# the base of an HfHubHTTPError is the error of the HTTP client, whichever that is
FAILURES: tuple[type[BaseException], ...] = (OSError, *HfHubHTTPError.__bases__)


@dataclass(frozen=True)
class Upload:
    """What goes into a repository: files by their name there, and the card's text."""

    repo_id: str
    files: Mapping[str, Path]
    card: str

    def sizes(self) -> dict[str, int]:
        """Return bytes by name, the card's with them."""
        return {CARD: len(self.card.encode())} | {
            name: path.stat().st_size for name, path in self.files.items()
        }


class Hub(Protocol):
    """What is asked of the Hub's client."""

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
        """Create a repository, or leave one that is there as it is."""

    def create_commit(self, repo_id: str, operations: Any, **options: Any) -> Any:
        """Upload files in one commit."""


def plan_upload(
    source: str, repo_id: str, *, part: Part = "model", image: Path | None = None
) -> Upload:
    """Return what an upload would send; nothing is sent.

    source: a run's folder or a model's; for part="lora" or "embedding" a run's folder, or the file
    of one. image: shown at the top of the card. Raises ValueError or FileNotFoundError for a source
    that lacks the part, a config that names a path of this machine, or a name that the Hub refuses.
    """
    validate_repo_id(repo_id)
    if part == "model":
        files, card = _model(source, repo_id)
    else:
        files, card = _adapter(source, repo_id, part=part)
    if image is not None:
        if not image.is_file():
            raise FileNotFoundError(f"there is no image {image}; check the spelling")
        files[IMAGE] = image
        head, title, rest = card.partition("\n# ")
        heading, _, body = rest.partition("\n")
        card = f"{head}{title}{heading}\n\n![samples]({IMAGE})\n{body}" if title else card
    return Upload(repo_id, files, card)


def send(
    upload: Upload,
    *,
    private: bool | None = None,
    message: str = "Upload with LatentDiff",
    create_pr: bool = False,
    hub: Hub | None = None,
) -> str:
    """Create the repository if it is not there, upload all in one commit, return the commit's URL.

    private: of a repository that is created, by default as the account's. Raises ValueError where
    the Hub cannot be reached or refuses, with what to do.
    """
    client: Any = hub or HfApi()
    adds = [CommitOperationAdd(CARD, upload.card.encode())]
    adds += [CommitOperationAdd(name, path) for name, path in upload.files.items()]
    try:
        created = client.create_repo(upload.repo_id, private=private, exist_ok=True)
        commit = client.create_commit(
            created.repo_id, adds, commit_message=message, create_pr=create_pr
        )
    except FAILURES as error:
        raise ValueError(_reason(upload.repo_id, error)) from error
    return str(commit.commit_url)


def _model(source: str, repo_id: str) -> tuple[dict[str, Path], str]:
    folder = Path(resolve_model(source))
    if not (folder / INDEX).is_file():
        refuse_wrong_path(source, known=())
        raise FileNotFoundError(f"{source} is no folder here, and only what is here is uploaded")
    refuse_local_paths(folder)
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    info, written = read_model_info(folder), files.pop(CARD, None)
    text = written.read_text(encoding="utf-8") if written is not None else ""
    stock = class_of_folder(folder)
    make_card = partial(model_card, info, stock=stock, bill_root=bill_root_in(text))
    is_ours = text in ("", make_card(name=folder_title(folder)))
    return files, make_card(name=repo_id) if is_ours else text


def _adapter(source: str, repo_id: str, *, part: Part) -> tuple[dict[str, Path], str]:
    names = LORA_NAMES if part == "lora" else EMBEDDING_NAMES
    file = open_adapter(
        os.path.expanduser(source), names=names, weight_name=None, subfolder=None, **HUB
    )
    assert file.path is not None
    shapes = {name: tuple(tensor.shape) for name, tensor in file.weights.items()}
    if kind_of(shapes) is not (LORA if part == "lora" else EMBEDDING):
        raise ValueError(f"{file.path} is no {part}, it holds {describe(shapes)}")
    run = Path(source).expanduser()
    files = {RUN_LORA.name if part == "lora" else EMBEDDING_NAMES[0]: file.path}
    if part == "lora" and (run / KOHYA).is_file():
        files[KOHYA] = run / KOHYA
    beside = (file.path.with_name(name) for name in (BILL_NAME, CONTENT_NAME))
    files |= {path.name: path for path in beside if path.is_file()}
    model = Path(model_of_run(run))
    info = read_model_info(model) if model.is_dir() else ModelInfo()
    trigger = stored_metadata(file.path).get("modelspec.trigger_phrase", "")
    word = next(iter(file.weights)) if part == "embedding" else ""
    return files, adapter_card(
        info, name=repo_id, noun="LoRA" if part == "lora" else "embedding", trigger=trigger or word
    )


def _reason(repo_id: str, error: BaseException) -> str:
    """Return what went wrong, and what to do about it, in one sentence."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    owner = repo_id.partition("/")[0]
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is sent to the Hub: unset it"
    if isinstance(error, LocalTokenNotFoundError) or status in REFUSED:
        told = f" ({status})" if status else ""
        return (
            f"the Hub needs a token that may write to {owner}{told}: make one at "
            "https://huggingface.co/settings/tokens, then `hf auth login` or HF_TOKEN=..."
        )
    first = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"the upload to {repo_id} failed: {first}; the same command continues it"
