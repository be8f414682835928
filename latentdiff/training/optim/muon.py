"""Muon (Jordan et al. 2024): matrices and kernels follow their orthogonalised momentum.

An update whose singular values are all about 1 moves every direction of a matrix alike, also those
whose gradients are small, so that training needs fewer images. Where it does not apply (biases,
norms, embeddings, the layers that touch the latents) parameters follow AdamW, in one optimiser.

Ours by design: torch.optim.Muon takes plain matrices only, timm's chooses parameters by shape,
embeddings included, and both take one matrix at a time. Here parameter groups choose, the matrices
of one shape share a batched Newton-Schulz iteration, of which each process of a training does its
part, and AdamW's part is fused.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3, x^5: Jordan et al. 2024
SMALLEST_SIDE = 16  # rows or columns below which a matrix is left to AdamW
UPDATE_RMS = 0.2  # as AdamW's, so that one learning rate serves both: Liu et al. 2025, Eq. 4


class Muon(Optimizer):
    """Muon for the groups marked "orthogonal", AdamW for the others."""

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        """betas, eps: AdamW's; momentum: Muon's, which is Nesterov's."""
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "orthogonal": False,
        }
        super().__init__([dict(group) for group in groups], defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update parameters by their gradients; those without one stay."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["orthogonal"]:
                self._step_orthogonal(parameters, group)
            elif parameters:
                self._step_adamw(parameters, group)

    def _step_orthogonal(self, parameters: Iterable[Tensor], group: Mapping[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            self._update_momentum(parameter, group["momentum"])
            by_shape.setdefault(parameter.flatten(1).shape, []).append(parameter)
        for same_shape, updates in self._updates(by_shape.values(), group["momentum"]):
            length = UPDATE_RMS * max(updates.shape[1:]) ** 0.5 * group["lr"]
            for parameter, update in zip(same_shape, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(length * update.view(parameter.shape))

    def _updates(
        self, by_shape: Iterable[list[Tensor]], momentum: float
    ) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Yield the parameters of each shape with their updates, (N, m, n).

        Several processes, whose gradients are equal, deal the matrices out in turn, and send one
        another what they made, in the bfloat16 that it was made in, while the next is made: two
        bytes a weight until all are there.
        """
        is_shared = dist.is_available() and dist.is_initialized()
        rank, num = (dist.get_rank(), dist.get_world_size()) if is_shared else (0, 1)
        if num == 1:
            for same_shape in by_shape:
                yield same_shape, self._orthogonal(same_shape, momentum)
            return
        sent, first = [], 0  # first: number of matrices before those of a shape
        for same_shape in by_shape:
            share = -(-len(same_shape) // num), *same_shape[0].flatten(1).shape
            made = same_shape[0].new_zeros(share, dtype=torch.bfloat16)
            if own := same_shape[(rank - first) % num :: num]:
                made[: len(own)] = self._orthogonal(own, momentum)
            gathered = made.new_empty((num, *made.shape))
            work = dist.all_gather_into_tensor(gathered, made[None], async_op=True)
            sent.append((same_shape, first, gathered, work))
            first += len(same_shape)
        for same_shape, first, gathered, work in sent:
            assert work is not None  # in one of the processes that it is for
            work.wait()
            places = [((first + i) % num, i // num) for i in range(len(same_shape))]
            updates = torch.stack([gathered[place] for place in places])
            yield same_shape, updates.to(same_shape[0].dtype)

    def _orthogonal(self, parameters: list[Tensor], momentum: float) -> Tensor:
        """Return the updates of parameters of one shape."""
        return newton_schulz(torch.stack([self._direction(p, momentum) for p in parameters]))

    def _update_momentum(self, parameter: Tensor, momentum: float) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)

    def _direction(self, parameter: Tensor, momentum: float) -> Tensor:
        """Return a parameter's Nesterov momentum as a matrix."""
        assert parameter.grad is not None
        moving = self.state[parameter]["momentum"]
        return parameter.grad.lerp(moving, momentum).flatten(1)

    def _step_adamw(self, parameters: list[Tensor], group: Mapping[str, Any]) -> None:
        for parameter in parameters:
            if not (state := self.state[parameter]):
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        adamw(
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=parameters[0].device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def newton_schulz(matrices: Tensor, *, iterations: int = 5) -> Tensor:
    """Return the nearest matrices with singular values of about 1 (0.7 to 1.2), of (N, m, n).

    Newton-Schulz iterations x <- (a + b s + c s^2) x with s = x x^T, in bfloat16, which is enough.
    Values far below the largest are raised by at most a^5 and stay below 0.7.
    """
    a, b, c = COEFFICIENTS
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    x = x.to(torch.bfloat16).contiguous()
    for _ in range(iterations):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, factor, x, beta=a)
    orthogonal = x.to(matrices.dtype)
    return orthogonal if wide is matrices else orthogonal.mT.contiguous()


def muon_params(module: nn.Module) -> set[Tensor]:
    """Return the trainable matrices and kernels of a module that Muon applies to."""
    embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    tables = {parameter for part in embeddings for parameter in part.parameters()}
    matrices = {p for p in module.parameters() if p.requires_grad and p.ndim > 1}
    return {p for p in matrices - tables if min(p.shape[:2]) >= SMALLEST_SIDE}
