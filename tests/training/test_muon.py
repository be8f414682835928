"""Muon against its definition, torch's own for plain matrices, and AdamW for the rest."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fakes_faults import launch_ranks
from torch import Tensor, nn

from latentdiff.config.choices import OptimizerName
from latentdiff.training.optim import muon
from latentdiff.training.optim.muon import COEFFICIENTS, Muon, muon_params, newton_schulz
from latentdiff.training.optim.optimizer import build_optimizer, parameter_groups
from latentdiff.training.optim.state import load_optimizer_tensors, optimizer_tensors

SHAPES = [(8, 32, 32), (3, 32, 200), (2, 200, 32), (1, 64, 65)]


class Small(nn.Module):
    """One of each kind of parameter that the rules tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 24)
        self.conv_in = nn.Conv2d(4, 24, 3)
        self.hidden = nn.Conv2d(24, 32, 3)
        self.linear = nn.Linear(32, 48)
        self.norm = nn.LayerNorm(48)

    def loss(self) -> Tensor:
        """Return a number that every parameter has a part in."""
        each = [(p.square() * torch.arange(p.numel()).view_as(p)).sum() for p in self.parameters()]
        return torch.stack(each).sum()


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_go_as_the_polynomial_says_and_directions_stay(
    shape: tuple[int, int, int],
) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.logspace(-1, 1, shape[2])
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / values.norm(dim=1, keepdim=True)
    for _ in range(5):
        a, b, c = COEFFICIENTS
        values = a * values + b * values**3 + c * values**5
    made = newton_schulz(matrices).double()
    expected = left @ torch.diag_embed(values) @ right
    assert (made - expected).norm() < 0.03 * expected.norm()
    assert values.max() < 1.3
    assert values.median() > 0.6


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_low_rank_stays_bounded(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(6)
    matrices = torch.randn(shape[0], shape[1], 2) @ torch.randn(shape[0], 2, shape[2])
    values = torch.linalg.svdvals(newton_schulz(1e-4 * matrices))
    assert values.max() < 1.3
    assert values[:, 1].min() > 0.6
    assert values[:, 2:].max() < 0.7


def test_a_zero_gradient_is_a_zero_update() -> None:
    assert torch.equal(newton_schulz(torch.zeros(1, 16, 16)), torch.zeros(1, 16, 16))


def test_a_scaled_gradient_is_the_same_update() -> None:
    torch.manual_seed(2)
    matrices = torch.randn(2, 16, 64)
    assert torch.allclose(newton_schulz(matrices), newton_schulz(1e3 * matrices), atol=0.02)


def test_only_hidden_matrices_are_orthogonal() -> None:
    model = Small()
    model.linear.weight.requires_grad_(False)
    assert muon_params(model) == {model.hidden.weight}
    groups = parameter_groups(model, weight_decay=0.1, name="muon")
    marked = [p for group in groups if group.get("orthogonal") for p in group["params"]]
    everything = [p for group in groups for p in group["params"]]
    assert marked == [model.hidden.weight]
    assert set(everything) == {p for p in model.parameters() if p.requires_grad}
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (20, 20)])
def test_plain_matrices_are_updated_as_by_torch_muon(shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    start = torch.randn(shape)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    mine = Muon([{"params": [ours], "orthogonal": True}], lr=0.01, weight_decay=0.1)
    torchs = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(5):
        gradient = torch.randn(shape)
        for parameter, optimizer in ((ours, mine), (theirs, torchs)):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_other_parameters_are_updated_as_by_adamw() -> None:
    torch.manual_seed(4)
    one, two = Small(), Small()
    two.load_state_dict(one.state_dict())
    names: tuple[OptimizerName, ...] = ("muon", "adamw")
    for model, name in zip((one, two), names, strict=True):
        groups = parameter_groups(model, weight_decay=0.1, name=name)
        optimizer = build_optimizer(groups, name=name, lr=0.01, betas=(0.9, 0.99))
        for _ in range(3):
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()
    left = muon_params(one)
    for (parameter, ours), theirs in zip(one.named_parameters(), two.parameters(), strict=True):
        assert (ours in left) != torch.equal(ours, theirs), parameter


def test_state_goes_to_a_checkpoint_and_back_bit_for_bit() -> None:
    torch.manual_seed(5)
    models = [Small(), Small()]
    made = []
    for model in models:
        groups = parameter_groups(model, weight_decay=0.1, name="muon")
        made.append(build_optimizer(groups, name="muon", lr=0.01))
    _train(models[0], made[0], 3)
    models[1].load_state_dict(models[0].state_dict())
    tensors, json = optimizer_tensors(made[0], _names(models[0]))
    load_optimizer_tensors(made[1], _names(models[1]), tensors, json)
    for model, optimizer in zip(models, made, strict=True):
        _train(model, optimizer, 2)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_gradient_that_is_absent_moves_nothing() -> None:
    model = Small()
    before = [p.clone() for p in model.parameters()]
    groups = parameter_groups(model, weight_decay=0.1, name="muon")
    build_optimizer(groups, name="muon", lr=0.01).step()
    for ours, theirs in zip(model.parameters(), before, strict=True):
        assert torch.equal(ours, theirs)


def _train(model: Small, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()


def _names(model: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("num", [2, 3])
def test_processes_share_the_matrices_and_agree_with_one_alone(tmp_path: Path, num: int) -> None:
    shapes = [(32, 48), (24, 32, 3, 3), (32, 48), (48, 32), (24, 32, 3, 3), (32, 48), (40, 40)]
    alone = _stepped(shapes)

    def rank() -> None:
        made: list[Tensor] = []

        def counted(matrices: Tensor) -> Tensor:
            made.extend(matrices)
            return newton_schulz(matrices)

        pytest.MonkeyPatch().setattr(muon, "newton_schulz", counted)
        dist.init_process_group("gloo")
        stepped = _stepped(shapes)
        assert len(made) // 3 in {len(shapes) // num, len(shapes) // num + 1}
        torch.save(stepped, tmp_path / f"{dist.get_rank()}.pt")
        dist.destroy_process_group()

    launch_ranks(rank, num=num)
    for number in range(num):
        for ours, theirs in zip(torch.load(tmp_path / f"{number}.pt"), alone, strict=True):
            assert torch.equal(ours, theirs)


def _stepped(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Return parameters of these shapes after three steps of Muon."""
    torch.manual_seed(7)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Muon([{"params": parameters, "orthogonal": True}], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]
