"""What a text-to-image run is made of, hashed: the data folder, base models, settings and code.

It is recorded when training begins and kept in the checkpoints, so that an export states what the
steps read, not what the folders hold by then. Loads no PyTorch.
"""

import json
import logging
import os
import platform
import re
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from latentdiff.atomic import write_text
from latentdiff.config.io import to_dict
from latentdiff.config.text_to_image import Config
from latentdiff.data.arrow.columns import CHUNK_ROWS
from latentdiff.data.arrow.listing import Progress
from latentdiff.data.arrow.scan_index import ScanIndex
from latentdiff.data.folder.content_hash import file_hashes, mask_hashes
from latentdiff.data.folder.folder import Companion, Folder
from latentdiff.pipeline.files.model_info import CONTENT_NAME
from latentdiff.training.bill.base import BASES, base_hashes
from latentdiff.training.bill.bill import (
    Bill,
    Leaf,
    Segment,
    canonical,
    digest,
    images_root,
    make_leaf,
)
from latentdiff.training.bill.contents import (
    attach_to_file,
    attach_to_folder,
)
from latentdiff.training.bill.training_content import training_content
from latentdiff.training.inputs.sources import read_sources

logger = logging.getLogger(__name__)
BILL = "the bill of materials"  # in messages
LOG_S = 30.0  # between two lines on the hashing
PACKAGE = Path(__file__).parents[2]
LIBRARIES = (  # that change bits
    *("latentdiff", "torch", "diffusers", "transformers", "tokenizers", "accelerate", "peft"),
    *("safetensors", "numpy", "pillow", "pyarrow", "datasets", "xformers", "bitsandbytes"),
    *("prodigyopt", "schedulefree"),
)
NOT_IN_BILL = {  # settings of a machine, of files for people, or of the bill itself
    "": ("output_dir", "preview"),
    "data": ("cache_dir", "num_workers", "bill_of_materials"),
    "finetune": ("class_images_dir", "lora_kohya"),
    "train": ("resume", "report_to", "tracker_project_name", "log_every_steps"),
}

TEXTS = {  # settings that people write, of which data.bill_of_materials=hashes tells hashes alone
    "data": ("trigger_word", "caption_prefix", "caption_suffix", "zero_weight_images"),
    "finetune": ("instance_prompts", "class_prompt"),
}
HIDDEN = "sha256:"  # before the hash of such a text


@dataclass(frozen=True)
class Materials:
    """What a run is made of, to be written with each model that it exports.

    segments: what its steps were made of; read_leaves: reads the last one's images again, so that
    they need no memory while the run trains.
    """

    segments: tuple[Segment, ...]
    read_leaves: Callable[[], Iterator[Leaf]]

    def to_json(self) -> list[dict[str, Any]]:
        """Return the segments as a checkpoint keeps them."""
        return [one.to_json() for one in self.segments]

    def attach_to_folder(self, folder: Path, *, artifact: str, lists_images: bool = True) -> str:
        """Write the bill and the summary into a model's folder; return the root.

        "" where the disk does not take it, which is logged: the model matters more. lists_images:
        each by itself, not their root alone.
        """
        try:
            contents = dict.fromkeys(_content(one) for one in self.segments)
            write_text(folder / CONTENT_NAME, "\n".join(contents))
            bill = Bill(self.segments, leaves=self._leaves() if lists_images else None)
            return attach_to_folder(folder, bill, artifact=artifact).root
        except OSError as error:
            logger.error("%s has no bill of materials: %s", artifact, error)
            return ""

    def attach_to_file(self, path: Path) -> None:
        """Write the bill, without images, into the header of a file of weights."""
        try:
            attach_to_file(path, Bill(self.segments))
        except OSError as error:
            logger.error("%s has no bill of materials: %s", path, error)

    def _leaves(self) -> tuple[Leaf, ...] | None:
        """Return the leaves; None, with a warning, where the data is not what it was any more."""
        if not (recorded := self.segments[-1].data):
            return None
        try:
            leaves = tuple(self.read_leaves())
        except (OSError, ValueError) as error:
            logger.warning("%s lists no images, which cannot be read any more: %s", BILL, error)
            return None
        if images_root(leaves) == recorded["images"]:
            return leaves
        logger.warning("%s lists no images: they have changed since they were trained on", BILL)
        return None


def _content(segment: Segment) -> str:
    return segment.content or "# Summary of training content\n\nNot recorded.\n"


def gather_materials(
    config: Config,
    folders: Mapping[str, Folder],
    *,
    machine: Mapping[str, Any],
    class_images: Folder | None = None,
    recorded: Sequence[Segment] | None = None,
    from_step: int = 0,
    trains: bool = True,
) -> Materials:
    """Hash what the run reads from now on. folders: of the sources; machine: `machine_facts`.

    recorded: what the checkpoint that the run starts from says of the steps before from_step, None
    where it says nothing; trains: whether any step follows, else what is recorded counts.
    """
    again = partial(
        read_leaves,
        folders,
        config,
        index_dir=Path(config.data.cache_dir).expanduser(),
        keeps_names=config.data.bill_of_materials == "names",
    )
    own = public_config(config)
    before = [replace(one, config=_exported_as(one.config, own)) for one in recorded or ()]

    def gather() -> Segment:
        logger.info("hashing the images for %s; data.bill_of_materials=none omits it", BILL)
        base = base_hashes(config)
        return Segment(
            code=code_facts() | {"machine": dict(machine)},
            base=base,
            data=_data_hashes(folders, again(progress=log_progress()), class_images),
            content=training_content(base, folders, config),
        )

    segments = segments_of(
        before, config=own, from_step=from_step, gather=gather if trains else None
    )
    return Materials(segments, again)


def segments_of(
    before: Sequence[Segment],
    *,
    config: Mapping[str, Any],
    from_step: int,
    gather: Callable[[], Segment] | None,
) -> tuple[Segment, ...]:
    """Return what a run was made of before from_step, and what `gather` finds from there on.

    before: as recorded, empty where nothing is; gather: None where no step follows.
    """
    before = list(before) or ([Segment()] if from_step else [])
    last = before[-1] if before else Segment()
    now = replace(gather() if gather else last, from_step=from_step, config=config)
    is_new = not before or not now.is_as(last)
    return (*before, *([now] if is_new else []))


def log_progress() -> Progress:
    """Return what logs how many files are hashed, every LOG_S seconds."""
    last = time.monotonic()

    def show(done: int, num: int) -> None:
        nonlocal last
        if time.monotonic() - last > LOG_S:
            last = time.monotonic()
            logger.info("hashed %s of %s images for %s", f"{done:,}", f"{num:,}", BILL)

    return show


def _data_hashes(
    folders: Mapping[str, Folder], leaves: Iterator[Leaf], class_images: Folder | None
) -> dict[str, Any]:
    num = sum(len(one.split("train")) + len(one.heldout()) for one in folders.values())
    found: dict[str, Any] = {"images": images_root(leaves), "num_images": num}
    if class_images is not None:
        found |= {"class_images": images_root(class_leaves(class_images))}
    return found


def _exported_as(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with what an export may choose when training is over: best or last."""
    if not before:
        return {}
    return {**before, "train": before["train"] | {"export": now["train"]["export"]}}


def read_data_folders(config: Config, *, progress: Progress | None = None) -> dict[str, Folder]:
    """Read the folder of each source as training does, but for the check of its problems."""
    return read_sources(
        config.data,
        condition=config.condition_files,
        inpaint_masks=config.condition.reads_mask_files,
        needs_captions=not config.finetune.instance_prompts,
        progress=progress,
    )


def read_leaves(
    folders: Mapping[str, Folder],
    config: Config,
    *,
    index_dir: Path | None = None,
    keeps_names: bool = True,
    progress: Progress | None = None,
) -> Iterator[Leaf]:
    """Yield a leaf for each image that is trained on or held out, after reading its file.

    index_dir: where hashes of files are kept by size and time; None: every byte is read.
    """
    prompts = config.finetune.instance_prompts
    if config.data.bill_of_materials == "hashes":
        prompts = tuple(hidden(prompts))
    for number, source in enumerate(folders.values()):
        index = ScanIndex(index_dir, source.root) if index_dir is not None else None
        folder = source.with_captions(prompts) if prompts else source
        prefix = f"{number}/" if len(folders) > 1 else ""
        for split, part in (("train", folder.split("train")), ("heldout", folder.heldout())):
            images = file_hashes(part, index=index, progress=progress)
            companions = _companion_hashes(part, config, index)
            for row, (name, captions) in enumerate(each_text(part)):
                yield make_leaf(
                    prefix + nfc(name),
                    split=split,
                    image=images[row].tobytes(),
                    captions=map(nfc, captions),
                    companions=companions.get(row, ()),
                    keeps_name=keeps_names,
                )


def class_leaves(folder: Folder) -> Iterator[Leaf]:
    """Yield a leaf for each class image of prior preservation."""
    hashes = file_hashes(folder)
    for row, (name, captions) in enumerate(each_text(folder)):
        yield make_leaf(name, split="class", image=hashes[row].tobytes(), captions=captions)


def each_text(folder: Folder) -> Iterator[tuple[str, list[str]]]:
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
    """Return the settings of a run without what belongs to a machine: folders and places.

    In place of the path or name of a model stands its role, under which `base_hashes` has it.
    """
    plain = to_dict(config)
    for section, names in NOT_IN_BILL.items():
        for name in names:
            (plain[section] if section else plain).pop(name)
    plain["data"]["root"] = ""
    for number, source in enumerate(plain["data"]["sources"]):
        source["root"] = f"source {number + 1}"
    for role, (section, name) in BASES.items():
        plain[section][name] = role if plain[section][name] else ""
    found: dict[str, Any] = json.loads(canonical(plain))
    if config.data.bill_of_materials == "hashes":
        for section, names in TEXTS.items():
            for part in (found[section], *found[section].get("sources", ())):
                part |= {name: hidden(part[name]) for name in names if name in part}
    return found


def hidden(text: Any) -> Any:
    """Return the hash of a text, or those of several; "" and None as they are."""
    if isinstance(text, list | tuple):
        return [hidden(one) for one in text]
    return text and HIDDEN + digest(text.encode())


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


def machine_facts(
    *, device: str, num_threads: int, num_processes: int, micro_batch_size: int
) -> dict[str, Any]:
    """Return what equal bits depend on besides the code.

    device: "cpu", or the name of the accelerator, whose sums are in no fixed order.
    """
    return {
        "cpu": _cpu_name(),
        "device": device,
        "num_threads": num_threads,
        "num_processes": num_processes,
        "micro_batch_size": micro_batch_size,
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


def nfc(text: str) -> str:
    """Return a text in the form of Unicode that is hashed."""
    return unicodedata.normalize("NFC", text)
