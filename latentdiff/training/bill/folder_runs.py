"""What a VAE or a CLIP was trained on, hashed: folders, settings, code, and what it began with.

As materials.py of text-to-image runs, whose settings say more about how images are chosen. Of a VAE
no caption counts. Loads no PyTorch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from latentdiff.config.clip import ClipConfig
from latentdiff.config.io import to_dict
from latentdiff.config.vae import VaeConfig
from latentdiff.data.arrow.listing import Progress
from latentdiff.data.folder.content_hash import file_hashes
from latentdiff.data.folder.folder import Folder, read_folder
from latentdiff.pipeline.files.model_info import public_name
from latentdiff.training.bill.base import hash_or_none
from latentdiff.training.bill.bill import OF_CLIP, OF_VAE, Leaf, Segment, images_root, make_leaf
from latentdiff.training.bill.materials import (
    Materials,
    code_facts,
    each_text,
    log_progress,
    nfc,
    segments_of,
)
from latentdiff.training.bill.training_content import content_page

FolderConfig = VaeConfig | ClipConfig
KINDS: dict[str, type[FolderConfig]] = {  # by what they export
    **dict.fromkeys(OF_VAE, VaeConfig),
    **dict.fromkeys(OF_CLIP, ClipConfig),
}
BASES = {"vae": "pretrained", "lpips": "lpips"}  # role to setting
NOT_IN_BILL = (  # settings of a machine, of measurements, or of the bill itself
    *("output_dir", "resume", "report_to", "tracker_project_name", "log_every_steps", "features"),
    *("num_workers", "checkpoint_every_steps", "keep_checkpoints", "bill_of_materials"),
    "max_minutes",
)
MAX_INVALID = 0.02  # share of a folder's images that may be unusable


def read_roots(kind: type[FolderConfig], roots: Sequence[str]) -> list[Folder]:
    """Read the folders of a VAE's or a CLIP's training, but for the check of their problems.

    A VAE needs no captions.
    """
    rules: dict[str, Any] = {"missing_caption": "empty"} if kind is VaeConfig else {}
    return [read_folder(root, **rules) for root in roots]


def gather_folder_materials(
    config: FolderConfig,
    folders: Sequence[Folder],
    *,
    machine: Mapping[str, Any],
    recorded: Sequence[Segment] = (),
    from_step: int = 0,
    trains: bool = True,
) -> Materials:
    """Hash what a run reads from now on; arguments as of `gather_materials`."""
    again = partial(
        folder_leaves,
        type(config),
        folders,
        keeps_names=config.bill_of_materials == "names",
    )

    def gather() -> Segment:
        base = _bases(config)
        num = sum(len(one.split("train")) + len(one.heldout()) for one in folders)
        root = images_root(again(progress=log_progress()))
        return Segment(
            code=code_facts() | {"machine": dict(machine)},
            base=base,
            data={"images": root, "num_images": num},
            content=content_page(
                base, dict(zip(config.roots, folders, strict=True)), filters=_filters(config)
            ),
        )

    own = public_folder_config(config)
    exported_as = {name: own[name] for name in ("save_dtype",) if name in own}
    before = [replace(one, config={**one.config, **exported_as}) for one in recorded]
    made = gather if trains else None
    return Materials(segments_of(before, config=own, from_step=from_step, gather=made), again)


def folder_leaves(
    kind: type[FolderConfig],
    folders: Sequence[Folder],
    *,
    keeps_names: bool = True,
    progress: Progress | None = None,
) -> Iterator[Leaf]:
    """Yield a leaf for each image of the folders, after reading its file; see `read_leaves`."""
    for number, folder in enumerate(folders):
        prefix = f"{number}/" if len(folders) > 1 else ""
        for split, part in (("train", folder.split("train")), ("heldout", folder.heldout())):
            images = file_hashes(part, progress=progress)
            for row, (name, captions) in enumerate(each_text(part)):
                yield make_leaf(
                    prefix + nfc(name),
                    split=split,
                    image=images[row].tobytes(),
                    captions=map(nfc, captions) if kind is ClipConfig else (),
                    keeps_name=keeps_names,
                )


def public_folder_config(config: FolderConfig) -> dict[str, Any]:
    """Return the settings of a run without what belongs to a machine; a base by its role."""
    plain = {name: one for name, one in to_dict(config).items() if name not in NOT_IN_BILL}
    plain["roots"] = [f"source {number + 1}" for number in range(len(config.roots))]
    for role, name in BASES.items():
        if plain.get(name):
            plain[name] = role
    return plain


def folder_config_of(
    kind: type[FolderConfig],
    plain: Mapping[str, Any],
    *,
    data: Sequence[str],
    bases: Mapping[str, str],
    folder: Path,
) -> FolderConfig:
    """Return a bill's settings for these data folders and bases by role, writing to `folder`.

    ValueError for another number of folders.
    """
    if len(data) != (num := len(plain["roots"])):
        raise ValueError(f"--data names {len(data)} folders, expected {num}, in the run's order")
    given = {name: bases[role] for role, name in BASES.items() if plain.get(name)}
    whole = {**plain, **given, "roots": tuple(data), "output_dir": str(folder)}
    lists = {name: tuple(one) for name, one in whole.items() if isinstance(one, list)}
    return kind(**{**whole, **lists, "report_to": "none"})


def _bases(config: FolderConfig) -> dict[str, dict[str, str]]:
    paths = {role: getattr(config, name, "") for role, name in BASES.items()}
    return {
        role: {"name": public_name(path), "sha256": hash_or_none(path, role)}
        for role, path in paths.items()
        if path
    }


def _filters(config: FolderConfig) -> Iterator[str]:
    yield f"at most {MAX_INVALID:.1%} of the images of a source may be unusable"
    if isinstance(config, ClipConfig):
        yield "images without a caption are skipped"
    else:
        yield "captions are not read"
