"""The session behind the web UI: one call at a time, with previews, bounded and stoppable."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

from latentdiff.pipeline import checks
from latentdiff.pipeline.callbacks import preview_images
from latentdiff.pipeline.output import LatentDiffOutput
from latentdiff.pipeline.pipeline import LatentDiffPipeline

OWN_SCHEDULER, NO_LORA = "the model's own", "none"
MAX_STEPS, MAX_IMAGES, MAX_CHARACTERS = 150, 4, 2000


@dataclass
class WebSession:
    """A pipeline that a page calls, one call at a time."""

    pipe: LatentDiffPipeline
    loras: Mapping[str, Path] = field(default_factory=dict)
    preview_vae: AutoencoderKL | AutoencoderTiny | None = None
    max_side_px: int = 1024
    lora: str = NO_LORA

    def __post_init__(self) -> None:
        """Keep the model's own scheduler, to restore it."""
        self.own_scheduler = self.pipe.scheduler
        self.pipe.set_progress_bar_config(disable=True)

    def generate(
        self, call: Mapping[str, Any], *, scheduler: str, lora: str
    ) -> Iterator[tuple[int, list[Image.Image]] | LatentDiffOutput]:
        """Yield (step, small images) while the chain runs, and the result at the end.

        Raises ValueError beyond the page's limits, and the call's own errors. Closing the iterator
        stops the chain.
        """
        self._check(call)
        self._choose(scheduler=scheduler, lora=lora)
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stop = threading.Event()
        thread = threading.Thread(target=self._work, args=(call, events, stop), daemon=True)
        thread.start()
        try:
            while not isinstance(event := events.get(), (LatentDiffOutput, BaseException)):
                yield event
            if isinstance(event, BaseException):
                raise event
            yield event
        finally:
            stop.set()
            thread.join()

    def _work(
        self, call: Mapping[str, Any], events: queue.SimpleQueue[Any], stop: threading.Event
    ) -> None:
        """Call the pipeline; put previews, and the result or the error, into the queue."""
        vae = self.preview_vae or self.pipe.vae

        def step_end(pipe: Any, i: int, t: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
            pipe._interrupt = stop.is_set()
            events.put((i, preview_images(vae, tensors["predicted_z0"])))
            return {}

        try:
            result = self.pipe(
                **call,
                callback_on_step_end=step_end,
                callback_on_step_end_tensor_inputs=["predicted_z0"],
            )
        except BaseException as error:
            events.put(error)
        else:
            events.put(result)

    def _check(self, call: Mapping[str, Any]) -> None:
        for name in ("prompt", "negative_prompt"):
            if len(call[name] or "") > MAX_CHARACTERS:
                raise ValueError(f"{name} has more than {MAX_CHARACTERS} characters; shorten it")
        for name, maximum in (
            ("num_inference_steps", MAX_STEPS),
            ("num_images_per_prompt", MAX_IMAGES),
            ("height", self.max_side_px),
            ("width", self.max_side_px),
        ):
            checks.count(name, call[name], maximum=maximum)

    def _choose(self, *, scheduler: str, lora: str) -> None:
        """Make a scheduler and a LoRA current; ValueError for a name that is not on the page."""
        if scheduler == OWN_SCHEDULER:
            self.pipe.scheduler = self.own_scheduler
        else:
            self.pipe.set_scheduler(scheduler)
        if lora == self.lora:
            return
        if lora != NO_LORA and lora not in self.loras:
            raise ValueError(f"no LoRA {lora!r}; known: {', '.join(self.loras) or NO_LORA}")
        self.pipe.unload_lora_weights()
        self.lora = NO_LORA
        if lora != NO_LORA:
            self.pipe.load_lora_weights(self.loras[lora])
            self.lora = lora


def find_loras(folder: str | None) -> dict[str, Path]:
    """Return the .safetensors files of a folder by name; FileNotFoundError for no folder."""
    if folder is None:
        return {}
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"loras={path} is no folder here")
    return {path.stem: path for path in sorted(path.glob("*.safetensors"))}


def painted_mask(value: Mapping[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """Return an image editor's image and the mask painted over it; None without."""
    if not value or value.get("background") is None:
        return None, None
    background: Image.Image = value["background"]
    painted = np.zeros(background.size[::-1], dtype=np.uint8)
    for layer in value.get("layers") or []:
        opaque = np.asarray(layer.convert("RGBA").resize(background.size))[..., 3]
        painted = np.maximum(painted, opaque)
    if not painted.any():
        return background, None
    return background, Image.fromarray(np.where(painted > 0, 255, 0).astype(np.uint8))
