"""Facts about this machine for `latentdiff doctor`: read only, nothing is judged here.

Whatever cannot be read is None or absent, so that a damaged install still gives a report.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import yaml
from packaging.requirements import Requirement

from latentdiff.config.data import DataConfig

GB = 1e9
NOT_FOR_USERS = {"test", "docs", "all"}  # extras
CGROUP = Path("/sys/fs/cgroup")
NO_LIMIT = 1 << 60  # bytes; where a container has no limit a larger number stands


@dataclass(frozen=True)
class Gpu:
    """A CUDA device; has_kernels: this torch has machine code for it."""

    name: str
    memory_gb: float
    free_gb: float
    has_kernels: bool = True


@dataclass(frozen=True)
class Torch:
    """What torch sees: error is the message of a failed import, device and dtype our defaults."""

    error: str = ""
    device: str = "cpu"
    dtype: str = "float32"
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    attention: tuple[str, ...] = ()
    number_formats: tuple[str, ...] = ()
    num_threads: int = 1


@dataclass(frozen=True)
class Package:
    """A package that latentdiff needs, or that its extras name, and the versions that fit."""

    name: str
    wanted: str
    installed: str | None
    fits: bool
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """A folder that we write to; free_gb: None where there is none to ask."""

    use: str
    path: str
    free_gb: float | None
    is_writable: bool


@dataclass(frozen=True)
class Machine:
    """All facts; sizes in GB of 10^9 bytes, cores are those that this process may use."""

    version: str
    python: str
    system: str
    cpu: str
    num_cores: int
    memory_gb: float
    free_memory_gb: float
    shared_memory_gb: float | None
    omp_variable: str | None
    has_nvidia_driver: bool
    torch: Torch
    packages: tuple[Package, ...]
    conflicts: tuple[str, ...]
    places: tuple[Place, ...]
    accelerate_path: str = ""
    accelerate: Mapping[str, Any] = field(default_factory=dict)


def read_machine() -> Machine:
    """Read every fact; takes the seconds that importing torch and torchvision takes."""
    found = tuple(packages(_requirements()))
    memory = psutil.virtual_memory()
    limit = _cgroup_memory()
    path, config = accelerate_config()
    return Machine(
        version=_version("latentdiff") or "not installed",
        python=platform.python_version(),
        system=platform.platform(terse=True),
        cpu=cpu_name(),
        num_cores=_num_cores(),
        memory_gb=min(memory.total, limit) / GB,
        free_memory_gb=min(memory.available, limit) / GB,
        shared_memory_gb=_free_gb(Path("/dev/shm")) if Path("/dev/shm").is_dir() else None,
        omp_variable=os.environ.get("OMP_NUM_THREADS"),
        has_nvidia_driver=shutil.which("nvidia-smi") is not None,
        torch=read_torch(),
        packages=found,
        conflicts=tuple(conflicts(package.name for package in found if package.installed)),
        places=tuple(places()),
        accelerate_path=path,
        accelerate=config,
    )


# ---- packages ----


def packages(requirements: Iterable[str]) -> Iterator[Package]:
    """Yield the packages of requirements such as 'gradio>=5; extra == "ui"', those needed first."""
    extras: dict[str, list[str]] = {}
    parsed: dict[str, Requirement] = {}
    for requirement in map(Requirement, requirements):
        extra = re.search(r"extra == ['\"]([\w.-]+)['\"]", str(requirement.marker or ""))
        if extra is None and requirement.marker and not requirement.marker.evaluate():
            continue
        if extra is not None and extra[1] in NOT_FOR_USERS:
            continue
        parsed.setdefault(requirement.name, requirement)
        extras.setdefault(requirement.name, []).extend([extra[1]] if extra else [])
    for name, requirement in sorted(parsed.items(), key=lambda item: bool(extras[item[0]])):
        installed = _version(name)
        fits = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        yield Package(name, str(requirement.specifier), installed, fits, tuple(extras[name]))


def conflicts(names: Iterable[str]) -> Iterator[str]:
    """Yield what installed packages ask of each other and do not get, as `pip check` does."""
    for name in names:
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            found = _version(requirement.name)
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                wanted = f"{requirement.name}{requirement.specifier}"
                yield f"{name} {_version(name)} wants {wanted}, installed is {found or 'none'}"


def _requirements() -> list[str]:
    try:
        return metadata.requires("latentdiff") or []
    except metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# ---- torch and its devices ----


def read_torch() -> Torch:
    """Import torch and torchvision, which fail together, and ask them."""
    try:
        torch: Any = importlib.import_module("torch")
        importlib.import_module("torchvision")  # fails where the two are of different builds
        from latentdiff.device import best_dtype, choose_device
    except Exception as error:  # whatever a damaged install raises
        return Torch(error=f"{type(error).__name__}: {error}")
    device = choose_device()
    cpu = {"AMX": "_is_amx_tile_supported", "AVX-512 bf16": "_is_avx512_bf16_supported"}
    cpu |= {"AVX-512": "_is_avx512_supported", "AVX2": "_is_avx2_supported"}
    checks = {name: getattr(torch.cpu, check, None) for name, check in cpu.items()}
    return Torch(
        device=str(device),
        dtype=str(best_dtype(device)).removeprefix("torch."),
        cuda=torch.version.cuda,
        gpus=tuple(_gpus(torch)),
        attention=tuple(_attention(torch, device)),
        number_formats=tuple(name for name, check in checks.items() if check and check()),
        num_threads=torch.get_num_threads(),
    )


def _gpus(torch: Any) -> Iterator[Gpu]:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        known = has_kernels(torch.cuda.get_arch_list(), major=device.major, minor=device.minor)
        yield Gpu(device.name, total / GB, free / GB, known)


def has_kernels(architectures: Iterable[str], *, major: int, minor: int) -> bool:
    """Return whether code of these architectures (sm_90, compute_120) runs on a CUDA device.

    Machine code runs on devices of its major version and at least its minor one, PTX on newer ones.
    """
    for kind, number in (name.split("_", 1) for name in architectures):
        digits = re.sub(r"\D", "", number)
        own_major, own_minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and own_major == major and own_minor <= minor:
            return True
        if kind == "compute" and (own_major, own_minor) <= (major, minor):
            return True
    return False


def _attention(torch: Any, device: Any) -> Iterator[str]:
    """Yield the kernels of scaled_dot_product_attention that run on the device, then others."""
    if device.type == "cpu":
        if hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            yield "flash (CPU)"
    elif device.type == "cuda":
        query = torch.empty(1, 8, 64, 40, device=device, dtype=torch.float16)
        cuda = torch.backends.cuda
        parameters = cuda.SDPAParams(query, query, query, None, 0.0, False, False)
        kernels = {"flash": "flash", "memory-efficient": "efficient", "cuDNN": "cudnn"}
        for name, key in kernels.items():
            if getattr(cuda, f"can_use_{key}_attention")(parameters):
                yield name
    yield "math"
    if device.type == "cuda" and importlib.util.find_spec("xformers"):
        yield "xformers"


# ---- processor, memory and disk ----


def places() -> Iterator[Place]:
    """Yield the folders that we write to, by what for."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    for use, path in {
        "image cache": DataConfig().cache_dir,
        "Hub models": os.environ.get("HF_HUB_CACHE", f"{home}/hub"),
        "temporary": tempfile.gettempdir(),
        "current folder": ".",
    }.items():
        full = Path(path).expanduser().absolute()
        there = next((one for one in (full, *full.parents) if one.is_dir()), None)
        writable = there is not None and os.access(there, os.W_OK)
        yield Place(use, str(full), _free_gb(there) if there else None, writable)


def accelerate_config() -> tuple[str, dict[str, Any]]:
    """Return the path and content of the file that `accelerate launch` takes by itself, if any."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    path = home / "accelerate" / "default_config.yaml"
    if not path.is_file():
        return "", {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    return str(path), content if isinstance(content, dict) else {}


def _free_gb(path: Path) -> float | None:
    try:
        return shutil.disk_usage(path).free / GB
    except OSError:
        return None


def _num_cores() -> int:
    """Return the cores that this process may use: of its affinity and its container's quota."""
    known = getattr(os, "sched_getaffinity", None)
    cores = len(known(0)) if known else os.cpu_count() or 1
    quota, _, period = _read(CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def _cgroup_memory() -> int:
    text = _read(CGROUP / "memory.max").strip()
    return int(text) if text.isdigit() else NO_LIMIT


def cpu_name() -> str:
    """Return the processor's name as its maker gives it."""
    found = re.search(r"model name\s*:\s*(.+)", _read(Path("/proc/cpuinfo")))
    return found[1].strip() if found else platform.processor() or platform.machine()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
