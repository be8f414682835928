"""What benchmarks share: taking turns, the machine's name, and its measured limit."""

import os
import platform
import statistics
import time
from collections import defaultdict

import diffusers
import torch


def take_turns(works, *, rounds, warm_up=1):
    """Return the seconds of each call of each work (by name), one call of each a round."""
    times = defaultdict(list)
    for number in range(warm_up + rounds):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warm_up:
                times[name].append(time.perf_counter() - started)
    return times


def ratio(times, slow, fast):
    """Return the median over rounds of the seconds of `slow` over those of `fast`."""
    pairs = zip(times[slow], times[fast], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def medians(times):
    """Return the median seconds by name."""
    return {name: round(statistics.median(seconds), 4) for name, seconds in times.items()}


def peak_tflops(*, size=2048, device="cpu"):
    """Return what a large bf16 matrix product reaches, in TFLOP/s."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = min(take_turns({"mm": lambda: a @ a}, rounds=5)["mm"])
    return 2 * size**3 / seconds / 1e12


def machine():
    """Return where this ran."""
    model = "unknown"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": model,
        "cores_usable": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "platform": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
