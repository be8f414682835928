"""Image conditions: stock's channels in stock's order, and a widened U-Net that begins as its
base."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from fakes_models import make_tiny_vae, make_unet, make_vae
from torch._subclasses.fake_tensor import FakeTensorMode

from latentdiff.models.compatibility import CONDITION_KINDS, check_condition, condition_kinds
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.latents import LatentCodec
from latentdiff.models.unet.guidance_embedding import predict
from latentdiff.models.unet.image_conditions import (
    add_condition,
    condition_pixels,
    depth_channels,
    inpaint_channels,
    instruct_pix2pix_channels,
    low_res_schedule,
    null_channels,
    upscale_channels,
)

SHAPE = (2, 4, 8, 8)


def widened(kind: str) -> tuple[UNet2DConditionModel, UNet2DConditionModel, Conditioning]:
    """A U-Net, a copy that reads a condition, and a conditioning with a random one."""
    torch.manual_seed(0)
    base, wide = make_unet().eval(), make_unet().eval()
    wide.load_state_dict(base.state_dict())
    add_condition(wide, kind)
    num = CONDITION_KINDS[kind].num_channels(4)
    labels = torch.tensor([3, 700]) if kind == "upscale" else None
    condition = torch.randn(2, num, 8, 8)
    return base, wide, Conditioning(torch.randn(2, 5, 16), class_labels=labels, condition=condition)


@pytest.mark.parametrize("kind", CONDITION_KINDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_widened_unet_equals_its_base_bit_for_bit_whatever_the_condition(
    kind: str, layout: torch.memory_format
) -> None:
    base, wide, given = (
        x.to(memory_format=layout) if hasattr(x, "conv_in") else x for x in widened(kind)
    )
    zt, t = torch.randn(SHAPE), torch.tensor([10, 900])
    with torch.no_grad():
        before = predict(base, zt, t, Conditioning(given.prompt_embeds))
        after = predict(wide, zt, t, given)
    assert torch.equal(before, after)
    assert torch.equal(base.conv_in.bias, wide.conv_in.bias)
    assert base.conv_in.bias.abs().min() > 0
    assert condition_kinds(wide.config, latent_channels=4) == [kind]


def test_a_widened_unet_is_saved_and_opened_with_its_class_embedding(tmp_path: object) -> None:
    _, wide, given = widened("upscale")
    torch.nn.init.normal_(wide.class_embedding.weight)
    wide.save_pretrained(tmp_path)
    opened = UNet2DConditionModel.from_pretrained(tmp_path)
    zt, t = torch.randn(SHAPE), torch.tensor([10, 900])
    with torch.no_grad():
        assert torch.equal(predict(wide, zt, t, given), predict(opened, zt, t, given))


def test_a_condition_of_another_kind_is_refused_by_what_the_model_is() -> None:
    _, wide, _ = widened("instruct_pix2pix")
    assert check_condition(wide.config, "instruct_pix2pix", latent_channels=4)
    assert not check_condition(make_unet().config, "depth", latent_channels=4)
    with pytest.raises(
        ValueError, match=r"kind instruct_pix2pix: .*8 channels.*condition\.kind=none"
    ):
        check_condition(wide.config, "none", latent_channels=4)
    with pytest.raises(ValueError, match="unknown image condition: its U-Net takes 6 channels"):
        check_condition(make_unet(channels=6).config, "depth", latent_channels=4)


def test_inpainting_reads_the_mask_and_then_the_latents_of_the_rest() -> None:
    codec = LatentCodec(make_vae())
    pixels, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(SHAPE)
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, :16] = 0.7  # hidden, as stock binarises at 0.5
    with torch.no_grad():
        channels = inpaint_channels(codec, pixels, mask, noise)
        expected = codec.encode(pixels * (mask < 0.5), noise)
    assert torch.equal(channels[:, 1:], expected)
    assert (channels[:, 0, :4] == 1).all()
    assert (channels[:, 0, 4:] == 0).all()
    other = pixels.clone()
    other[:, :, :16] = torch.rand(2, 3, 16, 32)  # what is hidden does not show
    with torch.no_grad():
        assert torch.equal(inpaint_channels(codec, other, mask, noise), channels)


def test_edits_read_the_unscaled_mode() -> None:
    vae = make_vae(scaling_factor=0.3)
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        channels = instruct_pix2pix_channels(LatentCodec(vae), pixels)
        expected = vae.encode(pixels.contiguous(memory_format=torch.channels_last))
    assert torch.equal(channels, expected.latent_dist.mode())


def test_low_resolution_images_are_noised_as_stocks_low_res_scheduler_does() -> None:
    stock = DDPMScheduler(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=0.02)
    low_res, noise, level = torch.rand(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([0, 350])
    expected = stock.add_noise(low_res, noise, level)
    torch.testing.assert_close(upscale_channels(low_res, noise, level), expected)


def test_low_resolution_images_are_noised_on_the_device_that_they_are_on() -> None:
    """On a fake GPU, where operations refuse tensors of several devices as on a real one."""
    low_res_schedule()  # kept for later calls, so not made of fake tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        image = torch.empty(2, 3, 8, 8, device="cuda")
        level = torch.empty(2, dtype=torch.int64, device="cuda")
        assert upscale_channels(image, image, level).device.type == "cuda"


def test_depth_is_scaled_as_stock_does_and_a_constant_map_stays_finite() -> None:
    depth = torch.rand(2, 1, 32, 32) * 700
    depth[1] = 3.3
    channels = depth_channels(depth, (8, 8))
    small = F.interpolate(depth[:1], size=(8, 8), mode="bicubic", align_corners=False)
    expected = 2.0 * (small - small.min()) / (small.max() - small.min()) - 1.0
    assert torch.equal(channels[:1], expected)
    assert (channels[1] == -1).all()
    assert (depth_channels(torch.zeros(1, 1, 32, 32), (8, 8)) == -1).all()


@pytest.mark.parametrize("kind", CONDITION_KINDS)
@pytest.mark.parametrize("make", [make_vae, make_tiny_vae])
def test_no_condition_has_the_shape_of_one_and_is_shown(kind: str, make: object) -> None:
    codec = LatentCodec(make())
    num = CONDITION_KINDS[kind].num_channels(codec.channels)
    side = 32 // codec.factor
    with torch.no_grad():
        null = null_channels(kind, codec, torch.randn(2, num, side, side))
        shown = condition_pixels(kind, codec, null)
    assert null.shape == (2, num, side, side)
    assert shown.shape == (2, 3, 32, 32)
    assert shown.isfinite().all()
    if kind == "inpaint":
        assert (null[:, 0] == 1).all()
