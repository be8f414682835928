"""Two models next to each other: each in its own steps, timed alone, stopped as any other call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes_app import open_tiny
from fakes_pipeline import tiny_pipeline
from PIL import Image

from latentdiff.app.few_steps.comparison import Side, SideImage, compare_sides, verdict
from latentdiff.app.web_session import Finished, Step, Stopped, WebSession
from latentdiff.models.unet.guidance_embedding import add_guidance_embedding
from latentdiff.pipeline.files.model_info import ModelInfo
from latentdiff.pipeline.schedulers import distilled_scheduler
from latentdiff.sampling.open_pipeline import open_pipeline


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of 4 steps of the tiny model, in a folder of that name."""
    pipe = tiny_pipeline()
    unet = add_guidance_embedding(pipe.unet)
    pipe.register_modules(unet=unet, scheduler=distilled_scheduler(pipe.scheduler))
    pipe.model_info = ModelInfo(
        guidance_scale=2.0, num_inference_steps=4, guidance_range=(1.0, 8.0)
    )
    pipe.save_pretrained(path := tmp_path_factory.mktemp("student") / "student")
    return path


@pytest.fixture
def both(session: WebSession, model: Path, student: Path) -> WebSession:
    session.library = replace(session.library, given=(str(model), str(student)))
    return session


def compared(session: WebSession, *sides: Side, **changes: Any) -> tuple[list[Any], list[Any]]:
    """Return the events, and the images at the end."""
    asked: dict[str, Any] = {"prompt": "a cat", "seed": "1"} | changes
    found = list(compare_sides(session, sides, **asked))
    return [event for event, _ in found], found[-1][1]


def test_each_side_is_the_model_s_own_image_in_its_own_steps(
    both: WebSession, student: Path
) -> None:
    events, (first, second) = compared(both, Side("tiny", 3), Side("student"))
    assert (first.num_steps, first.num_passes) == (3, 6)  # classifier-free guidance
    assert (second.num_steps, second.num_passes) == (4, 4)
    assert str(second).startswith("student: 4 steps, 4 passes, ")
    steps = [event for event in events if isinstance(event, Step)]
    assert [one.images for one in steps] == [None] * 7  # no previews in the time
    pipe = open_pipeline(str(student), device="cpu", fast=True)
    expected = pipe("a cat", seed=1).images[0]
    assert np.array_equal(np.asarray(Image.open(second.entry.path)), np.asarray(expected))
    assert len(both.history.entries()) == 2  # the step that gets a model ready is no image


def test_the_faster_side_is_named_with_its_ratio(both: WebSession) -> None:
    _, (made, *_) = compared(both, Side("tiny", 2))
    slow, fast = (replace(made, seconds=s, num_steps=n) for s, n in ((3.0, 25), (0.5, 1)))
    assert verdict([slow, fast]) == "tiny in 1 step is 6.0 times as fast as tiny in 25"
    assert isinstance(made, SideImage)


def test_guidance_of_one_is_one_pass_a_step(both: WebSession) -> None:
    _, (made,) = compared(both, Side("tiny", 2), guidance_scale=1.0)
    assert (made.num_steps, made.num_passes) == (2, 2)


def test_a_stop_ends_the_comparison(both: WebSession) -> None:
    sides, events = [Side("tiny", 50), Side("student")], []
    for event, _ in compare_sides(both, sides, prompt="a cat", client="me"):
        events.append(event)
        if isinstance(event, Step):
            both.stop("me")
    assert isinstance(events[-1], Stopped)
    assert not any(isinstance(event, Finished) for event in events)


def test_what_is_wrong_is_said(model: Path) -> None:
    session = open_tiny(model)
    with pytest.raises(ValueError, match="say what to draw"):
        compared(session, Side("tiny"), prompt="")
    with pytest.raises(ValueError, match="no model 'other'"):
        compared(session, Side("other"))
