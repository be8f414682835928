"""The name under which `latentdiff` can be typed here, for messages that suggest a command."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def program() -> str:
    """Return "latentdiff" where PATH finds it in this Python's environment, or else a path to it.

    `.venv/bin/latentdiff` in an environment that is not activated; "python -m latentdiff" where
    the package is not installed, with the path to this Python where PATH finds another.
    """
    own = Path(sysconfig.get_path("scripts")) / f"latentdiff{'.exe' if os.name == 'nt' else ''}"
    if not own.is_file():
        python = Path(sys.executable)
        is_found = shutil.which(python.name) == str(python)
        return f"{python.name if is_found else _shown(python)} -m latentdiff"
    found = shutil.which("latentdiff")
    if found and Path(found).samefile(own):
        return "latentdiff"
    return _shown(own)


def _shown(path: Path) -> str:
    """Return a path, from the current folder where it lies below that."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
