"""A pipeline opened for drawing: on the best device there is, as fast as that device allows.

Answers for: which number format and which way through the U-Net a script takes where its user
leaves the choice open. Does not answer for: reading the files (loading.py).
"""

from __future__ import annotations

import torch

from latentdiff.allocator import keep_freed_memory
from latentdiff.pipeline.conversion import DTYPES
from latentdiff.pipeline.pipeline import LatentDiffPipeline

AUTO = "auto"


def open_pipeline(
    model: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    fast: bool = False,
) -> LatentDiffPipeline:
    """Open a model on a device, the best there is by default; ValueError for a wrong name.

    dtype: a name, or "auto", see `best_dtype`. fast: on a CPU take packed layers, in float32 within
    1/255 of the plain ones (fast_cpu.py).
    """
    if dtype not in (AUTO, *DTYPES):
        raise ValueError(f"dtype must be one of {AUTO}, {', '.join(DTYPES)}, got {dtype!r}")
    best = torch.accelerator.current_accelerator(check_available=True)
    try:
        place = torch.device(device or best or "cpu")
        wanted = best_dtype(place) if dtype == AUTO else DTYPES[dtype]
    except (RuntimeError, AssertionError) as error:
        raise _unusable(device, error) from error
    pipe = LatentDiffPipeline.from_pretrained(model, torch_dtype=wanted)
    try:
        pipe.to(place)
    except (RuntimeError, AssertionError) as error:
        raise _unusable(device, error) from error
    if fast and place.type == "cpu":
        keep_freed_memory()
        pipe.fast_cpu.is_on = True
    return pipe


def _unusable(device: str | None, error: Exception) -> ValueError:
    return ValueError(f"device={device!r} cannot be used here: {error}")


def best_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 on an x86 CPU or a CUDA device that multiplies it in hardware, else float32.

    On such a CPU a call takes 1.3 to 1.8 times as long in float32 (benchmarks/results).
    """
    if device.type == "cpu":
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    elif device.type == "cuda":
        with torch.cuda.device(device):
            has = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = False
    return torch.bfloat16 if has else torch.float32
