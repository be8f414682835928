"""A tiny model on disk, sessions that have it open, and requests to them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

from fakes_pipeline import SIZE, tiny_pipeline
from PIL import Image

from latentdiff.app.image_request import ImageRequest
from latentdiff.app.library import Library
from latentdiff.app.web_session import WebSession
from latentdiff.config.io import to_yaml
from latentdiff.config.text_to_image import Config
from latentdiff.pipeline.files.model_info import ModelInfo

EXAMPLES = ("a red heart", "a green apple")
CARD = """---
license: mit
---
# tiny

Hearts and *apples* at 32 px, for [tests](http://nowhere).

More.
"""
STEPS = 4


def save_tiny_model(path: Path) -> Path:
    """Write a model folder with a card and example prompts."""
    pipe = tiny_pipeline()
    facts: dict[str, Any] = {"dataset": "hearts", "steps": 1200, "guidance_scale": 2.0}
    pipe.model_info = ModelInfo(**facts, example_prompts=EXAMPLES)
    pipe.save_pretrained(path)
    (path / "README.md").write_text(CARD, encoding="utf-8")
    return path


def open_tiny(model: Path, **library: Path) -> WebSession:
    """Return a session with a model folder open."""
    session = WebSession(Library((str(model),), **library), device="cpu", dtype="float32")
    session.open(model.name)
    return session


def request_of(model: str = "tiny", **changes: Any) -> ImageRequest:
    """Return a request for an image of a few steps."""
    given: dict[str, Any] = {"prompt": "a cat", "seed": "1", "num_inference_steps": STEPS}
    given |= {"width": SIZE, "height": SIZE, "guidance_scale": 2.0, "model": model}
    return ImageRequest(**given | changes)


@contextmanager
def slow_unet(session: WebSession, seconds: float) -> Iterator[None]:
    """Make every pass of the open model's U-Net take so much longer inside the block."""
    pipe: Any = session._pipe
    hook = pipe.unet.register_forward_pre_hook(lambda *given: sleep(seconds))
    try:
        yield
    finally:
        hook.remove()


@dataclass
class Hold:
    """Counts passes of a U-Net; that of number `at` goes on until it is released."""

    at: int
    passes: int = 0
    begun: Event = field(default_factory=Event)
    released: Event = field(default_factory=Event)

    def __call__(self, *given: object) -> None:
        """Be a pass. Raises where nobody releases it within a minute."""
        self.passes += 1
        if self.passes == self.at:
            self.begun.set()
            if not self.released.wait(60):
                raise TimeoutError("the pass was never released")


@contextmanager
def held_unet(session: WebSession, *, at: int) -> Iterator[Hold]:
    """Hold a pass of the open model's U-Net, counted from 1 inside the block; 0: count alone."""
    pipe: Any = session._pipe
    hold = Hold(at)
    hook = pipe.unet.register_forward_pre_hook(hold)
    try:
        yield hold
    finally:
        hold.released.set()
        hook.remove()


def write_run(folder: Path, losses: Mapping[int, float]) -> Path:
    """Write what a run in training has on disk; losses: by step."""
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(Config(output_dir=str(folder))))
    Image.new("RGB", (64, 64), "teal").save(folder / "samples" / "step-000000000.png")
    (folder / "metrics.jsonl").touch()
    for step, loss in losses.items():
        add_metrics_line(folder, step, loss)
    return folder


def add_metrics_line(folder: Path, step: int, loss: float) -> None:
    """Add the line of a step to a run's metrics."""
    line = {"step": step, "loss": loss, "images_per_second": 5.0, "memory_gb": 1.0}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
