"""torch.compile for a pipeline's U-Net, with a warm-up that says what it does.

On a CPU the packed layers of fast_cpu.py are faster and need no compiler (docs/performance.md), so
nothing is compiled unless it is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


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
