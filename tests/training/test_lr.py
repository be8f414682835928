"""The learning rate as a function of the step."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from latentdiff.training.optim.lr import learning_rate


def rate(step: int, schedule: Any, **changed: Any) -> float:
    options = {"base": 2.0, "lr_warmup_steps": 10, "max_steps": 110, "final_fraction": 0.1}
    return learning_rate(step, schedule=schedule, **{**options, **changed})


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_learning_rate_rises_to_its_base_and_ends_where_it_should(schedule: str) -> None:
    assert rate(0, schedule) == pytest.approx(0.2)
    assert rate(9, schedule) == pytest.approx(2.0)
    assert rate(10, schedule) == pytest.approx(2.0)
    middle = {"constant": 2.0, "cosine": 1.1, "linear": 1.1}[schedule]
    end = {"constant": 2.0, "cosine": 0.2, "linear": 0.2}[schedule]
    assert rate(60, schedule) == pytest.approx(middle)
    assert rate(110, schedule) == pytest.approx(end)
    assert rate(9999, schedule) == pytest.approx(end)
    assert rate(0, schedule, lr_warmup_steps=0) == pytest.approx(2.0)
    falls = [rate(step, schedule) for step in range(10, 111)]
    assert falls == sorted(falls, reverse=True)


def test_cosine_equals_torch_and_unknown_schedule_is_refused() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, eta_min=0.2)
    for step in range(50):
        ours = rate(step, "cosine", lr_warmup_steps=0, max_steps=50)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    with pytest.raises(ValueError, match="schedule is 'polynomial'"):
        rate(0, "polynomial")
