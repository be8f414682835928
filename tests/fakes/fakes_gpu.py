"""A GPU that is not there: modules and tensors whose device is "cuda" and that hold no numbers.

torch's fake tensors have a device, a shape and a dtype. An operation on tensors of two devices
raises FakeTensorDeviceMismatchError as a GPU's would, one whose result the host must know raises
DataDependentOutputException, and no driver is needed. The backward pass alone cannot run on them:
autograd asks the driver for streams. It runs on tensors of the device "meta".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CUDA, META = torch.device("cuda", 0), torch.device("meta")
HOST_CHECKS = {  # of numbers that lie on the CPU, and their answer where there are none
    "latentdiff.diffusion.schedules._check_betas": None,
    "latentdiff.pipeline.conditioning.encode._are_weighted": False,
}
ON_THE_HOST = tuple(  # reads images, and may look at their numbers
    f"latentdiff.pipeline.image_inputs.ImageInputs.{name}"
    for name in ("pixels", "values", "binary_mask")
)
WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "_unique2")


class HostSyncs(TorchDispatchMode):
    """Names the operations within for which the host waits for a GPU.

    These are numbers and shapes that the host reads of a GPU's tensor, copies to the CPU, and
    copies from it that do not say non_blocking.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source, target, overlaps = _copy(name, args, kwargs)
            if {source, target} == {"cpu", "cuda"} and not (overlaps and target == "cuda"):
                self.found.append(f"{name} from {source} to {target}")
        elif _is_read(name, args) and args[0].device.type == "cuda":
            self.found.append(name)
        return func(*args, **kwargs)


def _copy(name: str, args: Any, kwargs: Mapping[str, Any]) -> tuple[str, str, bool]:
    """Return the kind of device that a copy is from, that it is to, and whether it may overlap."""
    if name == "copy_":
        overlaps = any((*args[2:3], kwargs.get("non_blocking")))
        return args[1].device.type, args[0].device.type, overlaps
    target = torch.device(kwargs.get("device") or args[0].device).type
    return args[0].device.type, target, bool(kwargs.get("non_blocking"))


def _is_read(name: str, args: Any) -> bool:
    """Return whether the host must know a number, or how many elements of a mask are true."""
    if name in WAITING or not name.startswith("index"):
        return name in WAITING
    return any(x.dtype == torch.bool for x in tree_iter(args[1:2]) if isinstance(x, Tensor))


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let tensors that are made inside the block be fake, and modules of them move."""
    with monkeypatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        for name, answer in HOST_CHECKS.items():
            patch.setattr(name, lambda tensors, answer=answer: answer)
        for name in ON_THE_HOST:
            patch.setattr(name, _without_fakes(resolve_name(name)))
        patch.setattr(nn.Module, "_apply", _apply)
        patch.setattr(Tensor, "backward", _backward)
        yield


def _without_fakes(work: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function compute with numbers, on the CPU."""

    def compute(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return work(*args, **kwargs)

    return compute


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Do what nn.Module._apply does, which cannot exchange fake parameters in place."""
    known: dict[Tensor, nn.Parameter] = {}
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                if old not in known:
                    known[old] = nn.Parameter(fn(old.detach()), requires_grad=old.requires_grad)
                part._parameters[name] = known[old]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fn(buffer)
    return module


def _backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
    """Give each parameter behind a loss a gradient like itself, without a backward pass."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        if (node := nodes.pop()) is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaf.grad = torch.empty_like(leaf)
        nodes += [after for after, _ in node.next_functions]


def accelerator_on(device: torch.device) -> Accelerator:
    """Return an Accelerator of one process whose device is the given one."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.device = device
    return accelerator
