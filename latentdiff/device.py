"""The device and number format that a command takes by default, and malloc tuned for it.

glibc gives every large block back to the system when it is freed and asks for it anew, and the
system hands it out page by page, cleared: 30,000 and more page faults a step of a 17 M U-Net, a
fifth of its time (docs/performance.md). `tune_malloc` lets the process keep the memory that a step
frees and the next one needs again. No arithmetic changes; the process holds its peak until it ends.
"""

import ctypes
import sys

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
NEVER = 2**31 - 1
STRIDE = 1 << 26  # bytes that the heap grows by


def choose_device(name: str | None = None) -> torch.device:
    """Return the device of that name, or the best available one.

    Raises ValueError where it cannot be used.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={name!r} cannot be used here: {error}") from error
    return device


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


def tune_malloc() -> bool:
    """Let malloc keep freed memory from now on; return whether this C library can (glibc)."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER, M_TOP_PAD: STRIDE}
    return all(mallopt(option, value) for option, value in wanted.items())
