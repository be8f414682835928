"""Two models, one prompt and seed: the image of each, its steps and seconds.

Plain Python without gradio. The models are opened in turn, and each call is timed alone; does not
answer for: whether a student is worse, which takes many images (evaluation/compare_student.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from latentdiff.app.history import HistoryEntry
from latentdiff.app.image_request import ImageRequest
from latentdiff.app.model_facts import ModelFacts
from latentdiff.app.web_session import Event, Finished, Opening, Stopped, WebSession

DEFAULT_SEED = "0"  # one for both, where none is given


@dataclass(frozen=True)
class Side:
    """A model, by its name in the library, and its sampling steps; 0 for the model's own."""

    model: str
    num_steps: int = 0


@dataclass(frozen=True)
class SideImage:
    """The image of a side, and what it took: passes of the U-Net and seconds of the call."""

    model: str
    entry: HistoryEntry
    num_steps: int
    num_passes: int
    seconds: float

    def __str__(self) -> str:
        """Return the caption of the image."""
        steps = "1 step" if self.num_steps == 1 else f"{self.num_steps} steps"
        passes = "1 pass" if self.num_passes == 1 else f"{self.num_passes} passes"
        return f"{self.model}: {steps}, {passes}, {self.seconds:.2f} s"


def compare_sides(
    session: WebSession,
    sides: Sequence[Side],
    *,
    prompt: str,
    seed: str = "",
    guidance_scale: float | None = None,
    client: str = "",
) -> Iterator[tuple[Event, list[SideImage]]]:
    """Yield what happens, with the images made so far, until all sides have one, or it is stopped.

    guidance_scale: of all; by default each model's own. Raises ValueError for a bad request, and
    what opening a model raises.
    """
    made: list[SideImage] = []
    for side in sides:
        yield Opening(side.model), made
        facts = session.open(side.model)
        request = request_for(facts, side, prompt=prompt, seed=seed, guidance_scale=guidance_scale)
        for event in session.generate(request, client=client, is_timed=True):
            if isinstance(event, Finished):
                made = [*made, _image_of(event, request, facts)]
            yield event, made
            if isinstance(event, Stopped):
                return


def request_for(
    facts: ModelFacts, side: Side, *, prompt: str, seed: str, guidance_scale: float | None
) -> ImageRequest:
    """Return the request of a side: the open model's own settings, and what is asked of all."""
    return ImageRequest(
        model=facts.name,
        prompt=prompt,
        seed=seed.strip() or DEFAULT_SEED,
        num_inference_steps=side.num_steps or facts.num_inference_steps,
        guidance_scale=facts.guidance_scale if guidance_scale is None else guidance_scale,
        width=facts.width,
        height=facts.height,
        scheduler=facts.schedulers[0],
        vae=facts.vaes[0],
        clip_skip=facts.clip_skip,
    )


def _image_of(event: Finished, request: ImageRequest, facts: ModelFacts) -> SideImage:
    is_guided = request.guidance_scale > 1 and not facts.is_distilled
    num_steps = request.num_inference_steps
    passes = num_steps * (2 if is_guided else 1)
    return SideImage(facts.name, event.entries[0], num_steps, passes, event.seconds)


def verdict(made: Sequence[SideImage]) -> str:
    """Return how much faster one of two sides is than the other, in a sentence."""
    fast, slow = sorted(made, key=lambda one: one.seconds)
    ratio = slow.seconds / max(fast.seconds, 1e-9)
    steps = f"{fast.num_steps} steps" if fast.num_steps > 1 else "1 step"
    return (
        f"{fast.model} in {steps} is {ratio:.1f} times as fast as {slow.model} in {slow.num_steps}"
    )
