"""Exponential moving averages (EMA) of the trainable weights, by parameter name and in float32.

Ours, as with diffusers' EMAModel and torch's AveragedModel the host must wait to know whether an
update is to be skipped. Here a flag on the device masks the update: a step with NaN or Inf leaves
averages and count as they are. Averages lie in flat chunks, so an update takes a few kernels
whatever the number of parameters; with FSDP2 each process averages its shards. posthoc_ema.py has
the power-function form on the same class.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentdiff.training.fsdp import from_local_shard, local_shard, reshard

CHUNK_SIZE = 1 << 24  # elements; one chunk more is held for the update
COUNT = "num_updates"  # next to the names of parameters and buffers in a state


class Averages:
    """Averages of a module's trainable parameters, and copies of its buffers, as they are now.

    device: of the averages, by default the parameters'; "cpu" saves accelerator memory and makes
    every update wait for the device.
    """

    def __init__(self, module: nn.Module, *, device: torch.device | str | None = None) -> None:
        self._parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("nothing to average: no parameter of the module is trainable")
        self.device = torch.device(device or next(iter(self._parameters.values())).device)
        self._chunks, self.tensors = _allocate(self._parameters, self.device)
        self._buffer_homes = _buffer_homes(module)
        self.buffers = {
            name: buffer.detach().to(self.device, copy=True)
            for name, buffer in module.named_buffers()
        }
        self.num_updates = torch.zeros((), dtype=torch.int64, device=self.device)
        with torch.no_grad():
            for chunk in self._chunks:
                torch._foreach_copy_(chunk.staged, chunk.live())
                chunk.average.copy_(chunk.staging)

    @torch.no_grad()
    def lerp_(self, weight: Tensor, ok: Tensor | None = None) -> None:
        """Interpolate averages by `weight` (0-dim float32, [0, 1]) towards the weights, and count.

        ok: 0-dim, bool or float; where it is 0 nothing changes, even with NaN parameters.
        """
        flag = torch.ones((), device=self.device) if ok is None else ok.detach().to(self.device)
        updates = flag.reshape(()) != 0
        for chunk in self._chunks:
            live = chunk.live()
            if self.device.type == "cpu" and all(_is_float_on_cpu(part) for part in live):
                if updates:  # reading the flag is free here, and one pass over memory the cheapest
                    torch._foreach_lerp_(chunk.views, live, float(weight))
                continue
            torch._foreach_copy_(chunk.staged, live)
            torch.lerp(chunk.average, chunk.staging, weight, out=chunk.staging)
            torch.where(updates, chunk.staging, chunk.average, out=chunk.average)
        for name, (home, key) in self._buffer_homes.items():
            now = home.get_buffer(key).detach().to(self.device)
            self.buffers[name].copy_(torch.where(updates, now, self.buffers[name]))
        self.num_updates += updates

    @property
    def num_bytes(self) -> int:
        """Bytes of averages, buffers and the staging of an update on this process."""
        flat = [chunk.average for chunk in self._chunks]
        staging = max(chunk.staging.nbytes for chunk in self._chunks)
        return staging + sum(tensor.nbytes for tensor in (*flat, *self.buffers.values()))

    def state_dict(self) -> dict[str, Tensor]:
        """Return averages, buffers and the count of updates by name; not copies."""
        averages = {
            name: from_local_shard(part, self._parameters[name])
            for name, part in self.tensors.items()
        }
        return {**averages, **self.buffers, COUNT: self.num_updates}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a state back. ValueError names what is missing, extra or of another shape."""
        own = self.state_dict()
        problems = [
            *(f"{name} is missing" for name in own if name not in state),
            *(f"{name} is extra" for name in state if name not in own),
            *(
                f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
                for name in own
                if name in state and state[name].shape != own[name].shape
            ),
        ]
        if problems:
            raise ValueError(f"the averages do not fit the model: {'; '.join(problems[:8])}")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    @contextlib.contextmanager
    def swap_weights(self, module: nn.Module) -> Iterator[None]:
        """Give `module` the averages inside the block, and its own weights back after it."""
        reshard(module)
        own = {
            name: local_shard(tensor)
            for name, tensor in (*module.named_parameters(), *module.named_buffers())
        }
        averages = {**self.tensors, **self.buffers}
        if missing := [name for name in averages if name not in own]:
            raise ValueError(f"the module has no {missing[0]}: it is not the one averaged here")
        kept = {name: own[name].to(self.device, copy=True) for name in averages}
        try:
            _copy_into(own, averages)
            yield
        finally:
            reshard(module)
            _copy_into(own, kept)


class Ema(Averages):
    """Exponential moving average: average <- d average + (1 - d) weights.

    warmup: d = min(decay, (1 + n) / (10 + n)) after n updates, so that the first weights are soon
    forgotten.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        decay: float = 0.9999,
        warmup: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay is {decay}, expected 0 <= decay < 1")
        super().__init__(module, device=device)
        self.decay, self.warmup = decay, warmup

    def update(self, ok: Tensor | None = None) -> None:
        """Average the weights in after an optimiser step, unless `ok` (0-dim) is 0."""
        weight = torch.full((), 1 - self.decay, device=self.device)
        if self.warmup:
            # 1 - (1 + n) / (10 + n), where float32 keeps its digits
            weight = torch.maximum(weight, 9 / (10 + self.num_updates.float()))
        self.lerp_(weight, ok)


class _Chunk(NamedTuple):
    """Parameters whose averages lie side by side; views, staged: of average and staging, in their
    shapes."""

    parameters: list[Tensor]
    average: Tensor  # (n,) float32
    views: list[Tensor]
    staging: Tensor  # (n,) float32, shared by all chunks
    staged: list[Tensor]

    def live(self) -> list[Tensor]:
        """Return this process's shards of the parameters, wherever they were moved to."""
        return [local_shard(parameter) for parameter in self.parameters]


def _allocate(
    parameters: Mapping[str, Tensor], device: torch.device
) -> tuple[list[_Chunk], dict[str, Tensor]]:
    """Return chunks and, by name, views of the averages in them."""
    live = {name: local_shard(parameter) for name, parameter in parameters.items()}
    groups = list(_grouped(live))
    sizes = [sum(live[name].numel() for name in group) for group in groups]
    staging = torch.zeros(max(sizes), device=device)
    chunks: list[_Chunk] = []
    averages: dict[str, Tensor] = {}
    for group, size in zip(groups, sizes, strict=True):
        parts = [live[name] for name in group]
        average = torch.zeros(size, device=device)
        views = _views(average, parts)
        averages |= dict(zip(group, views, strict=True))
        owners = [parameters[name] for name in group]
        chunks.append(_Chunk(owners, average, views, staging[:size], _views(staging, parts)))
    return chunks, averages


def _buffer_homes(module: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return each buffer's module and key there: `Module.to` puts new tensors in their place."""
    homes = {}
    for name, _ in module.named_buffers():
        path, _, key = name.rpartition(".")
        homes[name] = (module.get_submodule(path), key)
    return homes


def _is_float_on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _grouped(live: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Yield the names in runs of at most CHUNK_SIZE elements, or of one larger parameter."""
    group: list[str] = []
    size = 0
    for name, tensor in live.items():
        if group and size + tensor.numel() > CHUNK_SIZE:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor.numel()
    yield group


def _views(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Cut a flat tensor into views that lie in memory as the parameters do."""
    views, start = [], 0
    for parameter in parameters:
        stride = torch.empty_like(parameter, device="meta").stride()  # dense, in the same order
        views.append(flat.as_strided(parameter.shape, stride, start))
        start += parameter.numel()
    return views


@torch.no_grad()
def _copy_into(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    torch._foreach_copy_([own[name] for name in values], list(values.values()))
