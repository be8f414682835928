"""What a text-to-image run is made of, hashed: the data folder, base models, settings and code.

Loads no PyTorch, so that `latentdiff verify` answers at once.
"""

import logging
import os
import platform
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from latentdiff.atomic import write_text
from latentdiff.config.io import to_dict
from latentdiff.config.text_to_image import Config
from latentdiff.data.arrow.columns import CHUNK_ROWS
from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.folder.content_hash import file_hashes, mask_hashes
from latentdiff.data.folder.folder import Companion, Folder
from latentdiff.data.image_tables.hub_dataset import public_dataset_name
from latentdiff.models.model_path import resolve_model
from latentdiff.pipeline.files.model_info import public_name
from latentdiff.training.bill.bill import (
    Bill,
    Leaf,
    canonical,
    digest,
    images_root,
    make_leaf,
    sign_file,
    sign_folder,
    tensors_digest,
    weight_files_below,
)
from latentdiff.training.bill.training_content import CONTENT_NAME, training_content
from latentdiff.training.inputs.sources import read_sources

logger = logging.getLogger(__name__)
BILL = "the bill of materials"  # in messages
PACKAGE = Path(__file__).parents[2]
LIBRARIES = (
    *("latentdiff", "torch", "diffusers", "transformers", "tokenizers", "accelerate", "peft"),
    *("safetensors", "numpy", "pillow", "pyarrow"),
)
BASE_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
PLAIN_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d+-of-\d+)?\.safetensors")
OWN_TO_A_MACHINE = {
    "": ("output_dir",),
    "data": ("cache_dir",),
    "finetune": ("class_images_dir",),
    "train": ("resume",),
}
MODEL_PATHS = {  # settings that may be paths, named without their place
    "model": ("pretrained", "vae", "text_encoder"),
    "finetune": ("init_lora", "init_embedding"),
    "preview": ("vae", "features"),
}


@dataclass(frozen=True)
class Materials:
    """What a run is made of, to be written with each model that it exports.

    bill: without its weights, which are to come, and its leaves; read_leaves: reads those again,
    so that they need no memory while the run trains; content: the summary in Markdown.
    """

    bill: Bill
    read_leaves: Callable[[], Iterator[Leaf]]
    content: str

    def sign_folder(self, folder: Path, *, artifact: str) -> str:
        """Write the bill and the summary into a model's folder; return the root."""
        write_text(folder / CONTENT_NAME, self.content)
        bill = replace(self.bill, leaves=self._leaves())
        return sign_folder(folder, bill, artifact=artifact).root

    def sign_file(self, path: Path) -> str:
        """Write the bill, without images, into the header of a file of weights; return the root."""
        return sign_file(path, self.bill).root

    def _leaves(self) -> tuple[Leaf, ...] | None:
        """Return the leaves; None, with a warning, where the data is not what it was any more."""
        try:
            leaves = tuple(self.read_leaves())
        except (OSError, ValueError) as error:
            logger.warning("%s lists no images, which cannot be read any more: %s", BILL, error)
            return None
        if images_root(leaves) == self.bill.images:
            return leaves
        logger.warning("%s lists no images: they have changed since training began", BILL)
        return None


def gather_materials(config: Config, *, machine: Mapping[str, Any]) -> Materials:
    """Hash what a run is made of, after its data was read. machine: `machine_facts`."""
    folders = read_data_folders(config, trust_index=True)
    logger.info("hashing the images for %s; data.bill_of_materials=none leaves it out", BILL)
    again = partial(
        read_leaves,
        folders,
        config,
        index_dir=Path(config.data.cache_dir).expanduser(),
        keeps_names=config.data.bill_of_materials == "names",
    )
    bill = Bill(
        config=public_config(config),
        code=code_facts() | {"machine": dict(machine)},
        base=base_hashes(config),
        images=images_root(again()),
        num_images=sum(len(one.split("train")) + len(one.heldout()) for one in folders.values()),
    )
    return Materials(bill, again, training_content(bill, folders, config))


def read_data_folders(config: Config, *, trust_index: bool = False) -> dict[str, Folder]:
    """Read the folder of each source as training does, but for the check of its problems."""
    return read_sources(
        config.data,
        condition=config.condition_files,
        inpaint_masks=config.condition.reads_mask_files,
        needs_captions=not config.finetune.instance_prompts,
        trust_index=trust_index,
    )


def read_leaves(
    folders: Mapping[str, Folder],
    config: Config,
    *,
    index_dir: Path | None = None,
    keeps_names: bool = True,
) -> Iterator[Leaf]:
    """Yield a leaf for each image that is trained on or held out, after reading its file.

    index_dir: where hashes of files are kept by size and time; None: every byte is read.
    """
    prompts = config.finetune.instance_prompts
    for number, source in enumerate(folders.values()):
        index = ScanIndex(index_dir, source.root) if index_dir is not None else None
        folder = source.with_captions(prompts) if prompts else source
        prefix = f"{number}/" if len(folders) > 1 else ""
        for split, part in (("train", folder.split("train")), ("heldout", folder.heldout())):
            images = file_hashes(part, index=index)
            companions = _companion_hashes(part, config, index)
            for row, (name, captions) in enumerate(_texts(part)):
                yield make_leaf(
                    prefix + _nfc(name),
                    split=split,
                    image=images[row].tobytes(),
                    captions=map(_nfc, captions),
                    companions=companions.get(row, ()),
                    keeps_name=keeps_names,
                )


def _texts(folder: Folder) -> Iterator[tuple[str, list[str]]]:
    """Yield each record's id and captions, with a part of them in memory at a time."""
    for start in range(0, len(folder), CHUNK_ROWS):
        part = folder[start : start + CHUNK_ROWS]
        yield from zip(part.ids.to_pylist(), part.captions.to_pylist(), strict=True)


def _companion_hashes(
    folder: Folder, config: Config, index: ScanIndex | None
) -> dict[int, list[bytes]]:
    """Return the hashes of the mask and the conditions of each record that has any."""
    found: dict[int, list[bytes]] = {}
    if config.data.mask == "file":
        for row, one in enumerate(mask_hashes(folder, index=index)):
            found.setdefault(row, []).append(one.tobytes())
    kinds: dict[Companion, bool] = {
        "condition": config.condition_files != "none",
        "inpaint_mask": config.condition.reads_mask_files,
    }
    for kind in (kind for kind, is_read in kinds.items() if is_read):
        files, begins = folder.companions(kind)
        hashes = file_hashes(files, index=index)
        for row in range(len(folder)):
            own = hashes[begins[row] : begins[row + 1]]
            found.setdefault(row, []).extend(one.tobytes() for one in own)
    return found


def public_config(config: Config) -> dict[str, Any]:
    """Return the settings of a run without what belongs to a machine: folders and places."""
    plain = to_dict(config)
    for section, names in OWN_TO_A_MACHINE.items():
        for name in names:
            (plain[section] if section else plain).pop(name)
    for source in (plain["data"], *plain["data"]["sources"]):
        source["root"] = source["root"] and public_dataset_name(source["root"])
    for section, paths in MODEL_PATHS.items():
        for name in paths:
            if value := plain[section][name]:
                plain[section][name] = public_name(value)
    return plain


def base_hashes(config: Config) -> dict[str, dict[str, str]]:
    """Return name and sha256 of each model or file that a run starts from, by its role.

    The sha256 is empty where the weights are not found, of which a warning is logged.
    """
    model, finetune = config.model, config.finetune
    files = {"init_lora": finetune.init_lora, "init_embedding": finetune.init_embedding}
    given = {"model": model.pretrained}
    if not model.pretrained:
        given |= {"vae": model.vae, "text_encoder": model.text_encoder}
    return {
        role: {"name": public_name(path), "sha256": _base_hash_or_none(path, role)}
        for role, path in (given | files).items()
        if path
    }


def _base_hash_or_none(path: str, role: str) -> str:
    try:
        return base_hash(path, role=role)
    except (OSError, ValueError) as error:
        logger.warning("%s has no hash of %s: %s", BILL, path, error)
        return ""


def base_hash(path_or_id: str, *, role: str) -> str:
    """Return the sha256 (hex) of the tensors of a base model, its plain variant, or of one file.

    role: "model" for U-Net, VAE and text encoders; "vae" or "text_encoder" for one of a model's
    folder or a folder of its own. Raises FileNotFoundError or ValueError where it has no weights.
    """
    folder = Path(resolve_model(path_or_id))
    if folder.is_file():
        return tensors_digest([folder], root=folder.parent)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path_or_id, local_files_only=True))
    if role == "model":
        files = [path for part in BASE_PARTS for path in _plain_weights(folder / part)]
    else:
        folder = folder / role if (folder / role).is_dir() else folder
        files = _plain_weights(folder)
    if not files and not (files := weight_files_below(folder)):
        raise FileNotFoundError(f"{path_or_id} holds no safetensors weights; check its path")
    return tensors_digest(files, root=folder)


def _plain_weights(folder: Path) -> list[Path]:
    """Return the weights of a component, of no variant where there are several."""
    files = sorted(folder.glob("*.safetensors"))
    return [path for path in files if PLAIN_WEIGHTS.fullmatch(path.name)] or files


def code_facts() -> dict[str, Any]:
    """Return the hash of this package's source and the versions of what computes with it."""
    sources = sorted(path for path in PACKAGE.rglob("*.py"))
    hashes = [[path.relative_to(PACKAGE).as_posix(), digest(_source(path))] for path in sources]
    return {
        "source": digest(canonical(hashes)),
        "python": platform.python_version(),
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
    }


def _source(path: Path) -> bytes:
    return path.read_bytes().replace(b"\r\n", b"\n")


def machine_facts(*, device: str, num_threads: int, num_processes: int) -> dict[str, Any]:
    """Return what equal bits depend on besides the code: processor, threads, device, processes."""
    return {
        "cpu": _cpu_name(),
        "device": device,
        "num_threads": num_threads,
        "num_processes": num_processes,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if os.access(info, os.R_OK) else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
