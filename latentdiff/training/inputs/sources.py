"""Where a run's images come from: a captioned folder, or several sources of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from latentdiff.config.data import DataConfig
from latentdiff.config.model import ConditionFiles
from latentdiff.data.arrow.listing import Progress
from latentdiff.data.folder.folder import Folder, join_folders, read_folder


def read_data(
    data: DataConfig,
    *,
    condition: ConditionFiles = "none",
    inpaint_masks: bool = False,
    prompts: Sequence[str] = (),
    trust_index: bool = False,
) -> tuple[Folder, Folder]:
    """Read the images; return training and held-out records. ValueError names their problems.

    condition: how a condition must fit its image, where every image is to have one; inpaint_masks:
    whether it is to have an inpainting mask. prompts: captions of all images, which then need none
    of their own. trust_index: take the scan that another process has just made.
    """
    folders = read_sources(
        data,
        condition=condition,
        inpaint_masks=inpaint_masks,
        needs_captions=not prompts,
        trust_index=trust_index,
    )
    return split_sources(data, folders, prompts=prompts)


def split_sources(
    data: DataConfig, folders: Mapping[str, Folder], *, prompts: Sequence[str] = ()
) -> tuple[Folder, Folder]:
    """Return training and held-out records of the folders of `read_sources`, as `read_data`."""
    for folder in folders.values():
        folder.check(max_invalid_fraction=data.max_invalid_fraction)
    folder = join_sources(data, folders)
    folder = folder.with_captions(prompts) if prompts else folder
    train = folder.split("train")
    for source, name in enumerate(folders):
        if not (train.sources == source).any():
            raise ValueError(f"the data folder {name} has no image in its training split")
    return train, folder.heldout()


def read_sources(
    data: DataConfig,
    *,
    condition: ConditionFiles = "none",
    inpaint_masks: bool = False,
    needs_captions: bool = True,
    full: bool = False,
    trust_index: bool = False,
    progress: Progress | None = None,
) -> dict[str, Folder]:
    """Read the folder of each source, by its name; of data.root where there are no sources.

    needs_captions: False takes images without a caption too. The rest: as in `read_data` and
    `read_folder`.
    """
    folders: dict[str, Folder] = {}
    for settings in data.each_source():
        if settings.root in folders:
            raise ValueError(f"data.sources names {settings.root} twice; raise its repeats instead")
        own = settings if needs_captions else replace(settings, missing_caption="empty")
        folder = _read_source(
            own,
            condition,
            inpaint_masks=inpaint_masks,
            full=full,
            trust_index=trust_index,
            progress=progress,
        )
        folders[own.root] = folder
    return folders


def join_sources(data: DataConfig, folders: Mapping[str, Folder]) -> Folder:
    """Join the folders of `read_sources` to one, with the repeats of each source."""
    if not data.sources:
        return next(iter(folders.values()))
    return join_folders(
        list(folders.values()),
        repeats=[source.repeats for source in data.sources],
        cache_dir=Path(data.cache_dir).expanduser(),
    )


def find_images(folder: Folder, names: Sequence[str]) -> frozenset[int]:
    """Return the indices of the images of these names.

    A name is an image's id, or the end of one after a slash. ValueError for a name of none or of
    several images.
    """
    if not names:
        return frozenset()
    found: dict[str, list[int]] = {name: [] for name in names}
    for index, id in enumerate(folder.ids.to_pylist()):
        parts = id.split("/")
        for end in ("/".join(parts[k:]) for k in range(len(parts))):
            if end in found:
                found[end].append(index)
    for name, indices in found.items():
        if len(indices) > 1:
            both = " and ".join(folder[i].id for i in indices[:2])
            raise ValueError(f"{len(indices)} training images are named {name}, such as {both}")
        if not indices:
            raise ValueError(
                f"no training image of {folder.root} is named {name}, such as {folder[0].id}; "
                "held-out images are not trained on"
            )
    return frozenset(index for (index,) in found.values())


def source_weights(data: DataConfig) -> tuple[float, ...]:
    """Return the weight of each source, or nothing where they have none."""
    weights = tuple(source.weight for source in data.sources)
    return weights if any(weights) else ()


def _read_source(
    data: DataConfig,
    condition: ConditionFiles,
    *,
    inpaint_masks: bool,
    full: bool,
    trust_index: bool,
    progress: Progress | None,
) -> Folder:
    if not data.root:
        raise ValueError("data.root is empty, expected a captioned folder; give --data.root=DIR")
    return read_folder(
        data.root,
        caption_column=data.caption_column,
        file_column=data.file_column,
        duplicate_rows=data.duplicate_rows,
        sidecar_lines=data.sidecar_lines,
        caption_template=data.caption_template,
        missing_caption=data.missing_caption,
        repeat_folders=data.repeat_folders,
        follow_links=data.follow_links,
        heldout_fraction=data.heldout_fraction,
        min_size=data.min_size,
        max_aspect=data.max_aspect,
        mask=data.mask,
        condition=condition,
        condition_column=data.condition_column,
        inpaint_mask="file" if inpaint_masks else "none",
        inpaint_mask_column=data.inpaint_mask_column,
        cache_dir=Path(data.cache_dir).expanduser(),
        full=full,
        trust_index=trust_index,
        progress=progress,
    )
