"""A pipeline opened for drawing: on the best device there is, as fast as that device allows.

Answers for: which number format and which way through the U-Net a script takes where its user
leaves the choice open. Does not answer for: reading the files (loading.py).

torch.compile for a pipeline's U-Net, with a warm-up that says what it does.

On a CPU the packed layers of fast_cpu.py are faster and need no compiler (docs/performance.md), so
nothing is compiled unless it is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from latentdiff.device import tune_malloc
from latentdiff.pipeline.pipeline import LatentDiffPipeline
from latentdiff.sampling.conversion import DTYPES

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
        tune_malloc()
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


def compile_unet(pipe: Any, warm_up: Callable[[], object], *, say: Callable[[str], None]) -> None:
    """Compile the U-Net of a pipeline for the shapes that `warm_up` draws; it calls the pipeline.

    Other shapes are compiled when they first come. say: gets a line on what is done, and one on how
    long it took. ValueError with the compiler's reason where it cannot compile.
    """
    from torch._dynamo.exc import TorchDynamoException  # heavy, and seldom needed
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    say(f"compiling the U-Net: minutes the first time, kernels are kept in {cache_dir()}")
    started = time.perf_counter()
    pipe.unet.compile(dynamic=False)
    try:
        warm_up()
    except TorchDynamoException as error:
        reason = str(getattr(error, "inner_exception", error)).partition("\n")[0]
        raise ValueError(f"compile=true is not possible here: {reason}") from error
    say(f"compiled in {time.perf_counter() - started:.0f} s")
