"""The session behind the page: the pipeline's own images, one at a time, stopped at once."""

import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from fakes_app import held_unet, open_tiny, request_of
from fakes_models import make_tiny_vae
from fakes_pipeline import SIZE, lora_weights, tiny_pipeline
from PIL import Image
from safetensors.torch import save_file

from latentdiff.app.image_request import IMAGE, INPAINT, request_from_settings
from latentdiff.app.model_facts import OWN_VAE, TINY
from latentdiff.app.web_session import MAX_WAITING, Finished, Opening, Step, Stopped, Waiting
from latentdiff.pipeline.png_metadata import read_settings
from latentdiff.sampling.open_pipeline import open_pipeline


def pixels(entry):
    return np.asarray(Image.open(entry.path))


def make(session, **changes):
    """Return the entries of one call."""
    *_, last = session.generate(request_of(**changes))
    assert isinstance(last, Finished)
    return last.entries


def wait_for_step(events):
    """Take events until a step is done; the call before may still be leaving the line."""
    next(event for event in events if isinstance(event, Step))


def test_steps_are_seen_and_the_images_are_the_pipeline_s_own(session, model):
    events = list(session.generate(request_of(seed="1", num_images_per_prompt=2)))
    steps = [event for event in events if isinstance(event, Step)]
    assert [(step.step, step.num_steps) for step in steps] == [(k, 4) for k in (1, 2, 3, 4)]
    assert len(steps[0].images) == 2
    pipe = open_pipeline(str(model), device="cpu", fast=True)
    call = {"num_images_per_prompt": 2, "num_inference_steps": 4, "guidance_scale": 2.0}
    expected = pipe("a cat", seed=1, **call)
    for entry, image in zip(events[-1].entries, expected.images, strict=True):
        assert np.array_equal(pixels(entry), np.asarray(image))


def test_a_stop_is_answered_within_a_long_step_and_the_next_call_works(session):
    with held_unet(session, at=1) as step:
        events = session.generate(request_of(num_inference_steps=100), client="a")
        threading.Thread(target=lambda: step.begun.wait(60) and session.stop("a")).start()
        seen = [event for event in events if not isinstance(event, Waiting)]
        assert seen == [Stopped()]  # the step goes on
    assert not session.stop("a")
    assert len(make(session)) == 1
    assert len(session.history.entries()) == 1


def test_a_caller_that_closes_the_iterator_stops_the_chain(session):
    with held_unet(session, at=0) as alone:
        make(session)
    with held_unet(session, at=2) as step:
        events = session.generate(request_of(num_inference_steps=150))
        wait_for_step(events)
        events.close()
        step.released.set()
        make(session)
    assert step.passes == 2 + alone.passes


def test_the_second_of_two_calls_waits_and_says_so(session):
    with held_unet(session, at=2) as step:
        first = session.generate(request_of(), client="a")
        wait_for_step(first)
        second = session.generate(request_of(), client="b")
        assert next(second) == Waiting(1)
        step.released.set()
        assert isinstance(list(first)[-1], Finished)
        assert isinstance(list(second)[-1], Finished)


def test_a_full_line_refuses_the_next(session, monkeypatch):
    monkeypatch.setattr(session, "_line", [object()] * (MAX_WAITING + 1))
    with pytest.raises(ValueError, match="waiting already"):
        make(session)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 151}, "num inference steps: expected 1 to 150"),
        ({"width": 2048}, "width: expected a multiple of 4 up to 64, got 2048"),
        ({"prompt": "x" * 2001}, "prompt: 2001 characters are too many"),
        ({"scheduler": "nonsense"}, "no scheduler"),
        ({"lora": "../../secret"}, "no LoRA"),
        ({"model": "/etc"}, "no model '/etc'; known: tiny"),
    ],
)
def test_limits_are_kept_on_the_server_s_side(session, changes, message):
    with pytest.raises(ValueError, match=message):
        make(session, **changes)


def test_loras_appear_change_and_go(session, tmp_path):
    session.library = replace(session.library, lora_dir=tmp_path)
    own = pixels(make(session)[0])
    path, weights = tmp_path / "style.safetensors", lora_weights()
    save_file(weights, path)
    styled = pixels(make(session, lora="style")[0])
    assert not np.array_equal(own, styled)
    assert np.array_equal(own, pixels(make(session, lora="style", lora_scale=0.0)[0]))
    save_file({name: 2 * value for name, value in weights.items()}, path)
    assert not np.array_equal(styled, pixels(make(session, lora="style")[0]))
    assert np.array_equal(own, pixels(make(session)[0]))


def test_schedulers_come_and_go(session):
    own = pixels(make(session)[0])
    assert not np.array_equal(own, pixels(make(session, scheduler="euler-a")[0]))
    assert np.array_equal(own, pixels(make(session)[0]))


def test_models_of_the_library_are_opened_when_asked_for(model, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "other")
    session = open_tiny(model)
    session.library = replace(session.library, given=(str(model), str(tmp_path / "other")))
    events = list(session.generate(request_of(model="other")))
    assert events[0] == Opening("other")
    assert session.facts.name == "other"


def test_an_image_is_cropped_and_a_mask_keeps_what_is_not_painted(session):
    photo = Image.effect_noise((80, 40), 90).convert("RGB")
    mask = Image.new("L", photo.size)
    mask.paste(255, (40, 0, 80, 40))
    changed = make(session, kind=IMAGE, image=photo, strength=0.5)[0]
    assert changed.size == (SIZE, SIZE)
    inpainted = make(session, kind=INPAINT, image=photo, mask_image=mask, strength=1.0)[0]
    again = make(session, **vars(inpainted.request) | {"seed": "3"})[0]
    first, second = pixels(inpainted).astype(int), pixels(again).astype(int)
    left, right = np.abs(first - second)[:, : SIZE // 4], np.abs(first - second)[:, -SIZE // 4 :]
    assert left.mean() < right.mean()
    kept = make(session, **vars(inpainted.request) | {"keep_unmasked": True})[0]
    fitted = inpainted.request.arguments(session.facts)["image"]
    arguments = [made.request.arguments(session.facts) for made in (inpainted, kept)]
    assert [call["keep_unmasked"] for call in arguments] == [False, True]
    half = np.asarray(fitted)[:, : SIZE // 2]
    assert np.array_equal(pixels(kept)[:, : SIZE // 2], half)
    assert not np.array_equal(first[:, : SIZE // 2], half)
    assert np.array_equal(pixels(kept)[:, SIZE // 2 :], first[:, SIZE // 2 :])


def test_history_is_newest_first_bounded_and_states_what_makes_an_image_again(session, monkeypatch):
    monkeypatch.setattr("latentdiff.app.history.MAX_ENTRIES", 3)
    for seed in ("1", "2"):
        make(session, seed=seed, num_images_per_prompt=2)
    entries = session.history.entries()
    assert [entry.request.seed for entry in entries] == ["2", "3", "1"]
    assert len(list(session.history.folder.iterdir())) == 3
    assert read_settings(entries[1].path)["call"]["seed"] == 3
    again = make(session, **vars(entries[1].request))[0]
    assert np.array_equal(pixels(again), pixels(entries[1]))


def test_a_tiny_vae_that_the_model_carries_is_a_choice_and_makes_the_previews(
    model, tmp_path, session
):
    carrier = shutil.copytree(model, tmp_path / "carrier")
    make_tiny_vae().save_pretrained(carrier / "vae_tiny")
    small = open_tiny(carrier)
    assert (session.facts.vaes, small.facts.vaes) == ((OWN_VAE,), (OWN_VAE, TINY))
    events = list(small.generate(request_of("carrier", vae=TINY)))
    pipe = open_pipeline(str(carrier), device="cpu", fast=True, vae="tiny")
    expected = pipe("a cat", seed=1, num_inference_steps=4, guidance_scale=2.0).images[0]
    assert np.array_equal(pixels(events[-1].entries[0]), np.asarray(expected))
    (own,), (first,) = make(small, model="carrier"), make(session)
    assert np.array_equal(pixels(own), pixels(first))  # the choice is of one call
    with pytest.raises(ValueError, match="tiny carries no tiny one"):
        make(session, vae=TINY)


def test_the_vae_of_a_file_is_taken_where_the_model_has_it(session):
    settings = {"call": {"prompt": "a cat"}, "model": {"vae": "AutoencoderTiny"}}
    facts = replace(session.facts, vaes=(OWN_VAE, TINY))
    options = {"loras": ()}
    taken, notes = request_from_settings(settings, request_of(), facts=facts, **options)
    assert (taken.vae, notes) == (TINY, [])
    taken, notes = request_from_settings(settings, request_of(), facts=session.facts, **options)
    assert (taken.vae, notes) == (OWN_VAE, ["vae: tiny carries no tiny one"])
