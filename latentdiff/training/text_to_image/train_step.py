"""One optimiser step, and the state that must survive between two: weights, optimiser, EMA, scaler.

Loss and gradients of the micro-batches, clipping, update, EMA; the loss itself is objective.py's.
Where the loss or a gradient is not finite, the update is skipped on the device: the host never
waits within a step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.config.choices import OptimizerName
from latentdiff.evaluation.metrics.heldout_loss import NUM_BUCKETS
from latentdiff.models.unet.guidance_embedding import PROJECTION
from latentdiff.training.objective import TrainingObjective
from latentdiff.training.optim.ema import Ema
from latentdiff.training.optim.gradients import clip_gradients, step_if_finite
from latentdiff.training.optim.lr import LRSchedule
from latentdiff.training.optim.optimizer import (
    build_optimizer,
    parameter_groups,
    with_lr_factor,
)
from latentdiff.training.optim.parameter_step import BackwardStep, ParameterStep
from latentdiff.training.optim.posthoc_ema import PosthocEma, gamma_of
from latentdiff.training.optim.state import (
    load_optimizer_tensors,
    load_parameters,
    optimizer_tensors,
)
from latentdiff.training.text_to_image.model import TextToImage


@dataclass(frozen=True)
class StepResult:
    """The figures of a step for the log, all on the device and of this process alone."""

    loss: Tensor  # 0-dim: this process's part of the mean over the whole batch
    grad_norm: Tensor  # 0-dim, before clipping
    ok: Tensor  # 0-dim bool: the update was done
    bucket_losses: Tensor  # (NUM_BUCKETS,) weighted sums of losses by timestep
    bucket_counts: Tensor  # (NUM_BUCKETS,) sums of the weights
    indices: Tensor  # (n,) on the CPU: the samples that were used


class TrainStep:
    """The state of training and the step that changes it."""

    def __init__(
        self,
        model: TextToImage,
        *,
        objective: TrainingObjective,
        accelerator: Accelerator,
        lr_schedule: LRSchedule,
        optimizer: OptimizerName = "adamw",
        weight_decay: float,
        betas: tuple[float, float],
        max_grad_norm: float,
        ema_decay: float | None,
        posthoc_ema_sigma_rel: Sequence[float],
        ema_device: torch.device | str | None = None,
        fp16: bool,
        seed: int,
        fused_backward_pass: bool = False,
        guidance_lr_factor: float = 1.0,
    ) -> None:
        self.accelerator, self.objective, self.lr_schedule = accelerator, objective, lr_schedule
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.wrapped = accelerator.prepare(model)
        self.model = model
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        groups = self._groups(weight_decay, optimizer)
        if guidance_lr_factor != 1:
            projection = model.unet.get_parameter(PROJECTION)
            groups = with_lr_factor(groups, projection, guidance_lr_factor)
        self.optimizer = build_optimizer(groups, name=optimizer, lr=lr_schedule.base, betas=betas)
        self.ema = None
        if ema_decay is not None:
            self.ema = Ema(model, decay=ema_decay, device=ema_device)
        self.posthoc_emas = {
            sigma_rel: PosthocEma(model, gamma=gamma_of(sigma_rel), device=ema_device)
            for sigma_rel in posthoc_ema_sigma_rel
        }
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=fp16)
        self._parameter_step = ParameterStep(self.optimizer)
        self._backward_step = BackwardStep(self._parameter_step) if fused_backward_pass else None
        self._is_bf16 = any(p.dtype == torch.bfloat16 for p in self.parameters.values())
        self.skipped = 0  # updates skipped as of the last log line; they hold the schedule back

    def step(
        self, batches: Iterator[dict[str, Tensor]], *, step: int, count: int, accumulation: int
    ) -> StepResult:
        """Do optimiser step `step` on its micro-batches, which hold `count` samples in all."""
        for group in self.optimizer.param_groups:
            lr = self.lr_schedule.at(step - self.skipped, text=group["is_text"])
            group["lr"] = lr * group.get("lr_factor", 1.0)
        torch.manual_seed(hash((self.seed, step, self.accelerator.process_index)) & 0x7FFFFFFF)
        if self._backward_step is not None:
            return self._step_in_backward(next(batches), self._backward_step, step, count=count)
        passes = [
            self._backward(next(batches), count=count, is_last=k == accumulation - 1)
            for k in range(accumulation)
        ]
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_gradients(self.parameters.values(), self.max_grad_norm or None)
        ok = torch.isfinite(grad_norm)
        self._step_if_finite(ok, step)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for ema in self.emas().values():
            ema.update(ok)
        self._update_timestep_history(passes, ok, count=count)
        return _step_result(
            passes, grad_norm, ok, num_timesteps=self.objective.schedule.num_timesteps
        )

    def _step_if_finite(self, ok: Tensor, step: int) -> None:
        """Update the weights where `ok` is not 0; bf16 ones by rounding that (seed, step) keys."""
        if not self._is_bf16:
            step_if_finite(self.optimizer, ok)
        elif bool(ok):
            self._parameter_step.step_all(seed=hash((self.seed, step)))

    def _step_in_backward(
        self, batch: dict[str, Tensor], backward_step: BackwardStep, step: int, *, count: int
    ) -> StepResult:
        """Update each weight within the backward pass, unless the loss is not finite."""
        loss, done = self._loss(batch, count=count)
        ok = torch.isfinite(done.total)
        grad_norm = torch.zeros_like(done.total)
        if bool(ok):  # the host waits: nothing can be undone later
            grad_norm = backward_step.run(loss, seed=hash((self.seed, step)))
        for ema in self.emas().values():
            ema.update(ok)
        self._update_timestep_history([done], ok, count=count)
        num_timesteps = self.objective.schedule.num_timesteps
        return _step_result([done], grad_norm, ok, num_timesteps=num_timesteps)

    def _backward(self, batch: dict[str, Tensor], *, count: int, is_last: bool) -> "_Pass":
        """Add a micro-batch's part of the gradient; processes exchange gradients in the last."""
        accelerator = self.accelerator
        with nullcontext() if is_last else accelerator.no_sync(self.wrapped):
            loss, done = self._loss(batch, count=count)
            # DDP takes the mean over processes
            self.scaler.scale(loss * accelerator.num_processes).backward()
        return done

    def _loss(self, batch: dict[str, Tensor], *, count: int) -> tuple[Tensor, "_Pass"]:
        """Return a micro-batch's part of the mean loss, and its figures."""
        indices, device = batch["index"], self.accelerator.device
        batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
        losses = self.objective.losses(self.wrapped, batch, count=count)
        weight = losses.importance_weight * batch["weight"]
        loss = (losses.loss * weight).sum() / count
        return loss, _Pass(losses.t, losses.loss.detach(), weight, loss.detach(), indices)

    def _update_timestep_history(
        self, passes: Sequence["_Pass"], ok: Tensor, *, count: int
    ) -> None:
        """Add a step's losses to the history behind loss-aware timesteps, as one process would."""
        if self.objective.loss_aware is None:
            return
        own = torch.stack([torch.stack([one.t.float(), one.loss]) for one in passes])
        gathered = self.accelerator.gather(own[None])  # (processes, accumulation, 2, micro-batch)
        # The order of batches.StepBatchSampler, in which the padding comes last.
        t, losses = gathered.permute(2, 1, 0, 3).flatten(1)[:, :count]
        self.objective.loss_aware.update(t.long(), losses, ok)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of a checkpoint, by part and name; not copies."""
        optimizer, _ = optimizer_tensors(self.optimizer, self._names())
        parts = {
            "model": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": optimizer,
        }
        parts |= {name: ema.state_dict() for name, ema in self.emas().items()}
        if self.objective.loss_aware is not None:
            parts["timesteps"] = self.objective.loss_aware.state_dict()
        return parts

    def state(self) -> dict[str, Any]:
        """Return the JSON values of a checkpoint."""
        _, optimizer = optimizer_tensors(self.optimizer, self._names())
        return {
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Take a checkpoint's state back; ValueError names the entry that does not fit."""
        load_parameters(self.parameters, tensors["model"])
        load_optimizer_tensors(
            self.optimizer, self._names(), tensors["optimizer"], state["optimizer"]
        )
        for name, ema in self.emas().items():
            if name not in tensors:
                raise ValueError(
                    f"the checkpoint holds no {name}: its run did not keep that EMA; leave "
                    "train.ema and train.posthoc_ema_sigma_rel as they were"
                )
            ema.load_state_dict(tensors[name])
        if self.objective.loss_aware is not None:
            self.objective.loss_aware.load_state_dict(tensors.get("timesteps", {}))
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]

    def _groups(self, weight_decay: float, name: OptimizerName) -> list[dict[str, Any]]:
        """Return the optimiser's groups; those of the text encoder are marked."""
        parts: list[tuple[nn.Module, bool]] = [(self.model.unet, False)]
        if self.model.controlnet is not None:
            parts.append((self.model.controlnet, False))
        parts += [(text_encoder, True) for text_encoder in self.model.text_encoders]
        return [
            group | {"is_text": is_text}
            for part, is_text in parts
            for group in parameter_groups(part, weight_decay=weight_decay, name=name)
        ]

    def emas(self) -> dict[str, Ema | PosthocEma]:
        """Return the EMAs by the name of their part of a checkpoint."""
        named: dict[str, Ema | PosthocEma] = {} if self.ema is None else {"ema": self.ema}
        return named | {
            f"power_ema_{sigma_rel:g}".replace(".", "p"): ema
            for sigma_rel, ema in self.posthoc_emas.items()
        }

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.parameters.items()}


class _Pass(NamedTuple):
    """The figures of a micro-batch of B samples."""

    t: Tensor  # (B,)
    loss: Tensor  # (B,)
    weight: Tensor  # (B,), 0 for padding
    total: Tensor  # 0-dim: its part of the step's loss
    indices: Tensor  # (B,) on the CPU


def _step_result(
    passes: Sequence[_Pass], grad_norm: Tensor, ok: Tensor, *, num_timesteps: int
) -> StepResult:
    t, loss, weight, totals, indices = zip(*passes, strict=True)
    bucket, counts = torch.cat(t) * NUM_BUCKETS // num_timesteps, torch.cat(weight)
    zeros = torch.zeros(NUM_BUCKETS, device=counts.device)
    return StepResult(
        loss=sum(totals[1:], totals[0]),
        grad_norm=grad_norm,
        ok=ok,
        bucket_losses=zeros.index_add(0, bucket, torch.cat(loss) * counts),
        bucket_counts=zeros.index_add(0, bucket, counts),
        indices=torch.cat(indices),
    )
