"""Sampling by packed layers on a CPU: the plain path's images, and never old weights."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from fakes_pipeline import tiny_components, tiny_pipeline, tiny_unet
from peft import LoraConfig

from latentdiff.cpu import packed_layers
from latentdiff.cpu.fast_sampling import FastCPU
from latentdiff.cpu.packed_layers import GroupNorm, attend
from latentdiff.cpu.stock import is_stock
from latentdiff.pipeline import LatentDiffPipeline

CALL = {"prompt": ["a red heart", "a cat"], "seed": 1, "guidance_scale": 4.0, "output_type": "np"}


def generate(pipe, *, fast=True, steps=3, **changes):
    pipe.fast_cpu.is_on = fast
    return pipe(**CALL | {"num_inference_steps": steps} | changes).images


def is_packed(pipe):
    return bool(pipe.fast_cpu._forwards)


def run(fast, unet, x, t, states, **conditions):
    """Return the output of a pass that `fast` may speed up."""
    with torch.no_grad(), fast.speed_up(unet, x):
        output = unet(x, t, states, return_dict=False, **conditions)[0]
    return output.clone()


def fast_classes(fast, unet):
    """Return how many modules of each class have packed forward passes for a pass of `unet`."""
    with torch.no_grad(), fast.speed_up(unet, torch.zeros(1, 4, 8, 8)):
        return Counter(type(one) for one in unet.modules() if "forward" in vars(one))


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
    plain = generate(pipe, fast=False, steps=20)
    assert not is_packed(pipe)
    fast = generate(pipe, steps=20)
    assert is_packed(pipe)
    assert np.abs(fast - plain).max() <= 1 / 255
    assert np.abs(fast - plain).max() < 1e-3


def test_bf16_is_as_near_to_float32_as_the_plain_path():
    pipe = tiny_pipeline()
    seeds = range(4)
    exact = [generate(pipe, fast=False, steps=20, seed=seed) for seed in seeds]
    pipe.to(dtype=torch.bfloat16)
    errors = {}
    for fast in (False, True):
        images = [generate(pipe, fast=fast, steps=20, seed=seed) for seed in seeds]
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
        got = run(fast, unet, x, t, states).float()
        with torch.no_grad():
            want = exact(x.float(), t, states.float(), return_dict=False)[0]
            plain = unet(x, t, states, return_dict=False)[0].float()
        if dtype == torch.float32:
            torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
        assert (got - want).abs().mean() <= 1.3 * (plain - want).abs().mean() + 1e-6
    assert fast._forwards


@pytest.mark.parametrize("kind", ["CrossAttnDownBlock2D", "DownBlock2D"])
def test_latents_under_two_captions_are_those_twice(kind):
    torch.manual_seed(0)
    unet, fast = tiny_unet(down_block_types=(kind, "CrossAttnDownBlock2D")), FastCPU()
    x, states, t = torch.randn(3, 4, 8, 8), torch.randn(6, 16, 16), torch.tensor(500)
    x = torch.cat([x, x])
    want = run(fast, unet, x, t, states)
    fast.is_on = True
    fast.invalidate()
    got = run(fast, unet, x, t, states)
    assert fast._forwards
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert (got[:3] - got[3:]).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["in place", "through data", "loaded", "replaced"])
def test_changed_weights_are_packed_anew(how):
    pipe = tiny_pipeline()
    before = generate(pipe)
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
    after = generate(pipe)
    assert is_packed(pipe)
    assert np.abs(after - before).max() > 1e-3
    assert np.abs(after - generate(pipe, fast=False)).max() <= 1 / 255


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
        gap = np.abs(generate(pipe, **named) - generate(pipe, fast=False, **named)).max()
        assert gap <= 1 / 255
        assert np.abs(generate(pipe, **named) - generate(pipe)).max() > 1e-4


def test_lora_goes_the_plain_way_and_back():
    pipe = tiny_pipeline()
    before = generate(pipe)
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(lora, adapter_name="style")
    styled = generate(pipe)
    assert fast_classes(pipe.fast_cpu, pipe.unet)[Transformer2DModel] == 0
    assert np.abs(styled - generate(pipe, fast=False)).max() <= 1 / 255
    assert np.abs(styled - before).max() > 1e-4
    assert np.array_equal(generate(pipe, lora_scale=0.0), before)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    fused = generate(pipe)
    assert is_packed(pipe)
    assert np.abs(fused - styled).max() <= 1 / 255


def test_dtype_change_and_round_trip_equal_the_plain_path(tmp_path):
    pipe = tiny_pipeline()
    before = generate(pipe)
    state = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    pipe.save_pretrained(tmp_path)
    opened = LatentDiffPipeline.from_pretrained(tmp_path)
    opened.set_progress_bar_config(disable=True)
    assert np.abs(generate(opened) - before).max() < 1e-5
    for name, value in opened.unet.state_dict().items():
        assert torch.equal(value, state[name])
    assert np.abs(generate(pipe.to(dtype=torch.bfloat16)) - before).max() > 0
    assert np.abs(generate(copy.deepcopy(opened)) - before).max() < 1e-5


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


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (hook, {ResnetBlock2D: 1}),
        (freeu, {}),
        (slices, {Transformer2DModel: 4}),
        (chunks, {Transformer2DModel: 1}),
    ],
)
def test_modules_that_are_not_stock_alone_go_the_plain_way(change, missing):
    unet, fast = tiny_unet(), FastCPU()
    fast.is_on = True
    whole = fast_classes(fast, unet)
    change(unet)
    fast.invalidate()
    found = fast_classes(fast, unet)
    for kind in (ResnetBlock2D, Transformer2DModel):
        assert found[kind] == whole[kind] - missing.get(kind, 0)
    assert is_stock(unet) == (not missing)
    torch.manual_seed(0)
    x, t, states = torch.randn(2, 4, 8, 8), torch.tensor(321), torch.randn(2, 16, 16)
    outputs = []
    for is_on in (True, False):
        fast.is_on = is_on
        fast.invalidate()
        outputs.append(run(fast, unet, x, t, states))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def compiled(unet):
    unet.compile(backend="eager")


@pytest.mark.parametrize("change", [dropout, half, compiled])
def test_dropout_compiling_and_a_dtype_without_kernels_go_the_plain_way(change):
    unet, fast = tiny_unet(), FastCPU()
    fast.is_on = True
    assert fast_classes(fast, unet)
    change(unet)
    fast.invalidate()
    assert not fast_classes(fast, unet)
    assert not is_stock(unet) or change is half


SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 8 + 6 * 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "transformer_layers_per_block": 2,
}


def conditioned(kind):
    """Return a U-Net of a kind, and the conditions of a pass over four latents."""
    generator = torch.Generator().manual_seed(7)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    if kind == "class":
        return tiny_unet(num_class_embeds=5), {"class_labels": torch.tensor([0, 4, 1, 1])}
    if kind == "class, concatenated":
        unet = tiny_unet(num_class_embeds=5, class_embeddings_concat=True)
        return unet, {"class_labels": torch.tensor([0, 4, 1, 1])}
    if kind == "guidance":
        return tiny_unet(time_cond_proj_dim=6), {"timestep_cond": randn(4, 6)}
    if kind == "sdxl":
        added = {"text_embeds": randn(4, 8), "time_ids": torch.full((4, 6), 32.0)}
        return tiny_unet(**SDXL), {"added_cond_kwargs": added}
    unet = tiny_unet()
    skips = [*([(8, 8)] * 2), *([(4, 4)] * 2)]
    channels = [unet.config.block_out_channels[k] for k in (0, 0, 0, 1)]
    residuals = [randn(4, c, *size) for c, size in zip(channels, skips, strict=True)]
    middle = randn(4, channels[-1], 4, 4)
    return unet, {
        "down_block_additional_residuals": residuals,
        "mid_block_additional_residual": middle,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["class", "class, concatenated", "guidance", "sdxl", "controlnet"])
def test_conditioned_unets_are_fast_and_as_exact(kind, dtype):
    unet, conditions = conditioned(kind)
    fast = FastCPU()
    fast.is_on = True
    torch.manual_seed(0)
    x, states = torch.randn(2, 4, 8, 8), torch.randn(4, 16, 16)
    x = torch.cat([x, x])  # as under guidance
    for t in (torch.tensor(321), torch.tensor(999), torch.tensor(321)):
        with torch.no_grad():
            exact = unet(x, t, states, return_dict=False, **conditions)[0]
        cast = copy.deepcopy(unet).to(dtype)
        given = {name: to_dtype(value, dtype) for name, value in conditions.items()}
        inputs = (x.to(dtype), t, states.to(dtype))
        with torch.no_grad():
            plain = cast(*inputs, return_dict=False, **given)[0].float()
        fast.invalidate()
        got = run(fast, cast, *inputs, **given).float()
        assert fast_classes(fast, cast)[ResnetBlock2D] == count(cast, ResnetBlock2D)
        assert fast_classes(fast, cast)[Transformer2DModel] == count(cast, Transformer2DModel)
        if dtype == torch.float32:
            torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
        assert (got - exact).abs().mean() <= 1.3 * (plain - exact).abs().mean() + 1e-6


def to_dtype(value, dtype):
    """Return floats of a condition in another dtype."""
    if isinstance(value, dict):
        return {name: to_dtype(one, dtype) for name, one in value.items()}
    if isinstance(value, list):
        return [to_dtype(one, dtype) for one in value]
    return value.to(dtype) if value.is_floating_point() else value


def count(unet, kind):
    return sum(type(one) is kind for one in unet.modules())


def test_halves_that_a_residual_makes_unequal_are_computed_apart():
    torch.manual_seed(0)
    unet, fast = tiny_unet(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D")), FastCPU()
    x, states, t = torch.randn(1, 4, 8, 8), torch.randn(2, 16, 16), torch.tensor(500)
    x = torch.cat([x, x])
    channels = unet.config.block_out_channels
    residuals = [torch.randn(2, channels[0], 4, 4), torch.randn(2, channels[1], 4, 4)]
    outputs = []
    for is_on in (True, False):
        fast.is_on = is_on
        fast.invalidate()
        adapter = {"down_intrablock_additional_residuals": list(residuals)}
        outputs.append(run(fast, unet, x, t, states, **adapter))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_the_unet_is_as_it_was_after_a_pass():
    unet, fast = tiny_unet(), FastCPU()
    fast.is_on = True
    before = {name: dict(vars(one)) for name, one in unet.named_modules()}
    state = {name: value.clone() for name, value in unet.state_dict().items()}
    run(fast, unet, torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 16, 16))
    assert before == {name: dict(vars(one)) for name, one in unet.named_modules()}
    assert list(state) == list(unet.state_dict())
    for name, value in unet.state_dict().items():
        assert torch.equal(value, state[name])
    with pytest.raises(RuntimeError):
        run(fast, unet, torch.randn(2, 3, 8, 8), torch.tensor(3), torch.randn(2, 16, 16))
    assert not any("forward" in vars(one) for one in unet.modules())


def test_latents_come_back_in_the_usual_layout():
    pipe = tiny_pipeline()
    latents = generate(pipe, output_type="latent")
    assert is_packed(pipe)
    assert latents.is_contiguous()
    latents.mul_(2)  # a tensor like any other


def test_guide_and_switch_go_the_plain_way():
    pipe = tiny_pipeline(**{"unet": tiny_components()["unet"]})

    def brighter(z0, t):
        return z0.mean(dim=(1, 2, 3))

    fast, plain = generate(pipe, score_fn=brighter), generate(pipe, score_fn=brighter, fast=False)
    assert np.abs(fast - plain).max() <= 1 / 255
    assert not is_packed(pipe)
    generate(pipe)
    assert is_packed(pipe)
    generate(pipe, fast=False)
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
