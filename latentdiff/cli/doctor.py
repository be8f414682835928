"""`latentdiff doctor`: what this machine can do, what does not fit, and what to type about it.

machine.py reads the facts; here they are judged, by functions of them alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from jsonargparse import ArgumentParser

from latentdiff.cli.machine import Machine, Package, Place, read_machine
from latentdiff.config.yaml_file import shipped_configs
from latentdiff.program import program

Level = Literal["ok", "note", "warn", "FAIL"]
MIN_PYTHON = (3, 11)
MIN_FREE_GB, LITTLE_FREE_GB = 0.5, 5.0  # of a disk: a run's checkpoints are some of its model
MIN_MEMORY_GB, LITTLE_MEMORY_GB = 2.0, 6.0
LITTLE_SHARED_GB = 0.5  # data workers hand batches over in it
PRESETS = {  # by the memory of a GPU in GB: the config to begin with, where it ships
    7.5: "lora_sd15_8gb",
}
ADDS = {  # what an extra is for
    "8bit": "optimisers with 8-bit states (CUDA)",
    "datasets": "Hugging Face data sets by their id",
    "optimizers": "Prodigy, schedule-free AdamW and Lion",
    "plots": "figures of examples and reports",
    "trackers": "runs shown in Weights & Biases or trackio",
    "ui": "the web UI, latentdiff app",
    "wds": "training from tar shards",
    "xformers": "another attention kernel (CUDA); PyTorch's own is the default",
}
CUDA_ONLY = {"xformers", "bitsandbytes"}
COLUMNS = 14


@dataclass(frozen=True)
class Finding:
    """A line of the report; fix: what to type where something does not fit."""

    topic: str
    level: Level
    text: str
    fix: str = ""


def doctor_command(parser: ArgumentParser, arguments: Sequence[str]) -> int:
    """Say what this machine can do, what does not fit, and what to type next.

    Exit code 1 where something that is needed does not fit.
    """
    parser.add_argument("--json", action="store_true", help="print facts and findings as JSON")
    args = parser.parse_args(arguments)
    machine = read_machine()
    findings = list(examine(machine))
    print(as_json(machine, findings) if args.json else as_text(machine, findings))
    return 0 if is_usable(findings) else 1


def examine(machine: Machine) -> Iterator[Finding]:
    """Yield what is to be said of a machine, topic by topic."""
    yield from _python(machine)
    yield from _packages(machine)
    yield from _device(machine)
    yield from _threads(machine)
    yield from _memory(machine)
    yield from (_place(place) for place in machine.places)
    yield from _accelerate(machine)
    yield from _extras(machine)


def is_usable(findings: Sequence[Finding]) -> bool:
    """Return whether all that is needed fits."""
    return all(finding.level != "FAIL" for finding in findings)


# ---- what each topic's facts mean ----


def _python(machine: Machine) -> Iterator[Finding]:
    have = tuple(int(part) for part in machine.python.split(".")[:2])
    text = f"{machine.python} on {machine.system}; latentdiff {machine.version}"
    if have >= MIN_PYTHON:
        yield Finding("Python", "ok", text)
    else:
        wanted = ".".join(map(str, MIN_PYTHON))
        yield Finding(
            "Python",
            "FAIL",
            f"{text}; expected Python {wanted} or newer",
            f"make an environment with it: python{wanted} -m venv .venv",
        )


def _packages(machine: Machine) -> Iterator[Finding]:
    needed = [package for package in machine.packages if not package.extras]
    if not needed:
        text = "latentdiff is not installed, so its requirements are unknown"
        yield Finding("packages", "warn", text, "pip install -e .")
    wrong = [package for package in needed if not package.fits]
    for package in wrong:
        have = package.installed or "not installed"
        text = f"{package.name} is {have}, expected {package.wanted or 'any version'}"
        yield Finding("packages", "FAIL", text, _pip(wrong))
    if needed and not wrong:
        names = ("torch", "diffusers", "transformers")
        known = {package.name: package.installed for package in needed}
        main = ", ".join(f"{name} {known[name]}" for name in names if name in known)
        yield Finding("packages", "ok", f"all {len(needed)} that are needed fit ({main})")
    for conflict in machine.conflicts:
        yield Finding("packages", "warn", conflict, "pip check lists all of these")
    for package in machine.packages:
        if package.name in CUDA_ONLY and package.installed and not machine.torch.gpus:
            text = f"{package.name} is installed, needs CUDA and warns at every start without it"
            yield Finding("packages", "warn", text, f"pip uninstall {package.name}")


def _pip(packages: Sequence[Package]) -> str:
    return "pip install " + " ".join(f'"{package.name}{package.wanted}"' for package in packages)


def _device(machine: Machine) -> Iterator[Finding]:
    torch = machine.torch
    if torch.error:
        is_mixed = "torchvision" in torch.error
        fix = "pip install --force-reinstall torch torchvision" if is_mixed else "pip install torch"
        why = "; the two are of different builds" if is_mixed else ""
        yield Finding("device", "FAIL", f"torch does not start: {torch.error}{why}", fix)
        return
    formats = ", ".join(torch.number_formats) or "none of AVX2, AVX-512 and AMX"
    yield Finding("processor", "ok", f"{machine.cpu}, {machine.num_cores} cores; {formats}")
    if torch.device.startswith("cpu"):
        slow = "" if torch.dtype == "bfloat16" else ", as this processor is not fast in bfloat16"
        yield Finding("device", "ok", f"the CPU, {torch.dtype} by default{slow}")
    else:
        yield Finding("device", "ok", f"{torch.device}, {torch.dtype} by default")
    for gpu in torch.gpus:
        text = f"{gpu.name}: {gpu.memory_gb:.0f} GB, {gpu.free_gb:.0f} GB free"
        if gpu.has_kernels:
            yield Finding("GPU", "ok", text)
        else:
            text = f"{text}; this torch (CUDA {torch.cuda}) has no code for it"
            yield Finding("GPU", "FAIL", text, "https://pytorch.org/get-started says which has")
    if machine.has_nvidia_driver and not torch.gpus:
        build = f"for CUDA {torch.cuda}" if torch.cuda else "without CUDA"
        text = f"a driver of NVIDIA is there, and torch (built {build}) sees no GPU"
        yield Finding("GPU", "warn", text, "https://pytorch.org/get-started gives the command")
    yield Finding("attention", "ok", f"kernels: {', '.join(torch.attention)}")


def _threads(machine: Machine) -> Iterator[Finding]:
    threads, cores = machine.torch.num_threads, machine.num_cores
    if machine.torch.error:
        return
    given = machine.omp_variable
    text = f"torch computes with {threads} on {cores} cores"
    text += f" (OMP_NUM_THREADS={given})" if given else ""
    if threads > cores:
        text += ": more threads than cores are many times slower"
    elif threads < cores and given and not machine.torch.gpus:
        text += ": some cores are idle"
    else:
        yield Finding("threads", "ok", text)
        return
    yield Finding("threads", "warn", text, f"export OMP_NUM_THREADS={cores}")


def _memory(machine: Machine) -> Iterator[Finding]:
    text = f"{machine.memory_gb:.1f} GB, {machine.free_memory_gb:.1f} GB free"
    if machine.free_memory_gb < MIN_MEMORY_GB:
        fix = "end other programs, or give the container more"
        yield Finding("memory", "FAIL", f"{text}; expected {MIN_MEMORY_GB:g} GB", fix)
    elif machine.free_memory_gb < LITTLE_MEMORY_GB:
        fix = "choose a *_mini config, or another device"
        yield Finding("memory", "warn", f"{text}: enough for the bundled models only", fix)
    else:
        yield Finding("memory", "ok", text)
    shared = machine.shared_memory_gb
    if shared is not None and shared < LITTLE_SHARED_GB:
        text = f"{1000 * shared:.0f} MB shared; data workers hand batches over in it"
        yield Finding("memory", "warn", text, "docker run --shm-size=2g, or --data.num_workers=0")


def _place(place: Place) -> Finding:
    free = place.free_gb
    text = f"{place.path}: " + ("no such disk" if free is None else f"{free:.1f} GB free")
    if not place.is_writable:
        return Finding(place.use, "FAIL", f"{text}, not writable", f"chmod u+w {place.path}")
    if free is None or free < MIN_FREE_GB:
        fix = f"free {MIN_FREE_GB:g} GB there"
        return Finding(place.use, "FAIL", f"{text}, expected {MIN_FREE_GB:g} GB", fix)
    if free < LITTLE_FREE_GB:
        return Finding(place.use, "warn", f"{text}, little for a model of SD 1.5's size")
    return Finding(place.use, "ok", text)


def _accelerate(machine: Machine) -> Iterator[Finding]:
    config, path = machine.accelerate, machine.accelerate_path
    if not path:
        text = "no config, so one process; for several GPUs"
        yield Finding("accelerate", "note", text, "accelerate config")
        return
    kind, num = str(config.get("distributed_type", "NO")), config.get("num_processes", 1)
    text = f"{path}: {kind}, {num} processes, mixed_precision={config.get('mixed_precision')}"
    gpus = len(machine.torch.gpus)
    if kind == "MULTI_CPU":
        text += "; accelerate launch starts one process on CPUs all the same"
        yield Finding(
            "accelerate", "warn", text, f"torchrun --nproc_per_node {num} -m latentdiff train"
        )
    elif kind == "FSDP" and not gpus:
        text += "; FSDP does not engage on CPUs: each process would train a model of its own"
        yield Finding("accelerate", "warn", text, "accelerate config")
    elif kind in ("MULTI_GPU", "FSDP", "DEEPSPEED") and isinstance(num, int) and num > gpus:
        text += f"; torch sees {gpus} GPUs"
        yield Finding("accelerate", "warn", text, "accelerate config")
    else:
        yield Finding("accelerate", "ok", text)


def _extras(machine: Machine) -> Iterator[Finding]:
    """Yield a line for each extra: what it adds, and how it is installed."""
    names = dict.fromkeys(extra for package in machine.packages for extra in package.extras)
    for extra in sorted(names):
        own = [package for package in machine.packages if extra in package.extras]
        missing = [package for package in own if not package.fits]
        adds = ADDS.get(extra, ", ".join(package.name for package in own))
        old = [f"{p.name} is {p.installed}, expected {p.wanted}" for p in missing if p.installed]
        if not missing:
            yield Finding(f"[{extra}]", "ok", adds)
        else:
            text = "; ".join([adds, *old])
            yield Finding(f"[{extra}]", "note", text, f'pip install "latentdiff[{extra}]"')


# ---- the report ----


def verdict(machine: Machine, findings: Sequence[Finding]) -> str:
    """Return the report's last sentence but one."""
    failed = [finding.topic for finding in findings if finding.level == "FAIL"]
    if failed:
        topics = ", ".join(dict.fromkeys(failed))
        return f"not usable yet: {topics} (FAIL above, each with its fix)"
    num = sum(finding.level == "warn" for finding in findings)
    warned = f", with {num} warning{'s' * (num > 1)} above" if num else ""
    torch = machine.torch
    place = torch.gpus[0].name if torch.gpus else torch.device.upper().removesuffix(":0")
    return f"usable: training and sampling on the {place} in {torch.dtype}{warned}"


def next_commands(machine: Machine, findings: Sequence[Finding]) -> list[str]:
    """Return what to type next: the fixes that are needed, or the first commands of a new user."""
    if not is_usable(findings):
        fixes = [finding.fix for finding in findings if finding.level == "FAIL"]
        return [*dict.fromkeys(fixes), f"{program()} doctor"]
    memory = max((gpu.memory_gb for gpu in machine.torch.gpus), default=0.0)
    fitting = (name for least, name in PRESETS.items() if memory >= least)
    config = next((name for name in fitting if name in shipped_configs()), "lora_mini")
    return [f"{program()} demo", f"{program()} train --config {config} --data.root=FOLDER"]


def as_text(machine: Machine, findings: Sequence[Finding]) -> str:
    """Return the report for a terminal."""
    lines = []
    for index, finding in enumerate(findings):
        first = index == 0 or findings[index - 1].topic != finding.topic
        topic = finding.topic if first else ""
        if finding.topic.startswith("[") and not findings[index - 1].topic.startswith("["):
            lines.append("\nExtras")
        is_short = finding.level == "note"
        text = f"{finding.text}: {finding.fix}" if is_short else finding.text
        lines.append(f"{finding.level:>4}  {topic:{COLUMNS}}  {text}")
        if finding.fix and not is_short:
            lines.append(f"{'':6}{'':{COLUMNS}}    -> {finding.fix}")
    commands = next_commands(machine, findings)
    lines += ["", f"This machine is {verdict(machine, findings)}."]
    return "\n".join([*lines, "Next:", *(f"  {command}" for command in commands)])


def as_json(machine: Machine, findings: Sequence[Finding]) -> str:
    """Return facts and findings as JSON."""
    report = {
        "is_usable": is_usable(findings),
        "verdict": verdict(machine, findings),
        "next": next_commands(machine, findings),
        "findings": [asdict(finding) for finding in findings],
        "machine": asdict(machine),
    }
    return json.dumps(report, indent=2, ensure_ascii=False)
