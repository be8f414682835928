"""Settings that save memory: they log their need, and change no number that they should not."""

import sys
import types

import pytest
import torch
from fakes_models import make_unet
from torch import nn

from latentdiff.config.io import parse_arguments
from latentdiff.config.text_to_image import Config
from latentdiff.training.distributed import start_accelerator
from latentdiff.training.optim import ema as ema_module
from latentdiff.training.optim.ema import Averages, Ema
from latentdiff.training.optim.optimizer import build_optimizer, check_optimizer
from latentdiff.training.optim.posthoc_ema import PosthocEma
from latentdiff.training.text_to_image.model import check_attention, set_attention

CPU = torch.device("cpu")


def test_attention_kernels_give_the_same() -> None:
    torch.manual_seed(0)
    unet = make_unet().eval()
    given = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 16)
    outputs = []
    for name in ("plain", "sdpa", "auto"):
        set_attention(unet, name, num_latent_pixels=64, device=CPU)
        with torch.no_grad():
            outputs.append(unet(*given).sample)
    kinds = {type(p).__name__ for p in unet.attn_processors.values()}
    assert kinds == {"AttnProcessor"}, "auto, on the CPU and for 64 latent pixels"
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--train.attention=xformers", "needs a GPU .*train.attention=sdpa"),
        ("--train.optimizer=adamw8bit", "bitsandbytes|needs a GPU"),
        ("--train.attention=flash", "train.attention"),
        ("--train.ema_device=disk", "train.ema_device"),
        ("--diffusion.huber_delta=0", "huber_delta=0.*above 0"),
        ("--diffusion.logit_normal_std=-1", "logit_normal_std"),
        ("--diffusion.logit_normal_unbiased=true", "timestep_sampling=logit_normal"),
        ("--diffusion.input_perturbation=-1", "input_perturbation"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_loaded(
    argument: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start_accelerator(parse_arguments(Config, [argument, "--train.mixed_precision=fp32"]))


def test_missing_or_broken_xformers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setattr(torch, "zeros", lambda *a, **k: pytest.fail("not reached"))
    with pytest.raises(ValueError, match=r"pip install 'latentdiff\[xformers\]'"):
        check_attention("xformers", torch.device("cuda"))
    monkeypatch.undo()
    ops = types.ModuleType("xformers.ops")

    def broken(*arguments: object) -> None:
        raise NotImplementedError("no operator found")

    ops.memory_efficient_attention = broken
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(torch, "zeros", lambda *arguments, **settings: None)
    with pytest.raises(ValueError, match=r"do not run here \(no operator found\)"):
        check_attention("xformers", torch.device("cuda"))


def test_eight_bit_adamw_is_that_of_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class AdamW8bit(torch.optim.AdamW):
        pass

    package, optim = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    optim.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "weight_decay": 0.3}]
    made = build_optimizer(groups, name="adamw8bit", lr=0.1, betas=(0.9, 0.95))
    assert isinstance(made, AdamW8bit)
    assert made.param_groups[0]["betas"] == (0.9, 0.95)
    assert made.param_groups[0]["weight_decay"] == 0.3
    check_optimizer("adamw8bit", torch.device("cuda"))
    with pytest.raises(ValueError, match="needs a GPU"):
        check_optimizer("adamw8bit", CPU)


@pytest.mark.parametrize("kind", ["ema", "power"])
def test_averages_on_the_host_are_those_on_the_device_bit_for_bit(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's way, copy the weights over and then average, against averaging in place."""

    def make(module: nn.Module) -> Averages:
        if kind == "power":
            return PosthocEma(module, gamma=6.9, device="cpu")
        return Ema(module, decay=0.99, device="cpu")

    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 17, 3), nn.BatchNorm2d(17), nn.Linear(5, 301))
    in_place, copied = make(module), make(module)
    for step in range(40):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        ok = torch.tensor(step % 7 != 3)
        in_place.update(ok)
        with monkeypatch.context() as patch:
            patch.setattr(ema_module, "_is_float_on_cpu", lambda tensor: False)
            copied.update(ok)
    resumed = make(module)
    resumed.load_state_dict(copied.state_dict())
    for other in (copied, resumed):
        for name, tensor in in_place.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    assert in_place.num_bytes >= 4 * sum(p.numel() for p in module.parameters())
