"""One run a folder: the lock that keeps two runs out of it, who fails inside, and what moves aside.

What a run leaves behind when it begins a branch or starts anew goes to previous/N, which is a run
folder too: --output_dir=RUN/previous/N continues it. Signals are stop_signals.py's.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from latentdiff.atomic import atomic_folder, remove_leftovers, try_lock, write_bytes
from latentdiff.training.run_log import LOG, RunLog

if TYPE_CHECKING:  # a report reads run folders without it
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

EXPORTS = (  # what a run writes at its end; glob patterns
    *("pipeline", "pipeline_learned_variance", "lora", "lora_kohya.safetensors"),
    *("learned_embeds.safetensors", "controlnet", "vae", "vae_tiny", "clip", "text_encoder"),
    *("metrics.json", "reconstructions_*.png"),
)
LOCK = ".lock"
BY_STEP = ("samples", "power_ema")  # folders of files named step-%09d...
PLAN, TRACKERS = "plan.json", "trackers.json"
RECORDS = ("config.yaml", "metrics.jsonl", PLAN)  # files of a branch and of what it leaves aside
STATE = (  # what it writes on the way
    *(*RECORDS, *BY_STEP, TRACKERS),
    *("tensorboard", "wandb", "tokenizer", "checkpoints"),
)
STEP = re.compile(r"step-(\d{9,})\b.*")


@contextlib.contextmanager
def open_run_folder(path: str, accelerator: Accelerator) -> Iterator[Path]:
    """Give a run's folder, locked; log which of several processes fails inside the block.

    The others then fail too, for want of it. ValueError when another run holds the folder.
    """
    folder = Path(path).expanduser()
    is_new = not folder.exists()
    try:
        if not accelerator.is_main_process:
            yield folder
            return
        with RunLock(folder), RunLog(folder):
            remove_leftovers(folder)
            yield folder
    except Exception as error:
        if accelerator.is_main_process and is_new:
            _remove_unused(folder)
        if accelerator.num_processes > 1:
            rank, num = accelerator.process_index, accelerator.num_processes
            logger.error("rank %d of %d processes failed: %s", rank, num, error)
        raise


def _remove_unused(folder: Path) -> None:
    """Remove the folder of a run that was refused before it wrote anything into it."""
    if {path.name for path in folder.glob("*")} <= {LOCK}:
        with contextlib.suppress(OSError):  # another run takes the folder at this moment
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()


class RunLock:
    """Hold a run folder; ValueError names the holder when another run has it.

    The lock is the kernel's (of folder/.lock): it ends with the process, however that ends,
    and is not handed on to forked data workers. Take it in the main process only.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / LOCK
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+", encoding="utf-8")
        try:
            is_free = try_lock(file.fileno())
        except OSError as error:
            is_free = True
            logger.warning(
                "%s cannot be locked (%s): see to it that no second run uses it",
                self.path.parent,
                error,
            )
        if not is_free:
            with file:
                file.seek(0)
                holder = file.read().strip() or "another process"
            raise ValueError(
                f"{self.path.parent} is in use by {holder}: wait for that run to end, or choose "
                "another output_dir"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._close)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.truncate(0)
        self._close()

    def _close(self) -> None:
        """Close our descriptor; in a forked child this leaves the parent's lock as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None


def exports_of(folder: Path) -> list[Path]:
    """Return what a run has exported into its folder."""
    return sorted(path for name in EXPORTS for path in folder.glob(name))


def has_leftovers(folder: Path) -> bool:
    """Return whether a folder holds anything that a run writes on its way."""
    return any((folder / name).exists() for name in STATE)


def next_previous(folder: Path) -> Path:
    """Return the folder that takes what is moved aside next."""
    numbers = itertools.count(1)
    return next(path for n in numbers if not (path := folder / "previous" / str(n)).exists())


def move_run_aside(folder: Path) -> None:
    """Move all that a run wrote to previous/N, so that another may start in its folder."""
    out = next_previous(folder)
    moved = [*exports_of(folder), *(folder / name for name in (*STATE, LOG))]
    _move([path for path in moved if path.exists()], folder, out)
    logger.warning("the run that %s held was moved to %s", folder, out)


def move_aside(folder: Path, *, after: int, checkpoints: Iterable[Path]) -> None:
    """Move what a run wrote after a step to previous/N, where a branch begins from there.

    Its checkpoints are given, and are moved last: until then the move is done again after a kill.
    The records up to the step belong to both, and are copied.
    """
    out = next_previous(folder)
    out.mkdir(parents=True)
    for name in (*RECORDS, LOG):
        if (folder / name).is_file():
            write_bytes(out / name, (folder / name).read_bytes())
    if (folder / "tensorboard").is_dir():
        with atomic_folder(out / "tensorboard") as copy:
            shutil.copytree(folder / "tensorboard", copy, dirs_exist_ok=True)
    later = [
        path
        for name in BY_STEP
        for path in sorted((folder / name).glob("step-*"))
        if (match := STEP.fullmatch(path.name)) and int(match[1]) > after
    ]
    checkpoints = list(checkpoints)
    if (folder / TRACKERS).is_file():  # the branch is another run there
        later.append(folder / TRACKERS)
    _move([*later, *exports_of(folder), *checkpoints], folder, out)
    names = ", ".join(path.name for path in checkpoints)
    logger.warning(
        "a branch begins after step %d: what %s held of another (%s) was moved to %s, which is a "
        "run folder too",
        *(after, folder, names, out),
    )


def _move(paths: Iterable[Path], folder: Path, out: Path) -> None:
    """Move files and folders to the same places below `out`."""
    for path in paths:
        target = out / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, target)
