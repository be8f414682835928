"""The optimiser by name, and its parameter groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from latentdiff.config.choices import OptimizerName
from latentdiff.training.optim.gradients import FUSED_DEVICES
from latentdiff.training.optim.muon import Muon, muon_params


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


def check_optimizer(name: OptimizerName, device: torch.device) -> None:
    """Raise ValueError for an optimiser that cannot run on `device`, before anything is loaded."""
    if name != "adamw8bit":
        return
    _adamw8bit_class()
    if device.type == "cpu":
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

    weight_decay: of the groups that name none; muon needs groups made for it. ValueError when
    nothing is trainable, or when bitsandbytes is asked for and absent.
    """
    groups = [dict(group) for group in parameter_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    if not parameters:
        raise ValueError("no parameter is trainable: everything is frozen")
    if name == "adamw8bit":
        return _adamw_8bit(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if name == "muon":
        return Muon(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if name != "adamw":
        raise ValueError(f"optimizer is {name!r}, expected adamw, adamw8bit or muon")
    fused = all(
        parameter.device.type in FUSED_DEVICES and parameter.is_floating_point()
        for parameter in parameters
    )
    return AdamW(
        groups,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        fused=True if fused else None,
    )


def _adamw_8bit(
    groups: list[dict[str, Any]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Optimizer:
    """Return AdamW with block-wise 8-bit state (Dettmers et al. 2022)."""
    optimizer: Optimizer = _adamw8bit_class()(
        groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
    )
    return optimizer


def _adamw8bit_class() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "optimizer adamw8bit needs bitsandbytes, which is not installed: "
            "pip install 'latentdiff[8bit]', or take adamw"
        ) from error
    return AdamW8bit
