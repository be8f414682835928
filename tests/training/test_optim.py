"""Updates that can be skipped; optimiser states that come back bitwise."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

from latentdiff.training.optim.gradients import clip_gradients, step_if_finite
from latentdiff.training.optim.lr import set_learning_rate
from latentdiff.training.optim.mixed_precision import AmpStep
from latentdiff.training.optim.optimizer import (
    build_optimizer,
    check_optimizer,
    estimates,
    evaluated_weights,
    parameter_groups,
)
from latentdiff.training.optim.state import load_optimizer_tensors, optimizer_tensors

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "fused": lambda p: AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: AdamW(p, lr=0.01, fused=False, foreach=True),
    "plain": lambda p: AdamW(p, lr=0.01, fused=False, foreach=False, amsgrad=True),
    "sgd": lambda p: SGD(p, lr=0.01, momentum=0.9),
    "sgd-stateless": lambda p: SGD(p, lr=0.01),
    "adagrad": lambda p: Adagrad(p, lr=0.01),
    "prodigy": lambda p: build_optimizer([{"params": [*p]}], name="prodigy", lr=1.0),
    "schedule_free": lambda p: build_optimizer(
        [{"params": [*p]}], name="schedule_free_adamw", lr=0.01
    ),
    "lion": lambda p: build_optimizer([{"params": [*p]}], name="lion", lr=0.01),
}


def make_module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def give_gradients(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def names_of(module: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in module.named_parameters()}


def everything(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors, _ = optimizer_tensors(optimizer, names_of(module))
    return {name: t.clone() for name, t in {**module.state_dict(), **tensors}.items()}


def test_norms_and_biases_do_not_decay() -> None:
    module = make_module()
    module[0].weight.requires_grad_(False)
    decayed, rest = parameter_groups(module, weight_decay=0.1)
    assert [id(p) for p in decayed["params"]] == [id(module[2].weight)]
    assert len(rest["params"]) == 4
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_built_optimizer_is_fused_and_takes_its_options() -> None:
    groups = parameter_groups(make_module(), weight_decay=0.1)
    optimizer = build_optimizer(groups, name="adamw", lr=3e-4, betas=(0.8, 0.9), eps=1e-7)
    assert isinstance(optimizer, AdamW)
    for group, decay in zip(optimizer.param_groups, (0.1, 0.0), strict=True):
        assert group["fused"]
        assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.9), 1e-7)
        assert group["weight_decay"] == decay
    set_learning_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def test_what_cannot_be_built_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module()
    groups = parameter_groups(module, weight_decay=0.0)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes.*latentdiff\[8bit\]"):
        build_optimizer(groups, name="adamw8bit", lr=0.1)
    for name, package in (("prodigy", "prodigyopt"), ("schedule_free_adamw", "schedulefree")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=rf"needs {package}.*latentdiff\[optimizers\]"):
            check_optimizer(name, torch.device("cpu"))
    with pytest.raises(ValueError, match="optimizer is 'sgd'"):
        build_optimizer(groups, name="sgd", lr=0.1)  # type: ignore[arg-type]
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="everything is frozen"):
        build_optimizer(parameter_groups(module, weight_decay=0.0), name="adamw", lr=0.1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_step_leaves_every_bit(name: str, bad: float) -> None:
    module = make_module()
    optimizer = OPTIMIZERS[name](module.parameters())
    give_gradients(module, 0)
    step_if_finite(optimizer, torch.tensor(True))
    before = everything(module, optimizer)
    give_gradients(module, 1)
    module[0].weight.grad[0, 0] = bad
    step_if_finite(optimizer, torch.isfinite(clip_gradients(module.parameters(), 1.0)))
    after = everything(module, optimizer)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_step_that_is_ok_is_a_plain_step(name: str) -> None:
    one, other = make_module(), make_module()
    other.load_state_dict(one.state_dict())
    masked, plain = (OPTIMIZERS[name](m.parameters()) for m in (one, other))
    for step in range(3):
        give_gradients(one, step)
        give_gradients(other, step)
        step_if_finite(masked, torch.tensor(1.0))
        plain.step()
    ours, theirs = everything(one, masked), everything(other, plain)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_steps_after_a_masked_first_one_ignore_it() -> None:
    one, other = make_module(), make_module()
    other.load_state_dict(one.state_dict())
    masked, plain = (OPTIMIZERS["fused"](m.parameters()) for m in (one, other))
    for parameter in one.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    step_if_finite(masked, torch.tensor(False))
    for module, optimizer in ((one, masked), (other, plain)):
        give_gradients(module, 0)
        optimizer.step()
    ours, theirs = everything(one, masked), everything(other, plain)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_clipping_equals_torch_and_the_norm_is_a_tensor() -> None:
    one, other = make_module(), make_module()
    give_gradients(one, 0)
    give_gradients(other, 0)
    one[1].bias.grad = other[1].bias.grad = None
    assert torch.equal(
        clip_gradients(one.parameters(), 0.5), nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    )
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    norm = clip_gradients(one.parameters(), None)
    assert norm.ndim == 0
    assert float(norm) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_round_trip_continues_bitwise(name: str) -> None:
    module = make_module()
    optimizer = OPTIMIZERS[name](module.parameters())
    for step in range(3):
        give_gradients(module, step)
        optimizer.step()
    tensors, json = optimizer_tensors(optimizer, names_of(module))
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    resumed = make_module()
    resumed.load_state_dict(module.state_dict())
    again = OPTIMIZERS[name](resumed.parameters())
    load_optimizer_tensors(again, names_of(resumed), tensors, json)
    for one, its in ((module, optimizer), (resumed, again)):
        give_gradients(one, 9)
        its.step()
    ours, theirs = everything(resumed, again), everything(module, optimizer)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert torch.equal(ours[key], tensor)


def test_state_follows_names_not_positions_and_brings_the_options() -> None:
    module = make_module()
    optimizer = AdamW(parameter_groups(module, weight_decay=0.1), lr=0.01, betas=(0.7, 0.8))
    give_gradients(module, 0)
    optimizer.step()
    tensors, json = optimizer_tensors(optimizer, names_of(module))
    other = make_module()
    groups = parameter_groups(other, weight_decay=0.5)
    groups[0]["params"].reverse()
    again = AdamW(groups, lr=0.5, fused=True)
    load_optimizer_tensors(again, names_of(other), tensors, json)
    moved = again.state[other[2].weight]["exp_avg"]
    assert torch.equal(moved, optimizer.state[module[2].weight]["exp_avg"])
    assert moved.data_ptr() != tensors["2.weight/exp_avg"].data_ptr()
    assert again.param_groups[0]["betas"] == (0.7, 0.8)
    assert again.param_groups[0]["weight_decay"] == 0.1
    assert again.param_groups[0]["fused"]


def test_state_of_every_optimizer_is_plain_json() -> None:
    for make in OPTIMIZERS.values():
        module = make_module()
        optimizer = make(module.parameters())
        give_gradients(module, 0)
        optimizer.step()
        _, state = optimizer_tensors(optimizer, names_of(module))
        json.dumps(state, allow_nan=False)


def test_schedule_free_evaluates_its_average_and_trains_on_bit_for_bit() -> None:
    """The average x of the points z, as each weighs the square of its learning rate, here one."""
    module = make_module()
    optimizer = OPTIMIZERS["schedule_free"](module.parameters())
    weight, points = module[0].weight, []
    for step in range(5):
        give_gradients(module, step)
        optimizer.step()
        points.append(optimizer.state[weight]["z"].clone())
    y = weight.detach().clone()
    with evaluated_weights(optimizer):
        x = weight.detach().clone()
    torch.testing.assert_close(x, torch.stack(points).mean(0))
    torch.testing.assert_close(y, 0.9 * x + 0.1 * points[-1])
    assert torch.equal(weight, y)
    give_gradients(module, 5)
    optimizer.step()  # in training mode again


def test_prodigy_finds_a_learning_rate_and_tells_it() -> None:
    torch.manual_seed(0)
    target, weight = torch.randn(20), nn.Parameter(torch.zeros(20) + 0.1)
    optimizer = build_optimizer([{"params": [weight]}], name="prodigy", lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        (weight - target).square().sum().backward()
        optimizer.step()
    assert 1e-3 < estimates(optimizer)["prodigy_d"] < 10
    assert (weight - target).square().sum() < 0.05 * target.square().sum()
    assert estimates(AdamW([weight])) == {}


def test_plain_numbers_in_a_state_come_back() -> None:
    module = make_module()
    optimizer = SGD(module.parameters(), lr=0.01, momentum=0.9)
    give_gradients(module, 0)
    optimizer.step()
    optimizer.state[module[0].weight]["seen"] = 3
    tensors, json = optimizer_tensors(optimizer, names_of(module))
    again = SGD(module.parameters(), lr=0.01, momentum=0.9)
    load_optimizer_tensors(again, names_of(module), tensors, json)
    assert again.state[module[0].weight]["seen"] == 3
    assert "seen" not in again.state[module[2].weight]


def saved() -> tuple[nn.Module, Optimizer, dict[str, Tensor], dict[str, Any]]:
    module = make_module()
    optimizer = AdamW(module.parameters(), lr=0.01)
    give_gradients(module, 0)
    optimizer.step()
    return module, optimizer, *optimizer_tensors(optimizer, names_of(module))


def test_a_misfit_is_refused_by_name_and_changes_nothing() -> None:
    module, optimizer, tensors, json = saved()
    before = everything(module, optimizer)
    key = "2.weight/exp_avg"

    def refuse(message: str, tensors: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match=message):
            load_optimizer_tensors(optimizer, names_of(module), tensors, json)

    refuse(f"{key} is missing", {name: t for name, t in tensors.items() if name != key})
    refuse("other/exp_avg is extra", {**tensors, "other/exp_avg": torch.ones(1)})
    refuse(rf"{key} has shape \(3,\), expected \(2, 8\)", {**tensors, key: torch.ones(3)})
    after = everything(module, optimizer)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_state_of_another_model_is_refused_by_name() -> None:
    _, _, tensors, json = saved()
    other = nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.Linear(9, 2, bias=False))
    optimizer = AdamW(other.parameters())
    with pytest.raises(ValueError, match=r"2\.bias is not a parameter.*0\.weight has shape \(9, 4"):
        load_optimizer_tensors(optimizer, names_of(other), tensors, json)


def test_other_groups_are_refused() -> None:
    module, _, tensors, json = saved()
    optimizer = AdamW(parameter_groups(module, weight_decay=0.1))
    with pytest.raises(ValueError, match="2 parameter groups, the state was saved with 1"):
        load_optimizer_tensors(optimizer, names_of(module), tensors, json)


def test_names_must_be_one_each() -> None:
    module = make_module()
    optimizer = AdamW(module.parameters())
    with pytest.raises(ValueError, match="6 parameters, expected one each"):
        optimizer_tensors(optimizer, ["a"] * 6)
    with pytest.raises(ValueError, match="1 of the optimiser's parameters have no name"):
        optimizer_tensors(optimizer, dict(list(names_of(module).items())[1:]))


def test_optimizer_state_comes_back_in_the_memory_layout_of_channels_last_weights() -> None:
    def make() -> tuple[nn.Conv2d, torch.optim.Optimizer]:
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
        return conv, build_optimizer([{"params": list(conv.parameters())}], name="adamw", lr=0.1)

    def step(conv: nn.Conv2d, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        conv(torch.randn(2, 4, 6, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    whole, resumed = make(), make()
    step(*whole, seed=1)
    names = ["weight", "bias"]
    tensors, state = optimizer_tensors(whole[1], names)
    kept = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    resumed[0].load_state_dict(whole[0].state_dict())
    load_optimizer_tensors(resumed[1], names, kept, state)
    for pair in (whole, resumed):
        step(*pair, seed=2)
    assert torch.equal(whole[0].weight, resumed[0].weight)


# fp16


def quadratic(start: Tensor, *, fp16: bool, max_norm: float | None) -> tuple[Tensor, AmpStep]:
    weight = nn.Parameter(start.clone())
    optimizer = SGD([weight], lr=1.0)
    update = AmpStep(nn.ParameterList([weight]), optimizer, fp16=fp16, max_norm=max_norm)
    for _ in range(5):
        update.step((weight**2).sum(), learning_rate=0.1)
    return weight.detach(), update


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_scaled_updates_are_those_without_a_scale(max_norm: float | None) -> None:
    start = torch.randn(8)
    plain, _ = quadratic(start, fp16=False, max_norm=max_norm)
    scaled, update = quadratic(start, fp16=True, max_norm=max_norm)
    assert update.scaler.get_scale() > 1
    assert not torch.equal(plain, start)
    torch.testing.assert_close(scaled, plain)


def test_an_overflow_skips_its_own_update_alone_and_lowers_the_scale() -> None:
    weight, other = (nn.Parameter(torch.ones(3)) for _ in range(2))
    updates = [
        AmpStep(nn.ParameterList([one]), SGD([one], lr=1.0), fp16=True, max_norm=1.0)
        for one in (weight, other)
    ]
    before = updates[0].scaler.get_scale()
    updates[0].step(weight.sum() * torch.finfo(torch.float32).max, learning_rate=0.1)
    updates[1].step(other.sum(), learning_rate=0.1)
    assert weight.tolist() == [1.0, 1.0, 1.0]
    assert updates[0].scaler.get_scale() < before == updates[1].scaler.get_scale()
    assert (other < 1).all()
    updates[0].step(weight.sum(), learning_rate=0.1)
    assert (weight < 1).all()
