"""Guidance by the gradient of a score in the pipeline, and CLIP as that score."""

import functools
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import open_clip
import pytest
import torch
from fakes_clip import random_clip
from fakes_pipeline import SIZE, ddim, tiny_pipeline, tiny_tokenizer, tiny_unet
from fakes_sdxl import sdxl_pipeline
from torch import Tensor
from transformers import CLIPImageProcessor

from latentdiff.diffusion.guidance import classifier_free, with_score_guidance
from latentdiff.evaluation.metric_nets import load_clip
from latentdiff.evaluation.metrics.clip import (
    ClipGuide,
    preprocess,
    wrap_open_clip,
    wrap_transformers_clip,
)
from latentdiff.models.build import schedule_of
from latentdiff.models.conditioning import Conditioning, make_time_ids
from latentdiff.models.text import train_tokenizer

CALL: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "return_dict": False}


def quadratic(z0: Tensor, t: Tensor) -> Tensor:
    """log N(z0; 0.5, 0.3) of each image, but for a constant."""
    return -(z0 - 0.5).square().flatten(1).sum(1) / 0.6


def noise(count: int = 2) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def conditioning(pipe: Any, texts: str | list[str]) -> Conditioning:
    """Return what the U-Net reads of two texts, or of one twice, at the pipeline's own size."""
    with torch.no_grad():
        embeds, _, *pooled = pipe.encode_prompt(texts, torch.device("cpu"), 1, False)
    found = Conditioning(embeds)
    if pooled:
        time_ids = make_time_ids((SIZE, SIZE)).expand(len(embeds), -1)
        found = Conditioning(embeds, pooled[0], time_ids)
    return found.expand(2)


@pytest.mark.parametrize(
    ("make", "prediction_type"),
    [
        (tiny_pipeline, "epsilon"),
        (tiny_pipeline, "v_prediction"),
        (tiny_pipeline, "sample"),
        (sdxl_pipeline, "epsilon"),
    ],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_hook_is_guidance_by_gradient_of_the_guided_model(
    make: Any, prediction_type: str, guidance_scale: float
) -> None:
    """The same chain by hand: `guided_by` around classifier-free guidance, in DDIM's steps."""
    pipe = make(scheduler=ddim(prediction_type=prediction_type))
    given, null = (conditioning(pipe, texts) for texts in (["a red heart", "a cat"], ""))

    def model(xt: Tensor, t: Tensor) -> Tensor:
        uncond, cond = (
            pipe.unet(xt, t, **read.unet_kwargs(), return_dict=False)[0] for read in (null, given)
        )
        return classifier_free(uncond, cond, guidance_scale)

    guided = with_score_guidance(
        schedule_of(pipe.scheduler), model, quadratic, scale=0.2, prediction_type=prediction_type
    )
    xt = noise()
    pipe.scheduler.set_timesteps(4)
    for t in pipe.scheduler.timesteps:
        xt = pipe.scheduler.step(guided(xt, t.expand(2)), t, xt)[0].detach()
    arguments = CALL | {"latents": noise(), "guidance_scale": guidance_scale}
    arguments |= {"negative_prompt": ""}  # the null prompt of both families
    prompts = ["a red heart", "a cat"]
    ours, _ = pipe(prompts, score_fn=quadratic, score_scale=0.2, **arguments)
    torch.testing.assert_close(ours, xt, rtol=1e-3, atol=1e-4)
    plain, _ = pipe(prompts, **arguments)
    assert float(quadratic(ours, xt).mean()) > float(quadratic(plain, xt).mean())
    unguided, _ = pipe(prompts, score_fn=quadratic, score_scale=0.0, **arguments)
    torch.testing.assert_close(unguided, plain)
    assert not ours.requires_grad


@pytest.mark.parametrize(
    "name", ["ddpm", "euler", "euler-a", "dpm++2m-karras", "unipc", "heun", "lcm"]
)
def test_every_scheduler_raises_the_score(name: str) -> None:
    """A linear score, whose gradient cannot overshoot."""
    pipe = tiny_pipeline(scheduler=ddim(prediction_type="v_prediction"))
    pipe.set_scheduler(name)
    call = CALL | {"seed": 1, "score_fn": lambda z0, t: z0.flatten(1).sum(1)}
    low, middle, high = (pipe("a cat", **call, score_scale=s)[0].mean() for s in (-0.1, 0.0, 0.1))
    assert low < middle < high


def test_image_of_a_guided_batch_equals_the_image_made_alone() -> None:
    pipe = tiny_pipeline()
    call = CALL | {"score_fn": quadratic, "score_scale": 0.2}
    together, _ = pipe(["a red heart", "a cat"], seed=[4, 9], **call)
    alone, _ = pipe("a cat", seed=9, **call)
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-3)


def test_interval_bounds_the_guide_too() -> None:
    seen: list[int] = []

    def guide(z0: Tensor, t: Tensor) -> Tensor:
        seen.append(int(t))
        return quadratic(z0, t)

    pipe = tiny_pipeline()
    pipe("a cat", score_fn=guide, guidance_interval=(0.4, 1.0), **CALL)
    assert seen
    assert seen == [t for t in pipe.scheduler.timesteps.tolist() if t < 600]


def test_learned_variance_is_left_alone() -> None:
    chain = diffusers.DDPMScheduler.from_config(
        ddim().config, variance_type="learned_range", clip_sample=False
    )
    pipe = tiny_pipeline(unet=tiny_unet(out_channels=8), scheduler=chain)
    outputs: dict[str, list[Tensor]] = {"plain": [], "guided": []}
    step = chain.step
    for name, guide in (("plain", None), ("guided", quadratic)):

        def spy(output: Tensor, *rest: Any, name: str = name, **options: Any) -> Any:
            outputs[name].append(output)
            return step(output, *rest, **options)

        chain.step = functools.update_wrapper(spy, step)
        pipe("a cat", seed=1, score_fn=guide, **CALL | {"num_inference_steps": 1})
    plain, guided = outputs["plain"][0], outputs["guided"][0]
    assert torch.equal(plain[:, 4:], guided[:, 4:])
    assert not torch.allclose(plain[:, :4], guided[:, :4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score_fn": 3}, "score_fn must be a function"),
        ({"score_fn": quadratic, "score_scale": float("nan")}, "score_scale"),
        ({"score_fn": quadratic, "score_scale": "much"}, "score_scale"),
        ({"score_fn": lambda z0, t: z0.sum()}, r"score_fn must return .*shape \(1,\).*got \(\)"),
        ({"score_fn": lambda z0, t: 1.0}, "score_fn must return .*got float"),
        ({"score_fn": lambda z0, t: quadratic(z0, t).detach()}, "no_grad and detach"),
        ({"score_fn": lambda z0, t: torch.ones(1, requires_grad=True) * 2}, "do not depend on z0"),
        (
            {"score_fn": lambda z0, t: quadratic(z0, t) * torch.nan},
            "score_fn's gradient became NaN",
        ),
    ],
)
def test_nonsense_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()("a cat", **arguments, **CALL)


# --- CLIP ---


def test_clip_guidance_raises_the_clip_score_of_the_images() -> None:
    pipe, clip = tiny_pipeline(), wrap_transformers_clip(random_clip(), tiny_tokenizer())
    captions = ["a red heart", "blue sea, sky"]
    guide = ClipGuide(clip, pipe.vae, captions)
    call: dict[str, Any] = {"seed": 1, "num_inference_steps": 6, "output_type": "pt"}
    scores = []
    for scale in (0.0, 300.0):
        pixels = pipe(captions, score_fn=guide, score_scale=scale, **call).images * 2 - 1
        scores.append(clip.score(pixels, captions))
    assert bool((scores[1] > scores[0] + 0.02).all()), scores


def test_one_caption_serves_all_images_and_other_counts_are_refused() -> None:
    pipe, clip = tiny_pipeline(), wrap_transformers_clip(random_clip(), tiny_tokenizer())
    z0 = noise(3)
    one = ClipGuide(clip, pipe.vae, ["a cat"])(z0, torch.tensor(0))
    three = ClipGuide(clip, pipe.vae, ["a cat"] * 3)(z0, torch.tensor(0))
    torch.testing.assert_close(one, three)
    with pytest.raises(ValueError, match="2 captions for 3 images"):
        ClipGuide(clip, pipe.vae, ["a cat", "sea"])(z0, torch.tensor(0))
    with pytest.raises(ValueError, match="list of at least one text"):
        ClipGuide(clip, pipe.vae, "a cat")


def test_transformers_clip_scores_as_its_own_forward(tmp_path: Path) -> None:
    model, tokenizer = random_clip(), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    captions = ["a red heart", "a green apple on a table"]
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    ids = tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt")
    theirs = model(**ids, pixel_values=preprocess(pixels, size=16))
    cosine = theirs.logits_per_image.diagonal() / model.logit_scale.exp()
    ours = load_clip(tmp_path).score(pixels, captions)
    torch.testing.assert_close(ours, cosine, rtol=1e-4, atol=1e-5)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_clip(tmp_path / "none")
    train_tokenizer(["other words"], vocab_size=514, max_length=16).save_pretrained(tmp_path)
    load_clip(tmp_path)
    more = [f"{a}{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    train_tokenizer(more, vocab_size=900, max_length=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokens and its CLIP knows"):
        load_clip(tmp_path)


def test_open_clip_model_is_wrapped_too() -> None:
    torch.manual_seed(6)
    model = open_clip.CLIP(
        embed_dim=8,
        vision_cfg={"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        text_cfg={"context_length": 8, "vocab_size": 32, "width": 16, "heads": 2, "layers": 1},
    ).eval()

    def tokens(texts: list[str]) -> Tensor:
        rows = [[30, *[len(word) for word in text.split()][:6], 31] for text in texts]
        return torch.tensor([row + [0] * (8 - len(row)) for row in rows])

    clip = wrap_open_clip(model, tokens)  # type: ignore[arg-type]
    pixels = (torch.rand(2, 3, 24, 24) * 2 - 1).requires_grad_()
    embedded = clip.embed_pixels(pixels)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(2))
    embedded[:, 0].sum().backward()
    assert pixels.grad is not None
    assert float(pixels.grad.abs().max()) > 0
    assert clip.score(pixels, ["a cat", "the sea is blue"]).shape == (2,)


def test_prepared_pixels_are_what_clip_was_trained_on() -> None:
    """Against the image processor of transformers, which resizes 8-bit images."""
    processor = CLIPImageProcessor(
        size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}
    )
    array = (np.random.default_rng(0).random((40, 40, 3)) * 255).astype(np.uint8)
    theirs = processor(array, return_tensors="pt").pixel_values
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(preprocess(pixels, size=16), theirs, rtol=0, atol=0.02)
