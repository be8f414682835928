"""Averages of the weights: against plain loops, against torch, masked, swapped, reconstructed."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from latentdiff.training.optim import ema as ema_module
from latentdiff.training.optim.ema import Ema
from latentdiff.training.optim.posthoc_ema import (
    MAX_SIGMA_REL,
    PosthocEma,
    Snapshot,
    gamma_of,
    reconstruct,
    reconstruction_weights,
    sigma_rel_of,
)


def make_module() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    module[2].bias.requires_grad_(False)
    return module


def random_step(module: nn.Module) -> None:
    """Move every trainable weight and buffer at random."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for buffer in module.buffers():
            buffer.add_(1)


def test_update_is_the_plain_recursion_with_warmup() -> None:
    module = make_module()
    ema = Ema(module, decay=0.9)
    expected = {n: p.detach().double() for n, p in module.named_parameters() if p.requires_grad}
    for n in range(200):
        random_step(module)
        ema.update()
        d = min(0.9, (1 + n) / (10 + n))
        live = dict(module.named_parameters())
        expected = {k: d * v + (1 - d) * live[k].detach().double() for k, v in expected.items()}
    assert ema.tensors.keys() == expected.keys()
    assert "2.bias" not in ema.tensors
    for name, value in expected.items():
        torch.testing.assert_close(ema.tensors[name].double(), value, atol=1e-6, rtol=1e-5)
    assert int(ema.num_updates) == 200
    assert int(ema.buffers["1.num_batches_tracked"]) == 200


def test_without_warmup_equals_torch_averaged_model() -> None:
    module = make_module().requires_grad_(True)
    ema = Ema(module, decay=0.95, warmup=False)
    reference = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    reference.update_parameters(module)  # the first call copies, as our constructor does
    for _ in range(50):
        random_step(module)
        ema.update()
        reference.update_parameters(module)
    for name, value in reference.module.named_parameters():
        torch.testing.assert_close(ema.tensors[name], value.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("flag", [torch.tensor(False), torch.tensor(0.0)])
@pytest.mark.parametrize("make", [Ema, partial(PosthocEma, gamma=6.0)])
def test_masked_update_leaves_every_bit_though_weights_be_nan(
    make: Callable[[nn.Module], Ema | PosthocEma], flag: Tensor
) -> None:
    module = make_module()
    module[0].bias.data.fill_(-0.0)
    ema = make(module)
    ema.update(torch.tensor(True))
    module[0].bias.data.fill_(-0.0)
    before = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
        module[1].running_mean.fill_(float("inf"))
    ema.update(flag)
    for name, tensor in ema.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert torch.equal(tensor.signbit(), before[name].signbit())


def test_masked_updates_leave_no_trace() -> None:
    """The warm-up counts what was taken in, not what was tried."""
    skipping, plain = make_module(), make_module()
    plain.load_state_dict(skipping.state_dict())
    one, other = Ema(skipping), Ema(plain)
    for step in range(9):
        ok = torch.tensor(step % 3 != 1)
        random_step(skipping)
        one.update(ok)
        if ok:
            plain.load_state_dict(skipping.state_dict())
            other.update()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


def test_resumed_average_continues_bitwise() -> None:
    module = make_module()
    ema = Ema(module)
    for _ in range(3):
        random_step(module)
        ema.update()
    again = Ema(make_module())
    again.load_state_dict({name: t.clone() for name, t in ema.state_dict().items()})
    later = Ema(module)
    later.load_state_dict(ema.state_dict())
    random_step(module)
    ema.update()
    later.update()
    for name, tensor in ema.state_dict().items():
        assert torch.equal(tensor, later.state_dict()[name])


def test_state_of_another_model_is_refused_by_name() -> None:
    ema = Ema(make_module())
    state = ema.state_dict()
    with pytest.raises(ValueError, match=r"0\.bias is missing"):
        ema.load_state_dict({n: t for n, t in state.items() if n != "0.bias"})
    with pytest.raises(ValueError, match="other is extra"):
        ema.load_state_dict({**state, "other": torch.ones(1)})
    with pytest.raises(ValueError, match=r"0\.bias has shape \(7,\), expected \(8,\)"):
        ema.load_state_dict({**state, "0.bias": torch.ones(7)})


def test_swap_weights_gives_averages_and_restores_the_weights_bitwise() -> None:
    module = make_module()
    ema = Ema(module)
    random_step(module)
    ema.update()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def fail_inside() -> None:
        with ema.swap_weights(module):
            assert torch.equal(module[0].weight, ema.tensors["0.weight"])
            assert not torch.equal(module[0].weight, before["0.weight"])
            raise RuntimeError("a failed preview")

    with pytest.raises(RuntimeError, match="a failed preview"):
        fail_inside()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_bfloat16_weights_are_averaged_in_float32() -> None:
    module = nn.Linear(4, 4).bfloat16()
    ema = Ema(module, decay=0.999, warmup=False)
    with torch.no_grad():
        module.weight += 1
    start = ema.tensors["weight"].clone()
    ema.update()
    assert ema.tensors["weight"].dtype == torch.float32
    torch.testing.assert_close(
        ema.tensors["weight"] - start, torch.full((4, 4), 1e-3), rtol=0.05, atol=0
    )
    with ema.swap_weights(module):
        assert module.weight.dtype == torch.bfloat16


def test_average_follows_a_module_that_is_moved_after_it_was_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ema_module, "CHUNK_SIZE", 100)
    module = make_module()
    ema = Ema(module, decay=0.0, warmup=False)
    module.to(memory_format=torch.channels_last)
    module.to(torch.float64)
    random_step(module)
    ema.update()
    for name, tensor in ema.tensors.items():
        assert torch.equal(tensor, dict(module.named_parameters())[name].detach().float())
    for name, tensor in ema.buffers.items():
        assert torch.equal(tensor, dict(module.named_buffers())[name].to(tensor.dtype))


def test_chunks_and_memory_layout_change_no_average(monkeypatch: pytest.MonkeyPatch) -> None:
    one, many = make_module(), make_module().to(memory_format=torch.channels_last)
    many.load_state_dict(one.state_dict())
    whole = Ema(one)
    monkeypatch.setattr(ema_module, "CHUNK_SIZE", 10)
    chunked = Ema(many)
    random_step(one)
    many.load_state_dict(one.state_dict())
    whole.update()
    chunked.update()
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(chunked.tensors[name], tensor, atol=1e-7, rtol=1e-6)


def test_frozen_module_and_bad_decay_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameter of the module is trainable"):
        Ema(make_module().requires_grad_(False))
    with pytest.raises(ValueError, match=r"EMA decay is 1\.0"):
        Ema(make_module(), decay=1.0)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 6.94, 16.97, 120.0])
def test_sigma_rel_and_gamma_are_inverse(gamma: float) -> None:
    assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, abs=1e-6)


def test_sigma_rel_of_the_paper() -> None:
    """Karras et al. 2024, section 3.1: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    with pytest.raises(ValueError, match="sigma_rel is"):
        gamma_of(MAX_SIGMA_REL * 1.01)


def test_power_average_is_the_weighted_mean_of_its_recursion() -> None:
    module = make_module()
    ema = PosthocEma(module, gamma=5.0)
    expected = torch.zeros(8, 3, 3, 3, dtype=torch.float64)
    for t in range(1, 101):
        random_step(module)
        ema.update()
        beta = (1 - 1 / t) ** 6
        expected = beta * expected + (1 - beta) * module[0].weight.detach().double()
    torch.testing.assert_close(ema.tensors["0.weight"].double(), expected, atol=1e-5, rtol=1e-5)


def train_with(gammas: list[float], *, num_steps: int, every: int) -> dict[float, list[Snapshot]]:
    """Average a noisy path that settles, as weights do; snapshots by gamma."""
    module = nn.Linear(16, 16, bias=False)
    emas = [PosthocEma(module, gamma=gamma) for gamma in gammas]
    kept: dict[float, list[Snapshot]] = {gamma: [] for gamma in gammas}
    for step in range(1, num_steps + 1):
        with torch.no_grad():
            module.weight += 0.05 * (torch.ones(16, 16) - module.weight)
            module.weight += 0.3 * torch.randn(16, 16) / step**0.5
        for ema in emas:
            ema.update()
            if step % every == 0:
                weight = ema.tensors["weight"].clone()
                kept[ema.gamma].append(Snapshot(step, ema.gamma, {"weight": weight}))
    return kept


@pytest.mark.parametrize("sigma_rel", [0.06, 0.075, 0.12])
def test_reconstructed_average_equals_the_one_tracked_directly(sigma_rel: float) -> None:
    target = gamma_of(sigma_rel)
    narrow, wide = gamma_of(0.05), gamma_of(0.1)
    kept = train_with([narrow, wide, target], num_steps=2000, every=100)
    stored = kept[narrow] + kept[wide]
    tracked = kept[target][-1].tensors["weight"]
    reconstructed = reconstruct(stored, gamma=target)["weight"]
    nearest = min(
        (tracked - s.tensors["weight"]).norm() for s in (kept[narrow][-1], kept[wide][-1])
    )
    assert (reconstructed - tracked).norm() < 0.1 * nearest
    earlier = reconstruct(stored, gamma=target, step=1000)["weight"]
    torch.testing.assert_close(earlier, kept[target][9].tensors["weight"], atol=0.02, rtol=0.02)


def test_reconstructing_a_stored_average_gives_it_back() -> None:
    kept = train_with([6.0, 16.0], num_steps=300, every=50)
    stored = kept[6.0] + kept[16.0]
    reconstructed = reconstruct(stored, gamma=16.0, step=200)["weight"]
    torch.testing.assert_close(reconstructed, kept[16.0][3].tensors["weight"], atol=1e-6, rtol=1e-5)


def test_reconstructing_refuses_a_profile_out_of_reach() -> None:
    kept = train_with([6.0], num_steps=20, every=10)[6.0]
    with pytest.raises(ValueError, match="no snapshot"):
        reconstruct([], gamma=3.0)
    with pytest.raises(ValueError, match="step is 30, expected 1 to 20"):
        reconstruct(kept, gamma=3.0, step=30)
    with pytest.raises(
        ValueError, match=r"sigma_rel 0\.141 at step 20 .* There are sigma_rel 0\.11 at"
    ):
        reconstruct(kept, gamma=4.0)
    odd = Snapshot(20, 6.0, {"other": torch.ones(1)})
    with pytest.raises(ValueError, match="step 20 has other parameters"):
        reconstruct([*kept, odd], gamma=6.0)


@pytest.mark.parametrize("sigma_rel", [0.04, 0.075, 0.15])
def test_reconstructing_two_snapshots_keeps_the_scale_of_the_weights(sigma_rel: float) -> None:
    """An average of weights that stood still is those weights, however few snapshots there are."""
    stored = [Snapshot(1000, gamma_of(sigma_rel), {}) for sigma_rel in (0.05, 0.1)]
    weights, error = reconstruction_weights(stored, gamma=gamma_of(sigma_rel))
    assert weights.sum() == pytest.approx(1, abs=1e-9)
    assert 0 < error < 0.3


def test_profile_error_is_that_of_a_numerical_integral() -> None:
    stored = [Snapshot(step, gamma_of(w), {}) for step in (500, 1000) for w in (0.05, 0.1)]
    weights, error = reconstruction_weights(stored, gamma=gamma_of(0.12))
    s = (np.arange(100_000) + 0.5) / 100

    def profile(step: float, gamma: float) -> np.ndarray:
        return np.where(s <= step, (gamma + 1) / step * (s / step) ** gamma, 0)

    wanted = profile(1000, gamma_of(0.12))
    mixed = sum(w * profile(x.step, x.gamma) for w, x in zip(weights, stored, strict=True))
    assert error == pytest.approx(np.linalg.norm(mixed - wanted) / np.linalg.norm(wanted), rel=1e-3)


def test_profiles_product_matches_a_numerical_integral() -> None:
    from latentdiff.training.optim.posthoc_ema import _product

    s = (np.arange(200_000) + 0.5) / 200_000 * 7
    for ta, ga, tb, gb in ((7.0, 3.0, 5.0, 6.0), (4.0, 2.0, 7.0, 9.0), (7.0, 1.0, 7.0, 4.0)):
        pa = np.where(s <= ta, (ga + 1) * s**ga / ta ** (ga + 1), 0)
        pb = np.where(s <= tb, (gb + 1) * s**gb / tb ** (gb + 1), 0)
        integral = (pa * pb).sum() * 7 / len(s)
        closed = _product(np.array(ta), np.array(ga), np.array(tb), np.array(gb))
        assert float(closed) == pytest.approx(integral, rel=1e-3)
