"""One run a folder: the lock that keeps two runs out of one folder, and who fails inside it.

Signals are stop_signals.py's.
"""

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from accelerate import Accelerator

from latentdiff.atomic import remove_leftovers

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def open_run_folder(path: str, accelerator: Accelerator) -> Iterator[Path]:
    """Give a run's folder, locked; log which of several processes fails inside the block.

    The others then fail too, for want of it. ValueError when another run holds the folder.
    """
    folder = Path(path).expanduser()
    try:
        if not accelerator.is_main_process:
            yield folder
            return
        with RunLock(folder):
            remove_leftovers(folder)
            yield folder
    except Exception as error:
        if accelerator.num_processes > 1:
            rank, num = accelerator.process_index, accelerator.num_processes
            logger.error("rank %d of %d processes failed: %s", rank, num, error)
        raise


class RunLock:
    """Hold a run folder; ValueError names the holder when another run has it.

    The lock is the kernel's (flock on folder/.lock): it ends with the process, however that ends,
    and is not handed on to forked data workers. Take it in the main process only.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / ".lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self.path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read().strip() or "another process"
            raise ValueError(
                f"{self.path.parent} is in use by {holder}: wait for that run to end, or choose "
                "another output_dir"
            ) from None
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): see to it that no second run uses it",
                self.path.parent,
                error,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._file = file
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
