"""The optimiser by name, and its parameter groups.

AdamW is torch's, Muon ours; the others are their authors' libraries, as these advise for diffusion
models. What else an optimiser does than step, schedule-free's two sets of weights and Prodigy's
estimate, is told by `evaluated_weights` and `estimates`.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from latentdiff.config.choices import OptimizerName
from latentdiff.training.optim.gradients import FUSED_DEVICES
from latentdiff.training.optim.muon import Muon, muon_params


def _adamw8bit() -> Any:
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit


def _adafactor() -> Any:
    from transformers.optimization import Adafactor

    return Adafactor


def _prodigy() -> Any:
    from prodigyopt import Prodigy

    return Prodigy


def _schedule_free_adamw() -> Any:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree


def _lion() -> Any:
    from lion_pytorch.foreach import Lion

    return Lion


@dataclass(frozen=True)
class _Kind:
    """An optimiser: its class, tensors of state for each parameter, and options that it needs.

    num_moments: of the parameter's size; adafactor keeps rows and columns in their place.
    package, extra: what `load` imports, and the extra of this project that installs it.
    """

    load: Callable[[], Any]
    num_moments: int = 2
    package: str = ""
    extra: str = "optimizers"
    options: Mapping[str, Any] = field(default_factory=dict)


OPTIMIZERS: dict[OptimizerName, _Kind] = {
    "adamw": _Kind(lambda: AdamW),
    "adamw8bit": _Kind(_adamw8bit, package="bitsandbytes", extra="8bit"),  # Dettmers et al. 2022
    "adafactor": _Kind(  # Shazeer & Stern 2018, at the learning rate of its group
        _adafactor, num_moments=0, package="transformers", options={"relative_step": False}
    ),
    "muon": _Kind(lambda: Muon),
    "prodigy": _Kind(  # Mishchenko & Defazio 2024; no growth limit, as a number that JSON has
        _prodigy,
        num_moments=4,
        package="prodigyopt",
        options={
            "use_bias_correction": True,
            "safeguard_warmup": True,
            "growth_rate": sys.float_info.max,
        },
    ),
    "schedule_free_adamw": _Kind(_schedule_free_adamw, package="schedulefree"),  # Defazio 2024
    "lion": _Kind(  # Chen et al. 2023, which has one moment and no epsilon
        _lion, num_moments=1, package="lion-pytorch", options={"betas": (0.9, 0.99)}
    ),
}


def parameter_groups(
    module: nn.Module, *, weight_decay: float, name: OptimizerName = "adamw"
) -> list[dict[str, Any]]:
    """Return groups of the trainable parameters: matrices and kernels decay, vectors do not.

    Vectors are the biases and the scales of norms. The matrices that Muon applies to are marked
    "orthogonal". The groups of several modules may be concatenated.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    orthogonal = muon_params(module) if name == "muon" else set()
    matrices = [p for p in trainable if p.ndim > 1 and p not in orthogonal]
    vectors = [parameter for parameter in trainable if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if orthogonal:
        marked = [parameter for parameter in trainable if parameter in orthogonal]
        groups.append({"params": marked, "weight_decay": weight_decay, "orthogonal": True})
    return [group for group in groups if group["params"]]


def with_lr_factor(
    groups: Sequence[Mapping[str, Any]], parameter: nn.Parameter, factor: float
) -> list[dict[str, Any]]:
    """Return the groups with one parameter in a group of its own, marked with `lr_factor`."""
    found: list[dict[str, Any]] = []
    for group in groups:
        others = [one for one in group["params"] if one is not parameter]
        if others:
            found.append({**group, "params": others})
        if len(others) < len(group["params"]):
            found.append({**group, "params": [parameter], "lr_factor": factor})
    return found


def check_optimizer(name: OptimizerName, device: torch.device) -> None:
    """Raise ValueError for an optimiser that cannot run on `device`, before anything is loaded."""
    _load_class(name)
    if name == "adamw8bit" and device.type == "cpu":
        raise ValueError(
            "train.optimizer=adamw8bit needs a GPU and this run is on the CPU: take adamw"
        )


def build_optimizer(
    parameter_groups: Sequence[Mapping[str, Any]],
    *,
    name: OptimizerName,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Optimizer:
    """Return AdamW (Loshchilov & Hutter 2019), fused where the device has it, or another by name.

    weight_decay: of the groups that name none; muon needs groups made for it; lion and adafactor
    have their own betas. ValueError when nothing is trainable, or when the optimiser's package is
    not installed.
    """
    groups = [dict(group) for group in parameter_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        raise ValueError("no parameter is trainable: everything is frozen")
    options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    if name == "adafactor":
        options["scale_parameter"] = False  # steps of the learning rate's size, as of AdamW
    else:
        options["betas"] = betas
        if name != "lion":
            options["eps"] = eps
    if name == "adamw":
        fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)
        options["fused"] = True if fused else None
    cls = _load_class(name)
    optimizer: Optimizer = cls(groups, **(options | dict(OPTIMIZERS[name].options)))
    if name == "schedule_free_adamw":
        optimizer.train()  # type: ignore[attr-defined]  # its own mode, not a module's
    return optimizer


@contextmanager
def evaluated_weights(optimizer: Optimizer) -> Iterator[None]:
    """Give the model the weights to evaluate and to export inside the block.

    Those of schedule-free (Defazio et al. 2024) are the average x, while gradients are taken at
    another point y, which comes back bit for bit; any other optimiser has one set of weights.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]  # up to rounding
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)


def estimates(optimizer: Optimizer) -> dict[str, float]:
    """Return what an optimiser has found out so far, for the log: Prodigy's d, else nothing.

    Prodigy's learning rate is d times the schedule's.
    """
    group = optimizer.param_groups[0]
    return {"prodigy_d": float(group["d"])} if "d" in group else {}


def _load_class(name: OptimizerName) -> Any:
    """Return an optimiser's class; ValueError for an unknown name, or a package that is missing."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}, expected one of {', '.join(OPTIMIZERS)}")
    kind = OPTIMIZERS[name]
    try:
        return kind.load()
    except ImportError as error:
        raise ValueError(
            f"train.optimizer={name} needs {kind.package}, which is not installed: "
            f"pip install 'latentdiff[{kind.extra}]', or take adamw"
        ) from error
