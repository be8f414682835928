"""The memory of an optimiser: what it keeps, and what the update of one parameter takes on top.

The second is measured by an update on fake tensors, which have sizes and no contents.
"""

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from latentdiff.config.choices import OptimizerName
from latentdiff.training.fsdp import local_shard
from latentdiff.training.optim.optimizer import OPTIMIZERS, build_optimizer
from latentdiff.training.optim.parameter_step import ParameterStep

SMALL_PARAMETER = 4096  # elements, below which bitsandbytes keeps state of 32 bits


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(groups: Iterable[Mapping[str, Any]], *, name: OptimizerName) -> int:
    """Return the bytes of an optimiser's moments, in 32 bits, or block-wise in 8; Muon keeps one.

    Adafactor keeps rows and columns of a matrix, and of a kernel those of its last two dimensions.
    Prodigy keeps less for parameters that begin at 0, as half of a LoRA's do.
    """
    if name == "adafactor":
        shapes = [local_shard(p).shape for group in groups for p in group["params"]]
        return 4 * sum(_adafactor_size(tuple(shape)) for shape in shapes)
    total, num_moments = 0, OPTIMIZERS[name].num_moments
    for group in groups:
        for n in (local_shard(parameter).numel() for parameter in group["params"]):
            in_bytes = name == "adamw8bit" and n >= SMALL_PARAMETER
            total += (1 if group.get("orthogonal") else num_moments) * n * (1 if in_bytes else 4)
    return total


def _adafactor_size(shape: tuple[int, ...]) -> int:
    """Return the numbers that Adafactor keeps of a parameter (Shazeer & Stern 2018, Alg. 4)."""
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-1]) + math.prod((*shape[:-2], shape[-1]))


def update_bytes(parameter: Tensor, *, name: OptimizerName) -> int:
    """Return the bytes that a parameter's own update takes until it is done, besides its gradient.

    For optimisers that update one parameter at a time. AdamW in 8 bits is taken as that in 32.
    """
    name = "adamw" if name == "adamw8bit" else name
    return _update_bytes(tuple(local_shard(parameter).shape), parameter.dtype, name)


@cache
def _update_bytes(shape: tuple[int, ...], dtype: torch.dtype, name: OptimizerName) -> int:
    with FakeTensorMode(), PeakMemory() as sizes:
        weights = nn.Parameter(torch.empty(shape, dtype=dtype))
        step = ParameterStep(build_optimizer([{"params": [weights]}], name=name, lr=1.0))
        for _ in range(2):  # the first makes the optimiser's state
            weights.grad = torch.empty_like(weights)
            sizes.peak = before = sizes.now
            step.step(weights, seed=0)
    return sizes.peak - before


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def add_for_a_moment(self, num_bytes: int) -> None:
        """Count bytes that are needed now, and freed at once."""
        self.peak = max(self.peak, self.now + num_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inputs = [x.untyped_storage() for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage(), inputs)
        return result

    def _add(self, storage: torch.UntypedStorage, inputs: Sequence[torch.UntypedStorage]) -> None:
        if storage in self._known or any(storage is one for one in inputs):
            return  # a view, or a tensor changed in place
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage.nbytes()).atexit = False

    def _remove(self, num_bytes: int) -> None:
        self.now -= num_bytes
