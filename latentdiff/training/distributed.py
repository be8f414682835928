"""The processes of a training: started, launched as a command, asked, and refused where they cannot
train.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator, AutocastKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.utils import KwargsHandler

from latentdiff.config.text_to_image import Config
from latentdiff.device import tune_malloc
from latentdiff.training.bill.materials import machine_facts

WAIT = timedelta(hours=2)  # for the main process, which hashes images and weights; NCCL's is 10 min
MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
UNDER_ACCELERATE = "ACCELERATE_MIXED_PRECISION"  # set by accelerate launch
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
}
ON_THE_CPU = "On the CPU use torchrun --nproc_per_node N -m latentdiff train"


def start_accelerator(config: Config) -> Accelerator:
    """Start Accelerate; ValueError when it is not what was launched, or cannot be used."""
    _refuse_unsupported()
    _refuse_other_precision(config.train.mixed_precision)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else None
    handlers: list[KwargsHandler] = []
    if backend:
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=WAIT))
    if config.train.fused_backward_pass:  # or autocast holds a bf16 copy of all weights
        handlers.append(AutocastKwargs(cache_enabled=False))
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else several CPU processes are not seen
        mixed_precision=MIXED[config.train.mixed_precision],
        kwargs_handlers=handlers or None,
    )
    _refuse_copies(accelerator)
    if accelerator.distributed_type == DistributedType.FSDP and config.train.channels_last is True:
        raise ValueError(
            "train.channels_last is true, and FSDP2 cannot shard weights in that layout: add "
            "--train.channels_last=false"
        )
    if accelerator.distributed_type == DistributedType.FSDP and config.train.optimizer != "adamw":
        raise ValueError(
            f"train.optimizer={config.train.optimizer} has no form that FSDP2 can shard: take "
            "adamw, whose state FSDP2 shards, or train without FSDP"
        )
    # here, as diffusers takes seconds that whoever only launches training need not wait for
    from latentdiff.training.optim.optimizer import check_optimizer
    from latentdiff.training.text_to_image.model import check_attention

    check_optimizer(config.train.optimizer, accelerator.device)
    check_attention(config.train.attention, accelerator.device)
    if accelerator.device.type == "cpu":
        tune_malloc()
    return accelerator


def _refuse_unsupported() -> None:
    """Raise ValueError for a way of training by Accelerate that this project does not know."""
    for name, what in UNSUPPORTED.items():
        if _is_set(name):
            raise ValueError(
                f"accelerate launch asks for {what}, which LatentDiff cannot do: use DDP or FSDP2, "
                "as in configs/accelerate/"
            )
    if _is_set("ACCELERATE_USE_FSDP") and os.environ.get("FSDP_VERSION") != "2":
        raise ValueError(
            f"accelerate launch asks for FSDP version {os.environ.get('FSDP_VERSION', '1')}, "
            "expected fsdp_version: 2, as in configs/accelerate/fsdp2_8_gpus.yaml"
        )


def _refuse_other_precision(precision: str) -> None:
    """Raise ValueError where accelerate launch was asked for another one; "no" it gives unasked."""
    asked = os.environ.get(UNDER_ACCELERATE, "no")
    if asked not in ("no", MIXED[precision]):
        raise ValueError(
            f"accelerate launch was asked for --mixed_precision {asked} and the config says "
            f"mixed_precision={precision}: name one precision, either of launch or of the config"
        )


def _refuse_copies(accelerator: Accelerator) -> None:
    """Raise ValueError when fewer processes, or another kind, came to be than was asked for."""
    found, kind = accelerator.num_processes, accelerator.distributed_type
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if found != launched:
        raise ValueError(
            f"{launched} processes were launched and Accelerate sees {found}, as {kind}: they "
            f"would train copies. {ON_THE_CPU}"
        )
    # Given by accelerate launch to what is to be several processes, also where it starts just one.
    asked_for_several = UNDER_ACCELERATE in os.environ and "MASTER_ADDR" in os.environ
    if asked_for_several and found == 1 and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate launch was asked for several processes (MASTER_ADDR is set) and started "
            f"one. {ON_THE_CPU}"
        )
    if _is_set("ACCELERATE_USE_FSDP") and kind != DistributedType.FSDP:
        raise ValueError(
            f"accelerate launch asks for FSDP and Accelerate trains as {kind}: FSDP needs GPUs. "
            f"{ON_THE_CPU}"
        )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def single_process_accelerator(precision: str) -> Accelerator:
    """Start Accelerate; ValueError where several processes were launched: they would train copies,
    or in another precision.

    Its autocast is wanted; gradients are scaled by optim.ScaledUpdate.
    """
    _refuse_other_precision(precision)
    accelerator = Accelerator(mixed_precision=MIXED[precision])
    if accelerator.num_processes > 1:
        raise ValueError(
            f"{accelerator.num_processes} processes were launched, and this recipe trains in one: "
            "start it with python"
        )
    if accelerator.device.type == "cpu":
        tune_malloc()
    return accelerator


def machine_of(accelerator: Accelerator, *, micro_batch_size: int) -> dict[str, Any]:
    """Return the `machine_facts` of a run."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return machine_facts(
        device=name,
        num_threads=torch.get_num_threads(),
        num_processes=accelerator.num_processes,
        micro_batch_size=micro_batch_size,
    )


def any_process(flag: bool, accelerator: Accelerator) -> bool:
    """Return whether any process raised its flag; a CPU message, so no device waits."""
    if accelerator.num_processes == 1:
        return flag
    raised = torch.tensor([int(flag)])
    torch.distributed.all_reduce(raised)
    return bool(raised.item())


# torchrun, with the exit code of its processes in place of a traceback of its own.
LAUNCHER = """
import sys
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
try:
    main()
except SignalException as stop:
    sys.exit(128 + stop.sigval)
except ChildFailedError as failed:
    code = failed.get_first_failure()[1].exitcode
    sys.exit(code if code > 0 else 128 - code)
"""


def launch(command: str, arguments: Sequence[str]) -> int:
    """Run a command such as `latentdiff train` with arguments; return its exit status.

    In a process for each half of a CPU's cores, at most two, or in one on a GPU: so small a model
    gains more from two processes than from two threads. Windows, for which PyTorch is built without
    what torchrun meets its processes by, trains in one. Returns 130 or 143 after SIGINT or SIGTERM,
    when the processes have ended: they get the first from the terminal, the second from here.
    """
    if sys.platform == "win32":
        return subprocess.call([sys.executable, "-m", "latentdiff", command, *arguments])
    num_cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    num_processes = 1 if torch.accelerator.is_available() else min(2, num_cores)
    launcher = [sys.executable, "-c", LAUNCHER, "--standalone"]
    launcher += ["--nproc_per_node", str(num_processes), "--module", "latentdiff", command]
    threads = {"OMP_NUM_THREADS": str(max(1, num_cores // num_processes))}
    process = subprocess.Popen([*launcher, *arguments], env=os.environ | threads)
    signals: list[int] = []

    def note(number: int, _: object) -> None:
        signals.append(number)
        if number == signal.SIGTERM:
            process.terminate()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + signals[0] if signals else code
