"""Freed memory stays with the process, and comes back without page faults."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from latentdiff.device import tune_malloc

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        torch.ones(1 << 24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.ones(1)
before = faults()
kept = tune_malloc()
for _ in range(3):  # the heap grows until every block fits
    faults()
print(int(kept), before, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted on Linux")
def test_freed_memory_is_not_fetched_from_the_system_again() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], check=True, capture_output=True, text=True)
    kept, before, after = map(int, done.stdout.split())
    if not kept:
        pytest.skip("this C library's malloc takes no options")
    assert after < 0.01 * before
