"""What only POSIX systems have is not needed to import the package, nor to write its files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AS_ON_WINDOWS = """
import importlib, os, pkgutil, signal, sys
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

def import_all():
    import latentdiff
    for module in pkgutil.walk_packages(latentdiff.__path__, "latentdiff."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

import_all()  # what other packages import on their own is their business
for name in [name for name in sys.modules if name.partition(".")[0] == "latentdiff"]:
    del sys.modules[name]
for name in ("fcntl", "grp", "pty", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None
for name in ("fork", "getuid", "register_at_fork", "sched_getaffinity", "statvfs"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "pthread_sigmask"):
    delattr(signal, name)
import_all()

from torch.utils.data import DataLoader
from latentdiff.atomic import atomic_folder, remove_leftovers
from latentdiff.training.inputs.workers import ignore_signals, start_workers
from latentdiff.training.metrics_log import MetricsLog
from latentdiff.training.run_folder import RunLock

folder = Path(sys.argv[1])
with RunLock(folder), atomic_folder(folder / "whole") as temporary:
    (temporary / "file").write_text("written")
remove_leftovers(folder)
MetricsLog(folder, is_main=True, first_step=0).close()
ignore_signals(0)
assert list(start_workers(DataLoader([1, 2]))) == [1, 2]
print((folder / "whole" / "file").read_text())
"""


@pytest.mark.slow
def test_package_imports_and_writes_without_what_windows_lacks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AS_ON_WINDOWS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["written"]


def test_no_path_of_one_system_is_written_into_the_code() -> None:
    """Linux' shared memory is looked at where it is there, and nothing is written into it."""
    found = [
        f"{path}: {text}"
        for path in (ROOT / "latentdiff").rglob("*.py")
        for text in re.findall(
            r"[\"'](?:/tmp|/var|/home|/dev(?!/shm)|C:)\b.*", path.read_text("utf-8")
        )
    ]
    assert not found
