"""Sample sheets during a run: fixed prompts, each with its own seed.

A prompt's seed hangs on the run's seed and the prompt alone, so adding a prompt does not change the
others' pictures. The prompts are shared out over the processes.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image

from latentdiff.models import Components
from latentdiff.pipeline import LatentDiffPipeline
from latentdiff.pipeline.sheet import draw_sheet


def prompt_seed(seed: int, prompt: str) -> int:
    """Return the seed of a prompt's picture, in [0, 2^31)."""
    digest = hashlib.sha256(f"{seed}|{prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def make_pipeline(components: Components) -> LatentDiffPipeline:
    """Put components into a pipeline without copying them."""
    parts = components.as_dict()
    return LatentDiffPipeline(
        **parts, requires_safety_checker=components.safety_checker is not None
    )


@torch.no_grad()
def write_sheet(
    components: Components,
    prompts: Sequence[str],
    path: Path,
    *,
    accelerator: Accelerator,
    seed: int,
    num_steps: int,
    guidance_scale: float,
) -> Image.Image | None:
    """Draw one picture a prompt and write them as a labelled PNG; return it on the main process."""
    pipeline = make_pipeline(components)
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    with accelerator.split_between_processes(list(prompts)) as mine:
        for start in range(0, len(mine), 8):
            part = mine[start : start + 8]
            with accelerator.autocast():
                drawn, _ = pipeline(
                    part,
                    seed=[prompt_seed(seed, prompt) for prompt in part],
                    num_inference_steps=num_steps,
                    guidance_scale=guidance_scale,
                    return_dict=False,
                )
                images += drawn
    images = gather_object(images) if accelerator.num_processes > 1 else images
    if not accelerator.is_main_process:
        return None
    sheet = draw_sheet(images, list(prompts), columns=min(8, len(prompts)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    sheet.save(temporary, format="PNG")
    temporary.replace(path)
    return sheet
