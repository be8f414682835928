"""What a run starts from, hashed: a base model, a VAE and text encoder, a LoRA or an embedding."""

import logging
import re
from pathlib import Path
from typing import Any

from latentdiff.config.finetune import FinetuneConfig
from latentdiff.config.text_to_image import Config
from latentdiff.models.model_path import INDEX, resolve_model
from latentdiff.pipeline.files.model_info import BILL_NAME, CONTENT_NAME, public_name
from latentdiff.training.bill.bill import HEADER, WEIGHTS, canonical, digest
from latentdiff.training.bill.contents import bill_of_folder, file_entries

logger = logging.getLogger(__name__)
PARTS_OF_MODEL = (  # folders of a base model that training reads
    *("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"),
)
PARTS_OF = {"vae": ("vae",), "text_encoder": ("text_encoder", "tokenizer")}  # by role
READ = re.compile(  # files that a loader reads of a part: of no variant, and no pickle
    r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors|[^.]+(\.safetensors\.index)?\.json"
    r"|[^.]+\.(txt|model)"
)
BASES = {  # role to setting: what a run starts from
    "model": ("model", "pretrained"),
    "vae": ("model", "vae"),
    "text_encoder": ("model", "text_encoder"),
    "init_lora": ("finetune", "init_lora"),
    "init_embedding": ("finetune", "init_embedding"),
}


def base_hashes(config: Config) -> dict[str, dict[str, str]]:
    """Return name and sha256 of each model or file that a run starts from, by its role.

    The sha256 is empty where nothing can be hashed, of which a warning is logged; bill: the root
    of its own bill of materials, if it has one.
    """
    found = {}
    for role, (section, name) in BASES.items():
        path = getattr(getattr(config, section), name)
        if not path or (config.model.pretrained and role in PARTS_OF):
            continue
        found[role] = {"name": public_name(path), "sha256": hash_or_none(path, role)}
        if (own := _bill_root(path, role)) is not None:
            found[role]["bill"] = own
    return found


def _bill_root(path: str, role: str) -> str | None:
    """Return the root of a model's own bill; of a run's folder, of the part of that role."""
    try:
        folder = Path(resolve_model(path))
        own = bill_of_folder(folder) or bill_of_folder(folder / role)
    except (OSError, ValueError):
        return None
    return None if own is None else own[0].root


def hash_or_none(path: str, role: str) -> str:
    """Return the `base_hash`, "" with a warning where nothing can be hashed."""
    try:
        return base_hash(path, role=role)
    except (OSError, ValueError) as error:
        logger.warning("the bill of materials has no hash of %s: %s", path, error)
        return ""


def base_hash(path_or_id: str, *, role: str) -> str:
    """Return the sha256 (hex) of what training reads of a base model: configs, vocabularies and
    the tensors of its plain variant; of a file alone its tensors and metadata.

    role: one of BASES. Raises FileNotFoundError or ValueError where it has no weights.
    """
    if role.startswith("init_"):
        return digest(canonical(file_entries(_adapter(path_or_id, role), "")))
    folder = Path(resolve_model(path_or_id))
    if folder.is_file():
        return digest(canonical(file_entries(folder, "")))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path_or_id, local_files_only=True))
    found: dict[str, str] = {}
    for part in PARTS_OF.get(role, PARTS_OF_MODEL):
        is_alone = role in PARTS_OF and not (folder / role).is_dir()
        for path in _files_read(folder if is_alone else folder / part):
            found |= file_entries(path, f"{part}/{path.name}")
    found = {name: one for name, one in found.items() if not name.endswith(HEADER)}
    if not any(name.endswith(WEIGHTS) for name in found):
        raise FileNotFoundError(f"{path_or_id} holds no safetensors weights; check its path")
    if role == "model" and (folder / INDEX).is_file():
        found |= file_entries(folder / INDEX, INDEX)
    return digest(canonical(found))


def _files_read(part: Path) -> list[Path]:
    """Return the files of a component that a loader reads, all weights where none are plain."""
    files = sorted(path for path in part.glob("*") if path.is_file())
    files = [path for path in files if path.name not in (BILL_NAME, CONTENT_NAME)]
    found = [path for path in files if READ.fullmatch(path.name)]
    if any(path.suffix == WEIGHTS for path in found):
        return found
    return found + [path for path in files if path.suffix == WEIGHTS]


def _adapter(path_or_id: str, role: str) -> Path:
    from latentdiff.training.finetune.initial_weights import open_initial_file

    settings: dict[str, Any] = {role: path_or_id}
    file = open_initial_file(FinetuneConfig(**settings))
    assert file is not None  # as a path is given
    assert file.path is not None
    return file.path
