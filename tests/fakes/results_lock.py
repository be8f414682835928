"""Seeded losses and images, and the file that says what they were: tests/results.lock.json.

A change that is not meant to change numbers leaves the file as it is; test_results_lock.py checks
it. Run this file to write it anew: python tests/fakes/results_lock.py --why "REASON" puts the
reason into CHANGELOG.md too, where the same test looks for it.

Results are compared by their values within a tolerance, which covers other processors and
versions of PyTorch, and bit for bit where processor and versions are those of a recorded hash.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate.state import AcceleratorState
from fakes_finetune import finetuning, generate, open_ours
from fakes_training import make_config, make_world, read_metrics
from PIL import Image

from latentdiff import LatentDiffPipeline
from latentdiff.cli.machine import cpu_name
from latentdiff.config.clip import ClipConfig
from latentdiff.config.vae import VaeConfig
from latentdiff.training.clip.train_clip import train_clip
from latentdiff.training.text_to_image.train_t2i import train
from latentdiff.training.vae.train_vae import train_vae

TESTS = Path(__file__).parents[1]
LOCK, CHANGELOG = TESTS / "results.lock.json", TESTS.parent / "CHANGELOG.md"
TOLERANCE = 2e-3  # absolute for values in [0, 1], relative above
SHORT = {"max_steps": 3, "log_every_steps": 1, "mixed_precision": "fp32", "num_workers": 0}
VAE = {"resolution": 32, "block_out_channels": (8, 16), "norm_num_groups": 4, "batch_size": 4}
CLIP = {"resolution": 16, "patch_size": 4, "width": 32, "num_layers": 1, "text_width": 32}
CLIP |= {"text_num_layers": 1, "head_dim": 16, "embed_dim": 16, "vocab_size": 560}
CLIP |= {"max_tokens": 16, "batch_size": 4}


@dataclass(frozen=True)
class Result:
    """Some figures of a result, and the hash of all its bytes."""

    values: tuple[float, ...]
    digest: str


def compute(folder: Path) -> dict[str, Result]:
    """Compute every result on one thread, in an empty folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _compute(folder)
    finally:
        torch.set_num_threads(threads)
        AcceleratorState._reset_state(reset_partial_state=True)


def _compute(folder: Path) -> dict[str, Result]:
    world = make_world(folder)
    options = {"train__max_steps": 5, "preview__num_nearest": 0, "eval__every_steps": 5}
    _trained(train, make_config(world, world / "base", **options))
    lora = {"finetune__method": "lora", "finetune__lora_rank": 2}
    _trained(train, finetuning(world, world / "lora", **lora))
    vae = {"roots": (str(world / "data"),), "output_dir": str(world / "vae_run")}
    _trained(train_vae, VaeConfig(**SHORT | VAE | vae))
    clip = {"roots": (str(world / "data"),), "output_dir": str(world / "clip_run")}
    _trained(train_clip, ClipConfig(**SHORT | CLIP | clip))
    mini = LatentDiffPipeline.from_pretrained("latentdiff-mini")
    mini.set_progress_bar_config(disable=True)
    image = mini("a cat", seed=0, num_inference_steps=2, output_type="pt").images
    return {
        "losses of a model from scratch": _losses(world / "base"),
        "its held-out loss": _losses(world / "base", "heldout_loss"),
        "losses of a LoRA": _losses(world / "lora"),
        "losses of a VAE": _losses(world / "vae_run"),
        "losses of a CLIP": _losses(world / "clip_run"),
        "image of the model from scratch": _image(generate(open_ours(world / "base/pipeline"))),
        "image of latentdiff-mini": _image(image),
        "first training image": _image(_pixels(world / "data" / "train")),
    }


def _trained(recipe: Any, config: Any) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    assert recipe(config) == 0


def _losses(run: Path, name: str = "loss") -> Result:
    values = tuple(read_metrics(run, name).values())
    return Result(values, _digest(np.array(values, np.float64)))


def _pixels(folder: Path) -> torch.Tensor:
    path = min(folder.glob("*.png"))
    pixels = np.asarray(Image.open(path).convert("RGB"), np.float32)  # (H, W, 3)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255


def _image(pixels: torch.Tensor) -> Result:
    """Keep the mean of each quarter of an image (1, 3, H, W) in each channel."""
    means = torch.nn.functional.adaptive_avg_pool2d(pixels.double(), 2).flatten()
    return Result(tuple(means.tolist()), _digest(pixels.contiguous().numpy()))


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:32]


# ---- the file ----


def kind() -> str:
    """Name what bits depend on: the processor, its instructions, and versions."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    known = dict(re.findall(r"^(cpu family|model|stepping|cache size)\s*: (.+)$", text, re.M))
    model = ".".join(known.get(key, "?") for key in ("cpu family", "model", "stepping"))
    processor = f"{cpu_name()} {model}, {known.get('cache size', '?')}"
    instructions = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    return f"{processor}, {instructions}, {versions}"


def read_lock(path: Path = LOCK) -> dict[str, Any]:
    """Read the file; empty where there is none yet."""
    empty = {"results": {}, "changes": []}
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else empty


def differences(lock: Mapping[str, Any], found: Mapping[str, Result], *, kind: str) -> list[str]:
    """Say of each result that is another than the recorded one how it is."""
    told = []
    for name, result in found.items():
        known = lock["results"].get(name)
        if known is None:
            told.append(f"{name}: not recorded yet")
        elif not _is_near(known["values"], result.values):
            values = ", ".join(f"{value:.5g}" for value in result.values[:4])
            before = ", ".join(f"{value:.5g}" for value in known["values"][:4])
            told.append(f"{name}: {values} ..., was {before} ...")
        elif known["hashes"].get(kind, result.digest) != result.digest:
            told.append(f"{name}: equal but for rounding, other bits on {kind}")
    return told + [f"{name}: no longer computed" for name in lock["results"] if name not in found]


def _is_near(known: list[float], found: tuple[float, ...]) -> bool:
    same = len(known) == len(found)
    return same and np.allclose(known, found, rtol=TOLERANCE, atol=TOLERANCE)


def updated(
    lock: Mapping[str, Any], found: Mapping[str, Result], *, kind: str, why: str
) -> dict[str, Any]:
    """Return the file's content for new results; ValueError where numbers change without a reason.

    Hashes of other processors stay where this one's bits did not change.
    """
    results = {}
    changed = [line for line in differences(lock, found, kind=kind) if "not recorded" not in line]
    if changed and not why.strip():
        raise ValueError("numbers change, say why by --why:\n" + "\n".join(changed))
    names = {line.partition(": ")[0] for line in changed}
    for name, result in found.items():
        known = lock["results"].get(name)
        others = known["hashes"] if known and name not in names else {}
        values = known["values"] if known and name not in names else result.values
        rounded = [float(f"{value:.7g}") for value in values]
        results[name] = {"values": rounded, "hashes": others | {kind: result.digest}}
    news = [{"results": sorted(names), "why": why.strip()}] if changed else []
    return {"results": results, "changes": [*lock["changes"], *news]}


def unexplained(lock: Mapping[str, Any], changelog: str) -> list[str]:
    """Return the reasons for changed numbers that the changelog does not state."""
    told = " ".join(changelog.split())
    return [change["why"] for change in lock["changes"] if change["why"] not in told]


def main() -> int:
    """Write the file, and the reason into the changelog; return 2 where the reason is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--why", default="", help="why numbers change; also for CHANGELOG.md")
    why = " ".join(parser.parse_args().why.split())
    with tempfile.TemporaryDirectory() as folder:
        found = compute(Path(folder))
    lock = read_lock()
    told = differences(lock, found, kind=kind())
    try:
        new = updated(lock, found, kind=kind(), why=why)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    LOCK.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    text = CHANGELOG.read_text(encoding="utf-8")
    for reason in unexplained(new, text):
        heading = "## Unreleased\n"
        text = text.replace(heading, f"{heading}\n- Numbers change: {reason}", 1)
        CHANGELOG.write_text(text, encoding="utf-8")
    print("\n".join([*told, f"wrote {LOCK}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
