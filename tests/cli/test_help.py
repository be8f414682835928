"""--help of every script answers at once: it waits for none of the large libraries."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))
HEAVY = ("torch", "diffusers", "transformers", "open_clip", "gradio", "matplotlib")
PROBE = """
import runpy, sys
script, *heavy = sys.argv[1:]
sys.argv = [script, "--help"]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    assert not end.code
print("loaded:", *(name for name in heavy if name in sys.modules))
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_loads_nothing_heavy(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(ROOT / "scripts" / name), *HEAVY],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "usage:" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "loaded:"
