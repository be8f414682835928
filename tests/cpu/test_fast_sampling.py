"""Sampling by packed layers on a CPU: the plain path's images, and never old weights'."""

import copy

import numpy as np
import pytest
import torch
from fakes_pipeline import tiny_components, tiny_pipeline, tiny_unet
from peft import LoraConfig

from latentdiff.cpu import packed_layers
from latentdiff.cpu.fast_sampling import FastCPU, is_stock
from latentdiff.cpu.packed_layers import GroupNorm, attend
from latentdiff.pipeline import LatentDiffPipeline

CALL = {"prompt": ["a red heart", "a cat"], "seed": 1, "guidance_scale": 4.0, "output_type": "np"}


def draw(pipe, *, fast=True, steps=3, **changes):
    pipe.fast_cpu.is_on = fast
    return pipe(**CALL | {"num_inference_steps": steps} | changes).images


def is_packed(pipe):
    return pipe.fast_cpu._packed is not None


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"use_linear_projection": True, "attention_head_dim": (2, 4), "layers_per_block": 2},
        {"transformer_layers_per_block": 2, "upcast_attention": True, "block_out_channels": (8, 8)},
    ],
    ids=["sd1", "sd2", "deep"],
)
def test_twenty_steps_in_float32_are_the_plain_paths(shape):
    pipe = tiny_pipeline(unet=tiny_unet(**shape))
    plain = draw(pipe, fast=False, steps=20)
    assert not is_packed(pipe)
    fast = draw(pipe, steps=20)
    assert is_packed(pipe)
    assert np.abs(fast - plain).max() <= 1 / 255
    assert np.abs(fast - plain).max() < 1e-3


def test_bf16_is_as_near_to_float32_as_the_plain_path():
    pipe = tiny_pipeline()
    seeds = range(4)
    exact = [draw(pipe, fast=False, steps=20, seed=seed) for seed in seeds]
    pipe.to(dtype=torch.bfloat16)
    errors = {}
    for fast in (False, True):
        images = [draw(pipe, fast=fast, steps=20, seed=seed) for seed in seeds]
        errors[fast] = np.abs(np.stack(images) - np.stack(exact)).mean()
    assert is_packed(pipe)
    assert errors[True] <= 1.1 * errors[False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_has_the_plain_pass_outputs_at_other_shapes_too(dtype):
    torch.manual_seed(0)
    unet, fast = tiny_unet().to(dtype), FastCPU()
    fast.is_on = True
    exact = copy.deepcopy(unet).float()
    for batch, height, width in [(2, 8, 8), (4, 8, 8), (1, 6, 10), (1, 5, 7)]:
        x, t = torch.randn(batch, 4, height, width).to(dtype), torch.tensor(321)
        states = torch.randn(batch, 16, 16).to(dtype)
        with torch.no_grad():
            got = fast(unet, x, t, states, scale=None).float()
            want = exact(x.float(), t, states.float(), return_dict=False)[0]
            plain = unet(x, t, states, return_dict=False)[0].float()
        if dtype == torch.float32:
            torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
        assert (got - want).abs().mean() <= 1.3 * (plain - want).abs().mean() + 1e-6
    assert fast._packed is not None


@pytest.mark.parametrize("kind", ["CrossAttnDownBlock2D", "DownBlock2D"])
def test_latents_under_two_captions_are_those_twice(kind):
    torch.manual_seed(0)
    unet, fast = tiny_unet(down_block_types=(kind, "CrossAttnDownBlock2D")), FastCPU()
    x, states, t = torch.randn(3, 4, 8, 8), torch.randn(6, 16, 16), torch.tensor(500)
    with torch.no_grad():
        want = unet(torch.cat([x, x]), t, states, return_dict=False)[0]
        assert torch.equal(fast(unet, x, t, states, scale=None), want)
        fast.is_on = True
        fast.look_again()
        got = fast(unet, x, t, states, scale=None)
    assert fast._packed is not None
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (got[:3] - got[3:]).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["in place", "through data", "loaded", "replaced"])
def test_changed_weights_are_packed_anew(how):
    pipe = tiny_pipeline()
    before = draw(pipe)
    weight = pipe.unet.conv_out.weight
    with torch.no_grad():
        if how == "in place":
            weight.mul_(2)
        elif how == "through data":
            weight.data.mul_(2)
        elif how == "loaded":
            state = pipe.unet.state_dict()
            pipe.unet.load_state_dict({name: value * 1.5 for name, value in state.items()})
        else:
            pipe.unet.conv_out.weight = torch.nn.Parameter(weight * 2)
    after = draw(pipe)
    assert is_packed(pipe)
    assert np.abs(after - before).max() > 1e-3
    assert np.abs(after - draw(pipe, fast=False)).max() <= 1 / 255


def test_text_states_changed_between_steps_are_read_anew():
    def swap(pipe, i, t, tensors):
        return {"prompt_embeds": -tensors["prompt_embeds"]}

    def write(pipe, i, t, tensors):
        tensors["prompt_embeds"].neg_()

    pipe = tiny_pipeline()
    for change in (swap, write):
        named = {
            "callback_on_step_end": change,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        }
        gap = np.abs(draw(pipe, **named) - draw(pipe, fast=False, **named)).max()
        assert gap <= 1 / 255
        assert np.abs(draw(pipe, **named) - draw(pipe)).max() > 1e-4


def test_lora_goes_the_plain_way_and_back():
    pipe = tiny_pipeline()
    before = draw(pipe)
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(lora, adapter_name="style")
    styled = draw(pipe)
    assert not is_packed(pipe)
    assert np.abs(styled - before).max() > 1e-4
    assert np.array_equal(draw(pipe, lora_scale=0.0), before)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = draw(pipe)
    assert is_packed(pipe)
    assert np.abs(fused - styled).max() <= 1 / 255


def test_dtype_change_and_round_trip_draw_as_the_plain_path(tmp_path):
    pipe = tiny_pipeline()
    before = draw(pipe)
    state = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.save_pretrained(tmp_path)
    opened = LatentDiffPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    assert np.abs(draw(opened) - before).max() < 1e-5
    for name, value in opened.unet.state_dict().items():
        assert torch.equal(value, state[name])
    assert np.abs(draw(pipe.to(dtype=torch.bfloat16)) - before).max() > 0
    assert np.abs(draw(copy.deepcopy(opened)) - before).max() < 1e-5


def hook(unet):
    unet.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *seen: None)


def freeu(unet):
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)


def slices(unet):
    unet.set_attention_slice("max")


def chunks(unet):
    unet.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(2, 1)


def dropout(unet):
    unet.down_blocks[0].resnets[0].dropout.p = 0.5
    unet.train()


def half(unet):
    unet.to(torch.float16)


@pytest.mark.parametrize("change", [hook, freeu, slices, chunks, dropout, half])
def test_what_is_not_stock_goes_the_plain_way(change):
    unet = tiny_unet()
    assert is_stock(unet)
    change(unet)
    assert not is_stock(unet)


def test_latents_come_back_in_the_usual_layout():
    pipe = tiny_pipeline()
    latents = draw(pipe, output_type="latent")
    assert is_packed(pipe)
    assert latents.is_contiguous()
    latents.mul_(2)  # a tensor like any other


def test_guide_and_switch_go_the_plain_way():
    pipe = tiny_pipeline(**{"unet": tiny_components()["unet"]})

    def brighter(z0, t):
        return z0.mean(dim=(1, 2, 3))

    fast, plain = draw(pipe, score_fn=brighter), draw(pipe, score_fn=brighter, fast=False)
    assert np.abs(fast - plain).max() <= 1 / 255
    assert not is_packed(pipe)
    draw(pipe)
    assert is_packed(pipe)
    pipe.fast_cpu.forget()
    assert not is_packed(pipe)


def attention_exactly(q, k, v, scale):
    """Return softmax(scale q k^T) v (B, N, H D) in float64."""
    weights = torch.softmax(scale * q.double() @ k.double().mT, -1)
    return (weights @ v.double()).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("size", [1.0, 4.0, 40.0], ids=["small", "large", "too large for exp"])
@pytest.mark.parametrize("num_keys", [20, 300, 777])
@pytest.mark.parametrize("offset", [0.0, 30.0], ids=["centred", "offset"])
def test_attention_of_any_scores_and_lengths(size, num_keys, offset):
    torch.manual_seed(3)
    shape = (2, 3, 600, 24)
    q = (torch.randn(shape) * size**0.5).bfloat16()
    k = (torch.randn(2, 3, num_keys, 24) * size**0.5 + offset).bfloat16()
    v = torch.randn(2, 3, num_keys, 24).bfloat16()
    got, exact = attend(q, k, v, scale=24**-0.5), attention_exactly(q, k, v, 24**-0.5)
    assert got.shape == (2, 600, 72)
    error = (got.double() - exact).abs().mean() / exact.abs().mean()
    assert error < 0.015


def test_attention_by_bare_exponentials_is_taken_where_it_is_safe(monkeypatch):
    taken = []
    blocks = packed_layers._attend_in_blocks
    monkeypatch.setattr(
        packed_layers, "_attend_in_blocks", lambda *a: taken.append(1) or blocks(*a)
    )
    q = torch.randn(1, 1, 300, 8).bfloat16()
    attend(q, q, q, scale=1.0)
    attend(10 * q, q, q, scale=1.0)
    assert len(taken) == 1
    attend(q, q + 30, q, scale=1.0)
    assert len(taken) == 2
    attend(q[:, :, :256], q[:, :, :256], q[:, :, :256], scale=1.0)
    assert len(taken) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [64, 1024])
def test_group_norm_is_torchs_and_stays_channels_last(channels, dtype):
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(32, channels).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, channels, 4, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    got = GroupNorm(norm)(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, norm(x))
