"""A module's weights with their optimiser: one update in mixed precision, and their whole state.

For the VAE, its discriminator and CLIP; text-to-image has text_to_image/train_step.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from latentdiff.training.checkpoint import Parts
from latentdiff.training.optim.gradients import clip_gradients
from latentdiff.training.optim.lr import set_learning_rate
from latentdiff.training.optim.state import (
    load_optimizer_tensors,
    load_parameters,
    optimizer_tensors,
)


class AmpStep:
    """Gradient and update of one module, scaled as fp16 needs it by a scaler of its own.

    In fp16 an update whose gradients overflow is skipped, and the scale is halved.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        fp16: bool,
        max_norm: float | None = None,
        name: str = "model",
    ) -> None:
        """max_norm: of the gradients without their scale, as for `clip_gradients`.

        name: of the checkpoint's part; that of the optimiser is `name`_optimizer.
        """
        self.module, self.optimizer, self.max_norm, self.name = module, optimizer, max_norm, name
        self.parameters = dict(module.named_parameters())
        device = next(iter(self.parameters.values())).device
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    def step(self, loss: Tensor, *, learning_rate: float) -> None:
        """Follow the gradient of a loss (0-dim) once."""
        set_learning_rate(self.optimizer, learning_rate)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        trained = (p for group in self.optimizer.param_groups for p in group["params"])
        clip_gradients(trained, self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def tensors(self) -> Parts:
        """Return weights, trainable or not, and the optimiser's tensors; not copies."""
        tensors, _ = optimizer_tensors(self.optimizer, self._names())
        return {
            self.name: {name: weight.detach() for name, weight in self.parameters.items()},
            f"{self.name}_optimizer": tensors,
        }

    def state(self) -> dict[str, Any]:
        """Return the numbers next to them, as JSON."""
        _, numbers = optimizer_tensors(self.optimizer, self._names())
        return {self.name: {"optimizer": numbers, "scaler": self.scaler.state_dict()}}

    def load(self, tensors: Parts, state: Mapping[str, Any]) -> None:
        """Take both back; ValueError names what does not fit."""
        load_parameters(self.parameters, tensors[self.name])
        saved = state[self.name]
        own = tensors.get(f"{self.name}_optimizer", {})
        load_optimizer_tensors(self.optimizer, self._names(), own, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.parameters.items()}
