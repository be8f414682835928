"""SIGTERM and Ctrl-C: finish the step, save, exit 143 or 130.

A signal only says so at once and sets a mark that the loop reads between steps, so that a step is
finished and its state saved before the process leaves.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

NOTICE = {
    signal.SIGINT: b"\nfinishing this step and saving; Ctrl-C again quits without saving\n",
    signal.SIGTERM: b"\nSIGTERM: finishing this step and saving\n",
}
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class StopSignals:
    """Note SIGTERM and SIGINT instead of dying of them; read `received` between steps.

    A second SIGINT raises KeyboardInterrupt, for a person who will not wait. Launchers pass on a
    Ctrl-C that the terminal has sent to all of them already: what follows within `echo_s` seconds
    is the same one. announces: tell on stderr what happens now. Enter it in the main thread.
    """

    def __init__(self, *, echo_s: float = 1.0, announces: bool = False) -> None:
        self.received: int | None = None
        self.echo_s, self.announces = echo_s, announces
        self._first_at = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """What the process is to exit with: 143 after SIGTERM, 130 after SIGINT, else 0."""
        return 0 if self.received is None else 128 + self.received

    def __enter__(self) -> "StopSignals":
        assert threading.current_thread() is threading.main_thread()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._first_at = number, now
            if self.announces:  # past Python's buffers, which the signal may have interrupted
                with contextlib.suppress(OSError):
                    os.write(2, NOTICE[signal.Signals(number)])
        elif number == signal.SIGINT and now - self._first_at > self.echo_s:
            raise KeyboardInterrupt


def die_with_parent() -> bool:
    """Ask Linux for SIGTERM when the launcher dies, if that is `accelerate launch`; True if done.

    Its one-process launcher dies at once on SIGTERM and leaves the trainer running. torchrun passes
    signals on, and without a launcher the parent is a shell that may go: those are left alone.
    """
    under_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform != "linux" or not under_accelerate or under_torchrun:
        return False
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
            return False
        if os.getppid() != parent:  # it died before we asked
            os.kill(os.getpid(), signal.SIGTERM)
        return True
    return False
