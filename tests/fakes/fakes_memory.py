"""The memory that PyTorch's own record says was allocated."""

from __future__ import annotations

import gc
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocated_peak(work: Callable[[], object]) -> int:
    """Do the work; return the most bytes that it had allocated and not yet freed on the CPU."""
    gc.collect()  # what earlier work left in cycles: freed meanwhile, it would count as less than 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    assert record.profiler is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
