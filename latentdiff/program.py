"""The name under which `latentdiff` can be typed here, for messages that suggest a command."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path


def program() -> str:
    """Return "latentdiff" where PATH finds it in this Python's environment, or else a path to it.

    `.venv/bin/latentdiff` in an environment that is not activated; "python -m latentdiff" where
    the package is not installed.
    """
    own = Path(sysconfig.get_path("scripts")) / f"latentdiff{'.exe' if os.name == 'nt' else ''}"
    if not own.is_file():
        return f"{Path(sys.executable).stem} -m latentdiff"
    found = shutil.which("latentdiff")
    if found and Path(found).samefile(own):
        return "latentdiff"
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)
