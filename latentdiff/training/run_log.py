"""log.txt of a run folder: every line that a run logs, with its time, and the error that ended it.

A blank line begins the lines of another session, as after a resume.
"""

import contextlib
import logging
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType

LOG = "log.txt"
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) ([A-Z]+) (.*)")
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


class RunLog(logging.Handler):
    """Write what this package logs inside the block into the folder's log.txt.

    Lines are kept until the run has begun, so that a refused run leaves the folder as it was. A
    full disk loses lines and does not stop training.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path, self._has_begun = folder / LOG, False
        self._kept: list[str] = []
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", TIME_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """Append a line once the run has begun."""
        self._kept.append(self.format(record) + "\n")
        if self._has_begun:
            self._write()

    def begin(self) -> None:
        """Write the lines so far, after a blank one where another session wrote before."""
        if self.path.is_file():
            self._kept.insert(0, "\n")
        self._has_begun = True
        self._write()

    def _write(self) -> None:
        with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.writelines(self._kept)
        self._kept = []

    def __enter__(self) -> "RunLog":
        logging.getLogger("latentdiff").addHandler(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        logging.getLogger("latentdiff").removeHandler(self)
        if isinstance(error, Exception) and self._has_begun:
            self.handle(logging.makeLogRecord({"levelname": "ERROR", "msg": str(error)}))


def begin_run_log() -> None:
    """Let the log of the run folder that is open write from here on: its run is not refused."""
    for handler in logging.getLogger("latentdiff").handlers:
        if isinstance(handler, RunLog):
            handler.begin()


@dataclass(frozen=True)
class LogEntry:
    """A logged message; session: counted from 0, one more after each resume."""

    time: datetime
    level: str
    message: str
    session: int


def read_log(folder: Path) -> list[LogEntry]:
    """Return the entries of a run folder's log.txt; none where there is no such file."""
    path, entries, session = folder / LOG, list[LogEntry](), 0
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        if match := LINE.fullmatch(line):
            time = datetime.strptime(match[1], TIME_FORMAT)
            entries.append(LogEntry(time, match[2], match[3], session))
        elif not line:
            session += 1
        elif entries:
            last = entries.pop()
            more = f"{last.message}\n{line}"
            entries.append(LogEntry(last.time, last.level, more, last.session))
    return entries
