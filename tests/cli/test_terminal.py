"""Scripts show nothing of the libraries but errors."""

import subprocess
import sys
from pathlib import Path

SHOW = """
import sys
from latentdiff.terminal import quieten_libraries
quieten_libraries()
from transformers import CLIPTextModel
import diffusers, huggingface_hub, transformers
CLIPTextModel.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
for library in (diffusers, transformers):
    logger = library.utils.logging.get_logger(f"{library.__name__}.models")
    logger.warning("a warning")
    logger.error("an error")
print(huggingface_hub.utils.are_progress_bars_disabled())
"""


def test_bars_and_warnings_are_silent_and_errors_and_downloads_are_not(
    sd_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SHOW, str(sd_folder / "text_encoder"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"
    assert done.stderr.count("an error") == 2
    assert "a warning" not in done.stderr
    assert "it/s" not in done.stderr  # "Loading weights", "Writing model shards"
