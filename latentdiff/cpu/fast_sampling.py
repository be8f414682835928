"""The switch that lets a U-Net sample faster on a CPU, and the packed weights kept for that.

While a pass is sped up, each stock module (stock.py) has a forward method in packed layers
(packed_modules.py) instead of its own; before and after, the U-Net is as it was. Modules with LoRA,
hooks or another attention processor keep their own forward pass, and so does every module where
there are gradients, autocast, dropout at work, another device than a CPU, or no oneDNN. Packed
weights are thrown away as soon as one weight differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from latentdiff.cpu.packed_modules import PACKED, Forward, Shared
from latentdiff.cpu.stock import is_stock

Weights: TypeAlias = list[tuple[int, int, torch.dtype, int]]

WORDS: Final = {2: torch.int16, 4: torch.int32}


class FastCPU:
    """Speeds up a U-Net's passes on a CPU where `is_on` is set.

    The packed copy takes as much memory as the U-Net's weights. In float32 images are within 1/255
    of the plain path's, but the same bits are promised only by the plain one.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._is_current = False
        self._is_whole = False
        self._packed_for: tuple[torch.Size, list[nn.Module], Weights] | None = None
        self._forwards: list[tuple[dict[str, Any], Forward]] = []  # with their modules' attributes
        self._shared = Shared()

    def invalidate(self) -> None:
        """Compare the weights with the packed ones before the next pass: they may have changed."""
        self._is_current = False

    def channels_last(self, latents: Tensor) -> Tensor:
        """Return latents (B, C, h, w) in the layout that a VAE decodes faster, if `is_on`."""
        is_wanted = self.is_on and latents.device.type == "cpu"
        return latents.contiguous(memory_format=torch.channels_last) if is_wanted else latents

    @contextlib.contextmanager
    def speed_up(self, unet: nn.Module, x: Tensor) -> Iterator[None]:
        """Speed up passes of a U-Net over x (B, C, h, w) within the context.

        Outputs may be inference tensors: copy them before they are changed or kept.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            yield
            return
        if not self._is_current:
            self._prepare(unet, x.shape)
        self._shared.repeated = x if self._forwards and len(x) % 2 == 0 else None
        for attributes, forward in self._forwards:
            attributes["forward"] = forward
        try:
            with torch.inference_mode() if self._is_whole else torch.no_grad():
                yield
        finally:
            self._shared.repeated = None
            for attributes, _ in self._forwards:
                attributes.pop("forward", None)  # another thread may have done it

    def _prepare(self, unet: nn.Module, shape: torch.Size) -> None:
        """Pack the U-Net for inputs of a shape (B, C, h, w), unless that is done or must not be."""
        self._is_current = True
        modules = _stock_modules(unet) if self.is_on and _can_be_fast(unet) else []
        packed_for = shape, modules, _weights(modules)
        self._is_whole = bool(modules) and is_stock(unet)
        if packed_for == self._packed_for:
            return
        self._forwards, self._shared = [], Shared()  # frees the old copy before there is a new one
        for module in modules:
            dtype = next(unet.parameters()).dtype
            forward = PACKED[type(module)](module, self._shared, dtype)
            self._forwards.append((vars(module), forward))
        self._packed_for = packed_for

    def __deepcopy__(self, memo: dict[int, Any]) -> FastCPU:
        """Return one that has packed nothing yet."""
        copied = FastCPU()
        copied.is_on = self.is_on
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the packed copy, whose layout is this machine's."""
        return FastCPU().__dict__ | {"is_on": self.is_on}


def _stock_modules(module: nn.Module) -> list[nn.Module]:
    """Return the largest stock modules that there are packed ones for, each once."""
    if type(module) in PACKED and is_stock(module):
        return [module]
    found = (one for child in module.children() for one in _stock_modules(child))
    return list(dict.fromkeys(found))


def _can_be_fast(unet: nn.Module) -> bool:
    """Return whether oneDNN has kernels for the U-Net's one dtype, and nothing forbids a swap.

    A compiled module would be compiled anew, and where dropout is at work the values that it zeroes
    depend on the layout of its input.
    """
    for module in unet.modules():
        is_dropping = isinstance(module, nn.Dropout) and module.training and module.p > 0
        if is_dropping or module._compiled_call_impl is not None:
            return False
    kinds = {(p.device.type, p.dtype) for p in unet.parameters()}
    if len(kinds) != 1 or not torch._C._has_mkldnn:
        return False
    if not torch._C._get_mkldnn_enabled():
        return False
    device, dtype = next(iter(kinds))
    is_bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device == "cpu" and (dtype == torch.float32 or is_bf16)


def _weights(modules: list[nn.Module]) -> Weights:
    """Return what tells these weights from changed ones: where they lie, and the sum of their bits.

    A weight that is written through `.data` keeps its place and its version; the sum is another.
    """
    weights = (p for module in modules for p in module.parameters())
    return [(p.data_ptr(), _version(p), p.dtype, _bits(p)) for p in weights]


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version


def _bits(weight: Tensor) -> int:
    """Return the sum of a tensor's bits, read as integers."""
    is_rows = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    flat = (weight.permute(0, 2, 3, 1) if is_rows else weight).detach().flatten()
    size, offset = flat.element_size(), flat.storage_offset()
    is_even = len(flat) * size % 8 == offset * size % 8 == 0
    return int(flat.view(torch.int64 if is_even else WORDS[size]).sum())
