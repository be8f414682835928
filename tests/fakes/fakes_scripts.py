"""Scripts run in the tests' own process."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def run_script(name: str, *arguments: object) -> Any:
    """Run a script as a command would, in this process; return its exit status."""
    argv, sys.argv = sys.argv, [name, *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    finally:
        sys.argv = argv
    return stop.value.code
