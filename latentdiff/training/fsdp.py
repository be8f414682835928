"""State that FSDP2 spreads over processes: whole for a checkpoint, and spread again from one.

`torch.distributed.fsdp.fully_shard` makes every parameter a DTensor, and the optimiser's entries
with it; averages hold the local part of theirs. A checkpoint holds whole tensors, so a run may go
on with another number of processes, or in one without FSDP. Plain tensors pass through unchanged.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

Parts = Mapping[str, Mapping[str, Tensor]]


def full_state(parts: Parts, *, keep: bool) -> dict[str, dict[str, Tensor]]:
    """Return the state with spread tensors whole, on the CPU and one after the other.

    Every process must call it, with the same names in the same order. keep: on which process the
    result is wanted; the others get no tensors.
    """
    whole: dict[str, dict[str, Tensor]] = {}
    for part, named in parts.items():
        whole[part] = {}
        for name, tensor in named.items():
            value = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
            if keep:
                whole[part][name] = value
    return whole


def shard_state(parts: Parts, parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return whole tensors laid out as the parameters they belong to; nothing is communicated.

    parameters: by name. An entry belongs to the parameter it is named after, such as "<name>" or
    "<name>/exp_avg", if it has its shape.
    """
    return {
        part: {name: _as(tensor, _parameter_of(name, parameters)) for name, tensor in named.items()}
        for part, named in parts.items()
    }


def local_shard(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def from_local_shard(part: Tensor, parameter: Tensor) -> Tensor:
    """Return the tensor of which every process holds a part, cut as the parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def is_sharded(parameters: Mapping[str, Tensor]) -> bool:
    """Return whether FSDP2 spreads any of them."""
    return any(isinstance(parameter, DTensor) for parameter in parameters.values())


def reshard(module: nn.Module) -> None:
    """Drop whole parameters that a forward pass has left, so that changed parts are seen."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _parameter_of(name: str, parameters: Mapping[str, Tensor]) -> Tensor | None:
    return parameters.get(name, parameters.get(name.rpartition("/")[0]))


def _as(tensor: Tensor, parameter: Tensor | None) -> Tensor:
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    if tensor.shape != parameter.shape:
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    placed = tensor.to(parameter.device)
    return distribute_tensor(placed, mesh, placements, src_data_rank=None)
