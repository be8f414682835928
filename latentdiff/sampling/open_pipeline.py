"""Open a pipeline on the best device there is, and make it as fast as that device allows.

Answers for: the number format and the path through the U-Net that a command takes where its user
leaves the choice open, and torch.compile. Does not answer for: reading the files (loading.py).

On a CPU the packed layers of cpu/ are faster and need no compiler (docs/performance.md), so the
U-Net is compiled only on request.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from latentdiff.device import DTYPES, best_dtype, choose_device, tune_malloc
from latentdiff.models.components import left_out
from latentdiff.models.model_path import model_of_run
from latentdiff.pipeline.pipeline import LatentDiffPipeline

AUTO = "auto"


def open_pipeline(
    model: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    fast: bool = False,
    safety_checker: bool = True,
    vae: str | None = None,
) -> LatentDiffPipeline:
    """Open a model, or a run's, on a device, by default the best one; ValueError for a wrong name.

    dtype: a name, or "auto", see `best_dtype`. fast: on a CPU take packed layers, in float32 within
    1/255 of the plain ones (cpu/). safety_checker: False leaves the model's own out, unread. vae:
    one in the place of the model's own, "tiny" for the one that its folder carries in vae_tiny/.
    """
    if dtype not in (AUTO, *DTYPES):
        raise ValueError(f"dtype must be one of {AUTO}, {', '.join(DTYPES)}, got {dtype!r}")
    place = choose_device(device)
    wanted = best_dtype(place) if dtype == AUTO else DTYPES[dtype]
    given = left_out(safety_checker=not safety_checker) | ({} if vae is None else {"vae": vae})
    path = model_of_run(model)
    pipe = LatentDiffPipeline.from_pretrained(path, torch_dtype=wanted, **given).to(place)
    if fast and place.type == "cpu":
        tune_malloc()
        pipe.fast_cpu.is_on = True
    return pipe


def compile_unet(pipe: Any, warm_up: Callable[[], object], *, log: Callable[[str], None]) -> None:
    """Compile a pipeline's U-Net for the shapes of `warm_up`, a function that calls the pipeline.

    Other shapes are compiled when they first come. log: gets a line before, and one with the
    seconds it took. Raises ValueError with the compiler's reason where it cannot compile.
    """
    from torch._dynamo.exc import TorchDynamoException  # heavy, and seldom needed
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    log(f"compiling the U-Net: minutes the first time, kernels are kept in {cache_dir()}")
    started = time.perf_counter()
    pipe.unet.compile(dynamic=False)
    try:
        warm_up()
    except TorchDynamoException as error:
        reason = str(getattr(error, "inner_exception", error)).partition("\n")[0]
        raise ValueError(f"compile=true is not possible here: {reason}") from error
    log(f"compiled in {time.perf_counter() - started:.0f} s")
