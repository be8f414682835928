"""The session behind the page: one model open, one image at a time, with previews and a stop.

Plain Python without gradio. Each call runs in a thread of its own, which waits for its turn and
posts events; a stop is answered at once, and the thread ends after the step that it is in.
"""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from diffusers import ControlNetModel
from PIL import Image

from latentdiff.app.history import History, HistoryEntry
from latentdiff.app.image_request import ImageRequest, find_problems
from latentdiff.app.library import NO_CONTROLNET, NO_LORA, Library
from latentdiff.app.live_preview import LivePreview
from latentdiff.app.model_facts import (
    OWN_CONTROLNET,
    OWN_SCHEDULER,
    TINY,
    ModelFacts,
    read_model_facts,
)
from latentdiff.models.components import TINY_VAE, choose_vae
from latentdiff.models.latents import Autoencoder
from latentdiff.models.model_path import resolve_model
from latentdiff.pipeline.output import LatentDiffOutput
from latentdiff.pipeline.pipeline import LatentDiffPipeline
from latentdiff.sampling.open_pipeline import open_pipeline

MAX_WAITING = 8
POLL_S = 0.2  # between two looks of a waiting call whether it was stopped


@dataclass(frozen=True)
class Waiting:
    """Other images come first: `ahead` of them."""

    ahead: int


@dataclass(frozen=True)
class Opening:
    """A model is being opened, or a LoRA or a ControlNet loaded."""

    name: str


@dataclass(frozen=True)
class Step:
    """A step is done: step of num_steps. images: small previews, None where the last may stay."""

    step: int
    num_steps: int
    seconds_left: float
    images: list[Image.Image] | None


@dataclass(frozen=True)
class Stopped:
    """The person stopped the call, after `step` of num_steps; 0 of 0 before the first."""

    step: int = 0
    num_steps: int = 0


@dataclass(frozen=True)
class Finished:
    """The images are made."""

    entries: list[HistoryEntry]
    seconds: float
    num_flagged: int = 0  # by the model's safety checker, and blackened


Event: TypeAlias = Waiting | Opening | Step | Stopped | Finished


class _StoppedError(Exception):
    """Ends the chain of a call that was stopped."""


@dataclass
class _Job:
    """A call, its events and whether it was stopped."""

    request: ImageRequest
    events: queue.SimpleQueue[Event | BaseException] = field(default_factory=queue.SimpleQueue)
    is_timed: bool = False
    stopped: threading.Event = field(default_factory=threading.Event)
    progress: tuple[int, int] = (0, 0)  # the last step done, and of how many

    def stop(self) -> None:
        self.stopped.set()
        self.events.put(Stopped(*self.progress))

    def check(self) -> None:
        if self.stopped.is_set():
            raise _StoppedError

    def check_step(self, *_: Any) -> dict[str, Any]:
        self.check()
        return {}


@dataclass
class WebSession:
    """Models that a page calls, one call at a time.

    preview_vae: a small VAE of the same latent space, for previews and, where chosen, for the
    images, by default the one that a model's folder carries. max_px: of a side at most.
    device, dtype, safety_checker: as `open_pipeline` takes them.
    """

    library: Library
    preview_vae: Autoencoder | None = None
    max_px: int = 2048
    device: str | None = None
    dtype: str = "auto"
    safety_checker: bool = True
    history: History = field(default_factory=History)

    def __post_init__(self) -> None:
        """Begin with no model open and nobody waiting."""
        self._pipe: LatentDiffPipeline | None = None
        self._facts: ModelFacts | None = None
        self._own_scheduler: Any = None
        self._own_vae: Autoencoder | None = None
        self._tiny_vae: Autoencoder | None = None
        self._lora: tuple[Any, ...] | None = None
        self._controlnet: tuple[Any, ...] | None = None
        self._own_controlnets: dict[str, ControlNetModel] = {}
        self._jobs: dict[str, _Job] = {}
        self._line: list[object] = []
        self._line_moved = threading.Condition()

    @property
    def facts(self) -> ModelFacts | None:
        """Facts of the open model."""
        return self._facts

    def controlnets(self) -> dict[str, ControlNetModel | str]:
        """Return ControlNets by name: those of the open model's folder, then the library's."""
        return {**self._own_controlnets, **self.library.controlnets()}

    def open(self, name: str) -> ModelFacts:
        """Open a model of the library unless it is; wait for the image that is being made.

        ValueError, FileNotFoundError: as the loader words it, or for a name that is not there.
        """
        job = _Job(ImageRequest(model=name))
        with self._turn(job):
            return self._open(job)

    def generate(
        self, request: ImageRequest, *, client: str = "", is_timed: bool = False
    ) -> Iterator[Event]:
        """Yield what happens until the images are made, or the call is stopped.

        client: whoever may stop this call. is_timed: the seconds are to be those of the call alone,
        so it has no previews and comes after a step that gets the model ready. Raises ValueError
        for a bad request, and the call's own errors. Closing the iterator stops the call.
        """
        job = _Job(request, is_timed=is_timed)
        self._jobs[client] = job
        threading.Thread(target=self._work, args=(job,), daemon=True).start()
        try:
            while True:
                event = job.events.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, (Stopped, Finished)):
                    return
        finally:
            job.stop()
            if self._jobs.get(client) is job:
                del self._jobs[client]

    def stop(self, client: str = "") -> bool:
        """Stop the client's call at once; return whether there was one."""
        if (job := self._jobs.get(client)) is None:
            return False
        job.stop()
        return True

    def _work(self, job: _Job) -> None:
        """Wait, make the images, and post what happens."""
        try:
            with self._turn(job):
                job.events.put(self._make(job))
        except _StoppedError:
            job.events.put(Stopped(*job.progress))
        except BaseException as error:
            job.events.put(error)

    @contextmanager
    def _turn(self, job: _Job) -> Iterator[None]:
        """Wait until all who came before are done; first come, first served."""
        with self._line_moved:
            if len(self._line) > MAX_WAITING:
                raise ValueError(f"{MAX_WAITING} others are waiting already; try again later")
            self._line.append(job)
        try:
            with self._line_moved:
                ahead = 0
                while self._line[0] is not job:
                    job.check()
                    if (now := self._line.index(job)) != ahead:
                        ahead = now
                        job.events.put(Waiting(ahead))
                    self._line_moved.wait(POLL_S)
            job.check()
            yield
        finally:
            with self._line_moved:
                self._line.remove(job)
                self._line_moved.notify_all()

    def _make(self, job: _Job) -> Finished:
        """Make the images of a request."""
        started, request = time.perf_counter(), job.request
        facts = self._open(job)
        if problems := find_problems(request, facts):
            name, message = next(iter(problems.items()))
            raise ValueError(f"{name.replace('_', ' ')}: {message}")
        pipe = self._pipe
        assert pipe is not None
        self._choose_scheduler(pipe, request.scheduler)
        pipe.vae = self._tiny_vae if request.vae == TINY else self._own_vae
        self._choose_lora(pipe, job)
        self._choose_controlnet(pipe, job)
        if job.is_timed:
            first = replace(request, num_inference_steps=1).arguments(facts)
            pipe(**first, callback_on_step_end=job.check_step)
            started = time.perf_counter()
        result = self._call(pipe, job)
        made = zip(result.images, result.seeds or [], result.settings or [], strict=True)
        entries = [
            self.history.add(image, request, seed=seed, settings=settings)
            for image, seed, settings in reversed(list(made))
        ]
        flagged = sum(result.nsfw_content_detected or [])
        return Finished(entries[::-1], time.perf_counter() - started, flagged)

    def _call(self, pipe: LatentDiffPipeline, job: _Job) -> LatentDiffOutput:
        """Call the pipeline; post a step as it is done."""
        facts = self._facts
        assert facts is not None
        preview, started = LivePreview(self._tiny_vae or pipe.vae), time.perf_counter()

        def step_end(pipe: Any, i: int, t: Any, tensors: Mapping[str, Any]) -> dict[str, Any]:
            job.check()
            num = pipe.num_timesteps
            is_seen = i + 1 < num and not job.is_timed
            images = preview.images(tensors["predicted_z0"]) if is_seen else None
            left = (time.perf_counter() - started) / (i + 1) * (num - i - 1)
            job.progress = i + 1, num
            job.events.put(Step(i + 1, num, left, images))
            return {}

        output = pipe(
            **job.request.arguments(facts),
            callback_on_step_end=step_end,
            callback_on_step_end_tensor_inputs=["predicted_z0"],
        )
        assert isinstance(output, LatentDiffOutput)
        return output

    def _open(self, job: _Job) -> ModelFacts:
        """Open the request's model in place of the one that is; the turn is the job's."""
        models, name = self.library.models(), job.request.model
        name = name or next(iter(models))
        if self._facts is not None and self._facts.name == name:
            return self._facts
        if name not in models:
            raise ValueError(f"no model {name!r}; known: {', '.join(models)}")
        job.events.put(Opening(name))
        self._pipe = self._facts = self._lora = self._own_scheduler = None
        self._own_vae = self._tiny_vae = self._controlnet = None
        self._own_controlnets = {}
        gc.collect()
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "fast": True}
        pipe = open_pipeline(models[name], safety_checker=self.safety_checker, **options)
        pipe.set_progress_bar_config(disable=True)
        self._own_scheduler, self._own_vae = pipe.scheduler, pipe.vae
        for k, net in enumerate(nets := pipe.controlnets):
            self._own_controlnets[OWN_CONTROLNET + (f" {k + 1}" if len(nets) > 1 else "")] = net
        pipe.unload_controlnet()
        self._tiny_vae = self.preview_vae
        if self._tiny_vae is None and (resolve_model(models[name]) / TINY_VAE).is_dir():
            self._tiny_vae = choose_vae(models[name], TINY, torch_dtype=pipe.vae.dtype)
        if self._tiny_vae is not None:
            self._tiny_vae.to(pipe.device)
        has_tiny = {"has_tiny_vae": self._tiny_vae is not None}
        self._facts = read_model_facts(
            pipe, name=name, path=models[name], max_px=self.max_px, **has_tiny
        )
        self._pipe = pipe
        return self._facts

    def _choose_scheduler(self, pipe: LatentDiffPipeline, name: str) -> None:
        pipe.scheduler = self._own_scheduler
        if name != OWN_SCHEDULER:
            pipe.set_scheduler(name)

    def _choose_lora(self, pipe: LatentDiffPipeline, job: _Job) -> None:
        """Make a LoRA current, read again where its file has changed."""
        name, loras = job.request.lora, self.library.loras()
        if name != NO_LORA and name not in loras:
            raise ValueError(f"no LoRA {name!r}; known: {', '.join(loras) or NO_LORA}")
        wanted = None if name == NO_LORA else (loras[name], loras[name].stat().st_mtime_ns)
        if wanted == self._lora:
            return
        pipe.unload_lora_weights()
        self._lora = None
        if wanted is not None:
            job.events.put(Opening(name))
            pipe.load_lora_weights(wanted[0])
            self._lora = wanted

    def _choose_controlnet(self, pipe: LatentDiffPipeline, job: _Job) -> None:
        """Load the ControlNet of a call, again where its files have changed; or none."""
        name = job.request.controlnet if job.request.has_controlnet else NO_CONTROLNET
        known = self.controlnets()
        if name != NO_CONTROLNET and name not in known:
            raise ValueError(f"no ControlNet {name!r}; known: {', '.join(known) or NO_CONTROLNET}")
        found = known.get(name)
        wanted = None if found is None else (name, _changed_at(found))
        if wanted == self._controlnet:
            return
        pipe.unload_controlnet()
        self._controlnet = None
        if found is not None:
            job.events.put(Opening(name))
            pipe.load_controlnet(found)
            self._controlnet = wanted


def _changed_at(controlnet: ControlNetModel | str) -> int:
    """Return when the weights of a ControlNet were written, 0 for one that is no folder here."""
    if not isinstance(controlnet, str):
        return 0
    files = Path(controlnet).expanduser().rglob("*.safetensors")
    return max((file.stat().st_mtime_ns for file in files), default=0)
