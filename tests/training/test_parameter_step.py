"""Updates of one parameter at a time: exact in float32, unbiased in bf16, within backward."""

import pytest
import torch
from torch import Tensor, nn

from latentdiff.training.optim.optimizer import build_optimizer, parameter_groups
from latentdiff.training.optim.parameter_step import (
    BackwardStep,
    ParameterStep,
    round_stochastically,
)
from latentdiff.training.optim.state import load_optimizer_tensors, optimizer_tensors

OPTIMIZERS = ["adamw", "adafactor", "lion"]


def _model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(32, 4))
    return layers.to(dtype)


def _loss(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(step))
    return model(x.to(next(model.parameters()).dtype)).float().square().mean()


def _optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    groups = parameter_groups(model, weight_decay=0.1, name=name)  # type: ignore[arg-type]
    return build_optimizer(groups, name=name, lr=1e-2)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_within_backward_equal_those_after_it(name: str) -> None:
    plain, fused = _model(), _model()
    optimizer = _optimizer(plain, name)
    backward_step = BackwardStep(ParameterStep(_optimizer(fused, name)))
    for step in range(4):
        optimizer.zero_grad()
        _loss(plain, step).backward()
        norm = nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        optimizer.step()
        torch.testing.assert_close(backward_step.run(_loss(fused, step), seed=step), norm)
        assert all(p.grad is None for p in fused.parameters())
    for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_is_not_finite_in_a_gradient_is_taken_as_zero() -> None:
    model = _model()
    step = BackwardStep(ParameterStep(_optimizer(model, "adamw")))
    weight = model[3].weight
    before = weight.detach().clone()
    spoilt = torch.ones(4)
    spoilt[0] = float("nan")
    model[3].weight.register_hook(lambda gradient: gradient * spoilt[:, None])
    norm = step.run(_loss(model, 0), seed=0)
    assert bool(norm.isfinite())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert not torch.equal(weight[1:], before[1:])


def test_rounding_at_random_keeps_the_mean_and_takes_a_neighbour() -> None:
    value = torch.tensor(1.0 + 2**-9).repeat(20_000)  # a quarter of the way from 1 to 1 + 2^-7
    rounded = round_stochastically(value, generator=torch.Generator().manual_seed(0)).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded.mean()) == pytest.approx(1 + 2**-9, abs=4 * 2**-7 * 0.433 / 20_000**0.5)
    exact = torch.tensor([-3.5, 0.0, 2.0**-30])
    assert torch.equal(
        round_stochastically(exact, generator=torch.Generator().manual_seed(1)).float(), exact
    )
    assert float(round_stochastically(-value, generator=torch.Generator()).float().max()) <= -1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_small_updates_move_bf16_weights_as_far_as_float32_ones(name: str) -> None:
    """300 updates of about a thousandth of a weight's spacing each: nearest rounding would stay."""
    whole, half = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    half.to(torch.bfloat16)
    with torch.no_grad():
        whole.weight.fill_(1.0)
        half.weight.fill_(1.0)
    steps = []
    for model in (whole, half):
        groups = [{"params": [model.weight], "weight_decay": 0.0}]
        steps.append(ParameterStep(build_optimizer(groups, name=name, lr=1e-5)))  # type: ignore[arg-type]
    for seed in range(300):
        for model, step in zip((whole, half), steps, strict=True):
            model.weight.grad = torch.ones_like(model.weight)
            step.step_all(seed=seed)
    assert half.weight.dtype == torch.bfloat16
    moved, expected = 1 - float(half.weight.float().mean()), 1 - float(whole.weight.detach().mean())
    assert moved == pytest.approx(expected, rel=0.1)


def test_state_of_bf16_weights_is_saved_and_loaded_bit_for_bit() -> None:
    def run(model: nn.Module, step: ParameterStep, steps: range) -> None:
        for seed in steps:
            _loss(model, seed).backward()
            step.step_all(seed=seed)

    model = _model(torch.bfloat16)
    names = {p: name for name, p in model.named_parameters()}
    step = ParameterStep(_optimizer(model, "adafactor"))
    run(model, step, range(2))
    tensors, json = optimizer_tensors(step.optimizer, names)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    run(model, step, range(2, 4))
    again = _model(torch.bfloat16)
    again.load_state_dict(weights)
    other = ParameterStep(_optimizer(again, "adafactor"))
    load_optimizer_tensors(
        other.optimizer, {p: name for name, p in again.named_parameters()}, tensors, json
    )
    run(again, other, range(2, 4))
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
