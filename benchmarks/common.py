"""Shared by the benchmarks: turns, large folders, checkpoints, the machine's name and its peak."""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections import defaultdict
from functools import partial

import diffusers
import torch
from safetensors.torch import load_file

NUM_IN_FOLDER = 10_000  # images of a numbered folder's part


def take_turns(works, *, rounds, warm_up=1):
    """Return the seconds of each call of each work (by name), one call of each a round.

    A work that measures itself returns its seconds.
    """
    times = defaultdict(list)
    for number in range(warm_up + rounds):
        for name, work in works.items():
            started = time.perf_counter()
            seconds = work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= warm_up:
                is_measured = isinstance(seconds, float)
                times[name].append(seconds if is_measured else time.perf_counter() - started)
    return times


def write_numbered(root, num, *, ending, save):
    """Write a captioned folder of `num` images, in parts; save(path, number) writes each."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "metadata.jsonl").open("w") as file:
        for i in range(num):
            name = f"part-{i // NUM_IN_FOLDER:03d}/{i:07d}.{ending}"
            if i % NUM_IN_FOLDER == 0:
                (root / name).parent.mkdir()
            save(root / name, i)
            row = {"file_name": name, "text": f"a photo of thing number {i} on a table"}
            file.write(json.dumps(row) + "\n")


def load_checkpoint(pipe, path):
    """Copy model.safetensors or ema.safetensors of a checkpoint into U-Net and text encoder.

    A part that the run did not train stays. SystemExit where the file has another model's part, or
    an adapter's.
    """
    weights = load_file(path)
    for name in ("unet", "text_encoder"):
        start = f"{name}."
        part = {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        missing, _ = getattr(pipe, name).load_state_dict(part, strict=False)
        if part and missing:
            raise SystemExit(f"{path} lacks {missing[0]} of the {name}")


class OwnProcess:
    """An object in a process of its own, whose settings hold for it alone."""

    def __init__(self, make, *arguments, **named):
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(
            target=_serve, args=(theirs, partial(make, *arguments, **named)), daemon=True
        )
        self.process.start()
        theirs.close()

    def call(self, method, *arguments):
        """Call the object's method; return its result."""
        self._pipe.send((method, arguments))
        return self._pipe.recv()

    def close(self):
        """End the process."""
        self._pipe.close()
        self.process.join()


def _serve(pipe, make):
    made = make()
    while True:
        try:
            method, given = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(made, method)(*given))


def own_seconds():
    """Return the process's CPU time where it has one thread, so that other jobs do not count."""
    if torch.get_num_threads() == 1 and not torch.cuda.is_available():
        return time.process_time()
    return time.perf_counter()


def ratio(times, slow, fast):
    """Return the median over rounds of the seconds of `slow` over those of `fast`."""
    pairs = zip(times[slow], times[fast], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 3)


def medians(times):
    """Return the median seconds by name."""
    return {name: round(statistics.median(seconds), 4) for name, seconds in times.items()}


def peak_tflops(*, size=2048, device="cpu"):
    """Return the speed of a large bf16 matrix product, in TFLOP/s."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = min(take_turns({"mm": lambda: a @ a}, rounds=5)["mm"])
    return 2 * size**3 / seconds / 1e12


def bf16_unit():
    """Return the processor's unit for bf16 products: "AMX", "AVX-512", or None."""
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    return "AVX-512" if torch.cpu._is_avx512_bf16_supported() else None


def machine():
    """Describe the machine that this ran on."""
    model = "unknown"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": model,
        "bf16": bf16_unit(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "platform": platform.platform(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
