"""The fused operations equal diffusers' modules, and changed modules go the plain way."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from latentdiff.cpu.fused_transformers import fuse_transformers, unfuse_transformers
from latentdiff.models.build import build_unet

STEPS = 20
BATCH, TOKENS, WIDTH = 4, 7, 24


def make_unet(*, dropout: float = 0.0, head_dim: int = 16) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return build_unet(
        sample_size=8,
        in_channels=4,
        block_out_channels=(32, 64),
        attention_levels=(True, True),
        layers_per_block=1,
        head_dim=head_dim,
        cross_attention_dim=WIDTH,
        dropout=dropout,
    ).train()


def pair() -> tuple[UNet2DConditionModel, UNet2DConditionModel]:
    plain = make_unet()
    fused = copy.deepcopy(plain)
    fuse_transformers(fused)
    return plain, fused


def inputs(*, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(BATCH, 4, size, size, generator=generator),
        torch.randint(0, 1000, (BATCH,), generator=generator),
        torch.randn(BATCH, TOKENS, WIDTH, generator=generator),
    )


def run(unet: UNet2DConditionModel, zt: Tensor, t: Tensor, text: Tensor) -> Tensor:
    return unet(zt, t, text, return_dict=False)[0]


def train(unet: UNet2DConditionModel, *, bf16: bool) -> list[float]:
    zt, t, text = inputs()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    losses = []
    for _ in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = run(unet, zt, t, text)
        loss = F.mse_loss(output.float(), zt)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 1e-3)])
def test_training_follows_the_plain_path_for_20_steps(bf16: bool, tolerance: float) -> None:
    plain, fused = pair()
    wanted, found = train(plain, bf16=bf16), train(fused, bf16=bf16)
    assert wanted[-1] < 0.99 * wanted[0]
    assert found == pytest.approx(wanted, rel=tolerance)


@pytest.mark.parametrize(
    "size", [8, 20]
)  # 400 latent pixels: torch's kernel attends, the rest is fused
def test_every_gradient_is_that_of_the_plain_path(size: int) -> None:
    plain, fused = (unet.double() for unet in pair())
    zt, t, text = inputs(size=size)
    gradients = []
    for unet in (plain, fused):
        asked = [zt.double().requires_grad_(), text.double().requires_grad_()]
        run(unet, asked[0], t, asked[1]).square().sum().backward()
        gradients.append([*(leaf.grad for leaf in asked), *(p.grad for p in unet.parameters())])
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_weights_config_and_copies_are_as_before() -> None:
    plain, fused = pair()
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert fused.config == plain.config
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert not run(twin, *inputs()).any()
    unfuse_transformers(fused)
    assert torch.equal(run(fused, *inputs()), run(plain, *inputs()))


def checkpointed(unet: UNet2DConditionModel) -> None:
    unet.enable_gradient_checkpointing()


def frozen_but_norms(unet: UNet2DConditionModel) -> None:
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("norm" in name)


def channels_last(unet: UNet2DConditionModel) -> None:
    unet.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("change", [checkpointed, frozen_but_norms, channels_last])
def test_ways_of_training_change_no_gradient(
    change: Callable[[UNet2DConditionModel], None],
) -> None:
    plain, fused = (unet.double() for unet in pair())
    zt, t, text = inputs()
    for unet in (plain, fused):
        change(unet)
        run(unet, zt.double(), t, text.double()).square().sum().backward()
    for wanted, found in zip(plain.parameters(), fused.parameters(), strict=True):
        if wanted.requires_grad:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-8, atol=1e-8)
        else:
            assert found.grad is None


def hook_attention(unet: UNet2DConditionModel) -> None:
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.register_forward_hook(lambda layer, args, output: 2 * output)


def add_lora(unet: UNet2DConditionModel) -> None:
    from peft import LoraConfig

    torch.manual_seed(2)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_in"], init_lora_weights=False))


@pytest.mark.parametrize("change", [hook_attention, add_lora])
def test_a_changed_layer_is_heard(change: Callable[[UNet2DConditionModel], None]) -> None:
    plain, fused = pair()
    before = run(plain, *inputs())
    for unet in (plain, fused):
        change(unet)
    wanted = run(plain, *inputs())
    assert not torch.allclose(wanted, before)
    torch.testing.assert_close(run(fused, *inputs()), wanted)


def test_a_mask_over_the_text_is_heard() -> None:
    plain, fused = pair()
    mask = torch.ones(BATCH, TOKENS)
    mask[:, 3:] = 0
    wanted, found = (
        unet(*inputs(), encoder_attention_mask=mask, return_dict=False)[0]
        for unet in (plain, fused)
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("size", [8, 20])
def test_evaluation_without_gradients_gives_the_plain_path(size: int) -> None:
    plain, fused = (unet.eval() for unet in pair())
    with torch.no_grad():
        wanted, found = (run(unet, *inputs(size=size)) for unet in (plain, fused))
    torch.testing.assert_close(found, wanted)
