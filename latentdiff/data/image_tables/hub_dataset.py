"""Data sets of the Hugging Face Hub by their id, as folders of arrow files with the images inside.

The library `datasets` downloads a data set, once, and keeps it as arrow files in its own cache. A
folder next to them links those files, which table_folder.py maps; where the files hold only paths
of images, or more rows than are wanted, the rows are written there again, images and all.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from latentdiff.atomic import atomic_folder
from latentdiff.data.arrow.parquet_rows import bytes_of
from latentdiff.data.arrow.scan_index import settings_hash
from latentdiff.data.folder.caption_tables import CaptionRules
from latentdiff.data.folder.files import existing_path
from latentdiff.data.folder.metadata import COLUMN_HINTS
from latentdiff.data.image_tables.arrow_file import open_arrow
from latentdiff.data.image_tables.table_columns import (
    UnusableTableError,
    choose_columns,
    image_columns,
    is_text,
)

logger = logging.getLogger(__name__)
PAGE = r"(?P<page>(hf:|https?:/{1,2}huggingface\.co)/{1,2}datasets/)?"  # Path makes one of two /
HUB_ID = re.compile(
    PAGE + r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^,@]+))?(?P<options>(,[^,=]+=[^,=]+)*)"
)
SPELLING = "OWNER/NAME, OWNER/NAME@REVISION, or either with ,config=NAME and ,split=NAME after it"
DEFAULT_COLUMN = CaptionRules().caption_column


@dataclass(frozen=True)
class HubId:
    """Which data set, and which part of it; "" stands for the Hub's own choice, or all splits."""

    name: str
    revision: str = ""
    config: str = ""
    split: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        parts = {"config": self.config, "split": self.split}
        return self.name + revision + "".join(f",{k}={v}" for k, v in parts.items() if v)


def parse_hub_id(root: Path | str) -> HubId | None:
    """Read OWNER/NAME[@REVISION][,config=NAME][,split=NAME]; None for the path of a folder.

    A folder or file of that name goes first. hf://datasets/ or the address of the Hub's page may
    stand before the id. Raises ValueError for other options than config and split, and
    FileNotFoundError where OWNER is a folder here and nothing says that the Hub is meant.
    """
    found = HUB_ID.fullmatch(str(root))
    if found is None or existing_path(Path(root).expanduser()).exists():
        return None
    options = dict(part.split("=", 1) for part in found["options"].split(",")[1:])
    if unknown := options.keys() - {"config", "split"}:
        raise ValueError(f"data.root={root}: unknown option {min(unknown)}; expected {SPELLING}")
    hub = HubId(found["name"], found["revision"] or "", **options)
    above = Path(str(root)).parent
    if not found["page"] and above.is_dir():
        raise FileNotFoundError(
            f"the data folder {root} does not exist, but {above} does; check --data.root, or give "
            f"hf://datasets/{hub} for the data set of the Hugging Face Hub"
        )
    return hub


def open_hub_dataset(
    hub: HubId, rules: CaptionRules, *, trust_index: bool = False
) -> tuple[Path, CaptionRules]:
    """Download a data set where it is not here yet; return its folder, and rules for its columns.

    trust_index: take the version that another process has just opened, without asking the Hub.
    Raises FileNotFoundError for a missing data set or library, ValueError for a data set without
    an image or caption column, with the fix; the columns are checked before the download where the
    Hub lists them.
    """
    datasets = _library(hub)
    versions = Path(datasets.config.HF_DATASETS_CACHE) / "latentdiff" / _folder_name(hub)
    known = sorted(versions.glob("[!.]*"), key=lambda folder: folder.stat().st_mtime_ns)
    is_settled = known and (trust_index or datasets.config.HF_HUB_OFFLINE)
    builder = None if is_settled else _ask_hub(hub)
    if builder is None and not known:
        raise FileNotFoundError(_unreachable(hub))
    folder = known[-1] if builder is None else _download(builder, hub, rules, versions)
    with suppress(OSError):  # of a cache that others own
        os.utime(folder)
    return folder, _column_rules(_schema(folder), rules, hub)


def public_dataset_name(root: str) -> str:
    """Name a data set without its place on this machine: its id, or the folder's last part."""
    found = HUB_ID.fullmatch(root)
    is_folder = existing_path(Path(root).expanduser()).exists()
    return Path(root).name if found is None or is_folder else found["name"]


def _library(hub: HubId) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise FileNotFoundError(
            f"the data folder {hub} does not exist; where it is the id of a Hugging Face data set, "
            "install what reads it: pip install 'latentdiff[datasets]'"
        ) from error
    return datasets


def _ask_hub(hub: HubId) -> Any:
    """Return the builder of `datasets`; None where only its cache answers, for any revision."""
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    if hub.revision and datasets.config.HF_HUB_OFFLINE:
        return None
    with _plain_errors(hub):
        builder = datasets.load_dataset_builder(
            hub.name, hub.config or None, revision=hub.revision or None
        )
    return None if hub.revision and isinstance(builder, Cache) else builder


def _download(builder: Any, hub: HubId, rules: CaptionRules, versions: Path) -> Path:
    """Return the folder of the version that the builder is for, made where it is not there yet."""
    if builder.info.features is not None:
        _column_rules(builder.info.features.arrow_schema, rules, hub)
    folder = versions / settings_hash({"of": Path(builder.cache_dir).parts[-3:]})[:12]
    if folder.exists():
        return folder
    logger.info("the data set %s: downloading it to %s", hub, builder.cache_dir)
    with _plain_errors(hub):
        builder.download_and_prepare()
        opened = builder.as_dataset(split=hub.split or None)
    parts = opened if isinstance(opened, dict) else {"data": opened}
    _column_rules(next(iter(parts.values())).features.arrow_schema, rules, hub)
    _write(parts, folder, file_column=rules.file_column)
    return folder


def _folder_name(hub: HubId) -> str:
    """Name the folder of a data set's versions so that a person knows it."""
    name = str(hub).replace("/", "--")
    plain = re.sub(r"[^\w.=@,-]+", "-", name)
    return name if plain == name else f"{plain}-{settings_hash(vars(hub))[:8]}"


@contextmanager
def _plain_errors(hub: HubId) -> Iterator[None]:
    """Turn what `datasets` raises for a data set that it cannot open into one message."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except ConnectionError as error:
        raise FileNotFoundError(_unreachable(hub)) from error
    except DatasetNotFoundError as error:
        raise FileNotFoundError(
            f"data.root={hub} is neither a folder here nor a data set that the Hugging Face Hub "
            f"gives out: {_first_line(error)} Check the id; a gated or private one needs "
            "`hf auth login`, with access asked for on its page"
        ) from error
    except (DatasetsError, HfHubHTTPError, ValueError, RuntimeError) as error:
        fix = "give ,config=NAME after the id" if "config name" in str(error).lower() else ""
        fix = fix or "its page on the Hub shows which configs, splits and files it has"
        cause = error.__cause__ or error
        raise ValueError(
            f"the data set {hub} cannot be opened: {_first_line(cause)}. Fix: {fix}"
        ) from error


def _unreachable(hub: HubId) -> str:
    import datasets

    reason, fix = "the Hugging Face Hub cannot be reached", "check the network"
    if datasets.config.HF_HUB_OFFLINE:
        reason, fix = "HF_HUB_OFFLINE=1 forbids to ask the Hub", "start once without it"
    return (
        f"data.root={hub} is neither a folder here nor a data set in the cache, and {reason}; "
        f"check --data.root, or {fix}"
    )


def _first_line(error: BaseException) -> str:
    """Return an error's message as one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:400] + " ..."


def _column_rules(schema: pa.Schema, rules: CaptionRules, hub: HubId) -> CaptionRules:
    """Return the rules with the captions' column. ValueError where columns do not decide.

    Where data.caption_column is as by default and not there, a column of texts of another usual
    name is taken, or the only one of texts, if there is just one.
    """
    texts = [name for name in schema.names if is_text(schema.field(name).type)]
    texts = [name for name in texts if not name.startswith("__")]
    likely = [name for name in texts if name in COLUMN_HINTS] or texts
    is_default = rules.caption_column == DEFAULT_COLUMN
    if is_default and DEFAULT_COLUMN not in schema.names and len(likely) == 1:
        rules = replace(rules, caption_column=likely[0])
    try:
        chosen = choose_columns(schema, rules)
    except UnusableTableError as error:
        files = f"hf download {hub.name} --repo-type dataset --local-dir DIR"
        hint = "" if texts else f". Text files next to images: {files}, then --data.root=DIR"
        raise ValueError(f"the data set {hub}: {error.detail}{hint}") from error
    if chosen is None:
        raise ValueError(
            f"the data set {hub} has no column of images; its columns are: "
            f"{', '.join(schema.names)}"
        )
    return rules


def _write(parts: Mapping[str, Any], folder: Path, *, file_column: str) -> None:
    """Make a folder of arrow files, a folder in it for each part."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as temporary:
        for name, part in parts.items():
            files = [Path(file["filename"]) for file in part.cache_files]
            if _hold_images(files, num_rows=len(part), file_column=file_column):
                _link_files(files, temporary / name)
            else:
                part.save_to_disk(temporary / name)


def _hold_images(files: list[Path], *, num_rows: int, file_column: str) -> bool:
    """Return whether arrow files have just these rows, with the bytes of all their images."""
    found = 0
    for path in files:
        with open_arrow(path) as arrow:
            names = image_columns(arrow.schema, file_column)
            for batch in arrow.batches():
                found += len(batch)
                if any(bytes_of(batch.column(name)).null_count for name in names):
                    return False
    return found == num_rows


def _link_files(files: list[Path], folder: Path) -> None:
    """Give files a second name, which takes no space; copies where a disk has no such names."""
    folder.mkdir()
    for number, path in enumerate(files):
        place = folder / f"data-{number:05d}-of-{len(files):05d}.arrow"
        try:
            os.link(path, place)
        except OSError:
            shutil.copyfile(path, place)


def _schema(folder: Path) -> pa.Schema:
    """Return the schema of the first arrow file below a folder."""
    with open_arrow(min(folder.rglob("*.arrow"))) as arrow:
        return arrow.schema
