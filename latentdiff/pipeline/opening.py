"""A pipeline opened for drawing: on the best device there is, as fast as that device allows.

Answers for: which number format and which way through the U-Net a script takes where its user
leaves the choice open. Does not answer for: reading the files (loading.py).
"""

from __future__ import annotations

import logging

import torch

from latentdiff.allocator import keep_freed_memory
from latentdiff.pipeline.conversion import DTYPES
from latentdiff.pipeline.pipeline import LatentDiffPipeline

logger = logging.getLogger(__name__)

AUTO = "auto"


def open_pipeline(
    model: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    fast: bool = False,
) -> LatentDiffPipeline:
    """Open a model on a device, the best there is by default; ValueError for a wrong name.

    dtype: a name, or "auto" for the device's fastest that is near float32; see `best_dtype`. fast:
    on a CPU take packed layers, within 1/255 of the plain ones (fast_cpu.py).

    """
    if dtype not in (AUTO, *DTYPES):
        raise ValueError(f"dtype must be one of {AUTO}, {', '.join(DTYPES)}, got {dtype!r}")
    place = _usable(device)
    wanted = best_dtype(place) if dtype == AUTO else DTYPES[dtype]
    pipe = LatentDiffPipeline.from_pretrained(model, torch_dtype=wanted).to(place)
    if fast and place.type == "cpu":
        keep_freed_memory()
        pipe.fast_cpu.is_on = True
    return pipe


def _usable(device: str | None) -> torch.device:
    """Return the device of a name, or the best there is; ValueError where none answers to it."""
    best = torch.accelerator.current_accelerator(check_available=True)
    try:
        place = torch.device(device or best or "cpu")
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {error}") from error
    return place


def best_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device multiplies it in hardware, else float32.

    On a CPU that does, a guided step is 1.6 to 2.3 times as fast in it (docs/performance.md).
    """
    if device.type == "cpu":
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        has = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has else torch.float32
