"""Canaries: images of random content that a run plants among its own, so that an audit finds them.

Each has a twin, drawn from the same distribution, that is never shown: a model that tells the two
apart remembers what it saw (after Carlini et al. 2019, "The Secret Sharer").
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from latentdiff.atomic import atomic_folder
from latentdiff.config.data import DataSource
from latentdiff.config.text_to_image import Config

CANARIES, TWINS = "canaries", "canary_twins"  # folders of a run
CELLS = 8  # on a side, each of a random colour


def with_canaries(config: Config, accelerator: Accelerator) -> Config:
    """Return a config with the run's canaries as one more source, and write them where missing.

    They are a function of train.seed and data.resolution. The run's own config.yaml does not name
    them as a source: data.num_canaries makes the same ones again.
    """
    data = config.data
    if not data.num_canaries:
        return config
    run = Path(config.output_dir)
    with accelerator.main_process_first():
        if accelerator.is_main_process:
            size_px = max(data.side_px, data.min_size)
            write_canaries(run, data.num_canaries, size_px=size_px, seed=config.train.seed)
    canaries = DataSource(
        str(run / CANARIES),
        caption_column="text",
        file_column="file_name",
        caption_template="",
        shuffle_tags=False,
        trigger_word="",
        caption_prefix="",
        caption_suffix="",
    )
    own = data.sources or (DataSource(data.root),)
    return replace(config, data=replace(data, root="", sources=(*own, canaries)))


def write_canaries(run: Path, num: int, *, size_px: int, seed: int) -> None:
    """Write run/canaries/train/ and run/canary_twins/train/, captioned folders of num images each.

    size_px: of their sides. Folders of the same numbers are left as they are.
    """
    stamp = json.dumps({"num": num, "size_px": size_px, "seed": seed})
    for kind, name in enumerate((CANARIES, TWINS)):
        path = run / name / "canaries.json"
        if path.is_file() and path.read_text(encoding="utf-8") == stamp:
            continue
        with atomic_folder(run / name) as folder:
            images = folder / "train"
            images.mkdir()
            rows = [
                _write_canary(images / f"{i:04d}.png", (seed, kind, i), size_px) for i in range(num)
            ]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (images / "metadata.jsonl").write_text(lines, encoding="utf-8")
            (folder / path.name).write_text(stamp, encoding="utf-8")


def _write_canary(path: Path, key: tuple[int, int, int], size_px: int) -> dict[str, str]:
    """Draw the canary of a key, and return its row of metadata.jsonl."""
    rng = np.random.default_rng(key)
    cells = rng.integers(0, 256, (CELLS, CELLS, 3), dtype=np.uint8)
    image = Image.fromarray(cells).resize((size_px, size_px), Image.Resampling.NEAREST)
    image.save(path)
    return {"file_name": path.name, "text": f"canary {rng.bytes(4).hex()}"}


def canary_folders(model: Path) -> tuple[Path, Path] | None:
    """Return the folders of the canaries that a model's run planted, and of their twins.

    model: the run's folder, or one directly in it, such as pipeline/. None: no canary was planted.
    """
    for run in (model, model.parent):
        if (run / CANARIES).is_dir() and (run / TWINS).is_dir():
            return run / CANARIES, run / TWINS
    return None
