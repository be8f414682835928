"""One parameter's update at a time: of bf16 weights, and within the backward pass.

bf16 has 8 bits of precision, so that most updates of a weight round to nothing; rounding up or
down at random, by how near each is, keeps the mean (Gupta et al. 2015, Sec. 3; for bf16 Zamirai et
al. 2021). An update within the backward pass uses a gradient and frees it, so that never more than
a few are in memory. Ours, as libraries that round do so in optimisers of their own alone.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class ParameterStep:
    """An optimiser that steps single parameters; bf16 ones through a float32 copy."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        groups = optimizer.param_groups
        parameters = [(p, group) for group in groups for p in group["params"]]
        self._places = {p: (index, group) for index, (p, group) in enumerate(parameters)}

    @property
    def parameters(self) -> Iterable[Tensor]:
        """The optimiser's parameters, in the order of its groups."""
        return self._places

    def step_all(self, *, seed: int) -> None:
        """Update every parameter that has a gradient, as `step` does."""
        for parameter in self._places:
            if parameter.grad is not None:
                self.step(parameter, seed=seed)

    @torch.no_grad()
    def step(self, parameter: Tensor, *, seed: int) -> None:
        """Update a parameter by its gradient, which is freed.

        seed: of the step. It decides the rounding of bf16 weights, of each parameter alone, so that
        neither their order nor the number of processes changes it.
        """
        index, group = self._places[parameter]
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if parameter.dtype != torch.bfloat16:
            self._step_one(parameter, gradient, group)
            return
        state, weights = self.optimizer.state, parameter.detach().float()
        if parameter in state:
            state[weights] = state.pop(parameter)
        self._step_one(weights, gradient.float(), group)
        state[parameter] = state.pop(weights)
        generator = torch.Generator(weights.device).manual_seed(hash((seed, index)) & 0x7FFFFFFF)
        parameter.copy_(round_stochastically(weights, generator=generator))

    def _step_one(self, weights: Tensor, gradient: Tensor, group: dict[str, object]) -> None:
        optimizer, groups = self.optimizer, self.optimizer.param_groups
        weights.grad = gradient
        optimizer.param_groups = [{**group, "params": [weights]}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
            weights.grad = None


def round_stochastically(values: Tensor, *, generator: torch.Generator) -> Tensor:
    """Round float32 values to one of the two nearest bf16 ones, so that the mean is the value.

    The nearer of both is the likelier, in proportion. values: finite, of any shape.
    """
    noise = torch.randint(
        1 << 16, values.shape, generator=generator, device=values.device, dtype=torch.int32
    )
    bits = (values.view(torch.int32) + noise) & -(1 << 16)  # the upper half of a float32 is bf16
    return bits.view(torch.float32).to(torch.bfloat16)


class BackwardStep:
    """An optimiser's step in the backward pass: each gradient is used as soon as it is whole.

    What is not finite in a gradient is taken as 0, without a wait. There is no norm of all
    gradients before the first update, so no clipping to one; nor a second backward pass a step.
    """

    def __init__(self, parameter_step: ParameterStep) -> None:
        self._parameter_step, self._seed = parameter_step, 0
        self._squares: list[Tensor] = []
        for parameter in parameter_step.parameters:
            parameter.register_post_accumulate_grad_hook(self._update)

    def run(self, loss: Tensor, *, seed: int) -> Tensor:
        """Update all parameters by the gradient of a loss; return its norm, 0-dim, without NaN.

        seed: as in `ParameterStep.step`.
        """
        self._seed, self._squares = seed, []
        loss.backward()
        if not self._squares:
            return torch.zeros((), device=loss.device)
        norm, self._squares = torch.stack(self._squares).sum().sqrt(), []
        return norm

    def _update(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        self._squares.append(gradient.detach().float().square().sum())
        self._parameter_step.step(parameter, seed=self._seed)
