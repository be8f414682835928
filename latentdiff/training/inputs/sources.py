"""Where a run's images come from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from latentdiff.config.data import DataConfig
from latentdiff.data.folder.folder import Folder, read_folder


def read_data(
    data: DataConfig, *, prompts: Sequence[str] = (), trust_index: bool = False
) -> tuple[Folder, Folder]:
    """Read the folder; return training and held-out records. ValueError names its problems.

    prompts: captions of all images, which then need none of their own. trust_index: take the
    scan that another process has just made.
    """
    if prompts:
        data = replace(data, missing_caption="empty")
    if not data.root:
        raise ValueError("data.root is empty, expected a captioned folder; give --data.root=DIR")
    folder = read_folder(
        Path(data.root).expanduser(),
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
        cache_dir=Path(data.cache_dir).expanduser(),
        trust_index=trust_index,
    )
    folder.check(max_invalid_fraction=data.max_invalid_fraction)
    folder = folder.with_captions(prompts) if prompts else folder
    train = folder.split("train")
    if not len(train):
        raise ValueError(f"the data folder {data.root} has no image in its training split")
    return train, folder.heldout()
