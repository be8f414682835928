"""Traces, attention maps and previews show the chain as it is and change nothing."""

import numpy as np
import pytest
import torch
from fakes_pipeline import SIZE, tiny_pipeline, tiny_vae
from PIL import Image

from latentdiff.pipeline.attention_maps import (
    AttentionMaps,
    attention_probabilities,
    heat_map_grid,
    record_attention,
)
from latentdiff.pipeline.callbacks import Trace, preview_images
from latentdiff.pipeline.conditioning.encode import tokenize_prompt
from latentdiff.pipeline.conditioning.prompt import parse_prompt

CALL = {"prompt": ["a red heart", "a cat"], "seed": 1, "num_inference_steps": 3}


def test_tracing_changes_nothing_and_keeps_every_step():
    pipe = tiny_pipeline()
    plain = pipe(**CALL, output_type="latent").images
    trace = Trace()
    traced = pipe(**CALL, output_type="latent", callback_on_step_end=trace).images
    assert torch.equal(plain, traced)
    assert len(trace.steps) == 3
    assert torch.equal(trace.steps[-1]["latents"], traced)
    strip = trace.grid(pipe.vae, image=1)
    assert strip.width > 3 * SIZE
    unguided = Trace()
    pipe(**CALL, guidance_scale=1, callback_on_step_end=unguided)
    assert unguided.grid(pipe.vae).height < strip.height


def test_long_traces_show_at_most_eight_columns():
    pipe = tiny_pipeline()
    trace = Trace()
    pipe("a cat", num_inference_steps=20, seed=1, callback_on_step_end=trace)
    short = Trace()
    pipe("a cat", num_inference_steps=8, seed=1, callback_on_step_end=short)
    assert trace.grid(pipe.vae).size == short.grid(pipe.vae).size
    with pytest.raises(ValueError, match="nothing was traced"):
        Trace().grid(pipe.vae)


@pytest.mark.parametrize(("height", "width"), [(SIZE, SIZE), (20, 44)])
def test_attention_of_all_tokens_adds_up_to_one(height, width):
    pipe = tiny_pipeline()
    call = CALL | {"height": height, "width": width, "output_type": "np"}
    plain = pipe(**call).images
    with record_attention(pipe.unet, num_images=2) as maps:
        recorded = pipe(**call).images
    assert np.array_equal(plain, recorded)
    heat = maps.mean()
    assert heat.shape == (2, 16, height // 4, width // 4)
    torch.testing.assert_close(heat.sum(1), torch.ones(2, height // 4, width // 4))
    with record_attention(pipe.unet, num_images=2) as after:
        pass
    assert after.num_added == 0
    with pytest.raises(ValueError, match="no cross-attention"):
        after.mean()


def test_attention_equals_the_processor_s_own_probabilities():
    pipe = tiny_pipeline()
    attn = next(m for n, m in pipe.unet.named_modules() if n.endswith("attn2"))
    hidden, states = torch.randn(1, 64, attn.query_dim), torch.randn(1, 16, 16)
    maps = AttentionMaps(1, size=(8, 8))
    with torch.no_grad():
        query, key = (
            attn.head_to_batch_dim(attn.to_q(hidden)),
            attn.head_to_batch_dim(attn.to_k(states)),
        )
        expected = attn.get_attention_scores(query, key).mean(0)
        maps.add(attention_probabilities(attn, hidden, states))
    torch.testing.assert_close(maps.mean()[0].flatten(1).T, expected)


def test_heat_maps_have_a_panel_a_token():
    pipe = tiny_pipeline()
    with record_attention(pipe.unet, num_images=1) as maps:
        image = pipe("a red heart", seed=1, num_inference_steps=1).images[0]
    prompt = parse_prompt("a red heart")
    count = len(tokenize_prompt(pipe.tokenizer, prompt).ids)
    sheet = heat_map_grid(
        image, maps.mean()[0], tokenizer=pipe.tokenizer, prompt=prompt, columns=count + 1
    )
    assert sheet.width >= (count + 1) * 128


def test_preview_shows_latents_small():
    pipe = tiny_pipeline()
    shown = []
    pipe(
        "a cat",
        num_inference_steps=2,
        seed=1,
        callback_on_step_end=lambda pipe, i, t, tensors: shown.append(
            preview_images(tiny_vae(), tensors["predicted_z0"])
        ),
        callback_on_step_end_tensor_inputs=["predicted_z0"],
    )
    assert [images[0].size for images in shown] == [(SIZE, SIZE)] * 2
    small = preview_images(tiny_vae(), torch.zeros(1, 4, 64, 32))
    assert small[0].size == (64, 128)
    assert isinstance(small[0], Image.Image)
