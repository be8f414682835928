"""Gradient clipping, and the update that is skipped where a gradient is not finite.

No function here waits for the device, but for `step_if_finite` with an optimiser that has no fused
form.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

FUSED_DEVICES = ("cpu", "cuda")  # whose fused AdamW can skip an update


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale gradients in place to a global norm of at most max_norm; return the norm before that.

    The norm is 0-dim and stays on the device; NaN or Inf in any gradient shows in it. None: measure
    only.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # of FSDP2's shards


def step_if_finite(optimizer: Optimizer, ok: Tensor) -> None:
    """Step where `ok` (0-dim, bool or float) is not 0; else weights and state stay, bit by bit.

    Fused AdamW decides on the device. Other optimisers make the host wait for `ok`. Takes the
    optimiser itself, not a wrapper of it.
    """
    if _skips_on_device(optimizer):
        found_inf = (ok.detach() == 0).to(torch.float32).reshape(())
        vars(optimizer)["found_inf"] = found_inf  # as torch.amp.GradScaler sets it
        try:
            optimizer.step()
        finally:
            del vars(optimizer)["found_inf"]
    elif bool(ok):
        optimizer.step()


def _skips_on_device(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, AdamW) and all(
        group["fused"] and all(p.device.type in FUSED_DEVICES for p in group["params"])
        for group in optimizer.param_groups
    )
