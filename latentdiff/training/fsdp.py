"""State that FSDP2 shards over processes: full for a checkpoint, and sharded again from one.

`torch.distributed.fsdp.fully_shard` makes every parameter a DTensor, and the optimiser's entries
with it; EMAs hold the local shard of theirs. A checkpoint holds full tensors, so a run may be
resumed with another number of processes, or in one without FSDP. Plain tensors stay unchanged.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

Parts = Mapping[str, Mapping[str, Tensor]]


def full_state(parts: Parts, *, keep: bool) -> dict[str, dict[str, Tensor]]:
    """Return the state with sharded tensors made full, on the CPU and one after the other.

    Every process must call it, with the same names in the same order. keep: whether this process
    gets the tensors.
    """
    full: dict[str, dict[str, Tensor]] = {}
    for part, named in parts.items():
        full[part] = {}
        for name, tensor in named.items():
            value = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
            if keep:
                full[part][name] = value
    return full


def shard_state(parts: Parts, parameters: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return full tensors sharded as the parameters they belong to; nothing is communicated.

    parameters: by name. An entry belongs to the parameter it is named after, such as "<name>" or
    "<name>/exp_avg", if it has its shape.
    """
    return {
        part: {
            name: _sharded_as(tensor, _parameter_of(name, parameters))
            for name, tensor in named.items()
        }
        for part, named in parts.items()
    }


def local_shard(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor, in the same memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def from_local_shard(part: Tensor, parameter: Tensor) -> Tensor:
    """Return the tensor of which every process holds a shard, sharded as the parameter is."""
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
    """Return whether FSDP2 shards any of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in parameters.values())


def reshard(module: nn.Module) -> None:
    """Drop full parameters that a forward pass has left, so that changed shards are seen."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def make_root(module: nn.Module) -> None:
    """Make a sharded module the root of its parts, as its first forward pass does.

    Without this a part whose forward pass comes first, as the U-Net's in sampling before any step,
    becomes a root of its own, and the whole can no longer be run. FSDP2 has no public name for it.
    """
    if isinstance(module, FSDPModule):
        module._get_fsdp_state()._lazy_init()


def _parameter_of(name: str, parameters: Mapping[str, Tensor]) -> Tensor | None:
    return parameters.get(name, parameters.get(name.rpartition("/")[0]))


def _sharded_as(tensor: Tensor, parameter: Tensor | None) -> Tensor:
    if not isinstance(parameter, DTensor) or isinstance(tensor, DTensor):
        return tensor
    if tensor.shape != parameter.shape:
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    on_device = tensor.to(parameter.device)
    return distribute_tensor(on_device, mesh, placements, src_data_rank=None)
