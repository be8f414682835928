"""Every module imports, and four noise images become a tiny training, a model and an image.

Run by CI with the wheel alone on systems where the tests do not run; exits 0 when all of it works.
"""

import importlib
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import latentdiff

# What the extras bring is not installed with the wheel alone.
EXTRAS = ("gradio", "matplotlib", "datasets", "wandb", "trackio", "webdataset")


def main() -> None:
    """Import, train two steps, sample."""
    for module in pkgutil.walk_packages(latentdiff.__path__, "latentdiff."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        for index in range(4):
            pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(photos / f"{index}.png")
            (photos / f"{index}.txt").write_text("a photo of noise", encoding="utf-8")
        run(folder, "configs")
        options = ["--train.max_steps=2", "--train.batch_size=2", "--preview.num_steps=2"]
        paths = ["--data.root=photos", "--data.cache_dir=cache", "--output_dir=run"]
        run(folder, "train", "--config", "lora_mini", *paths, *options)
        run(folder, "sample", "run", "a photo of noise", "--out", "sheet.png", "--steps", "2")
        with Image.open(Path(folder, "sheet.png")) as sheet:
            sheet.load()


def import_module(name: str) -> None:
    """Import a module, unless it is one that needs an extra."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise


def run(folder: str, *arguments: str) -> None:
    """Run a command as installed, in a folder outside the clone."""
    subprocess.run([sys.executable, "-P", "-m", "latentdiff", *arguments], cwd=folder, check=True)


if __name__ == "__main__":
    main()
