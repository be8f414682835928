"""One optimiser step, and what must survive between two: weights, optimiser, EMA, scaler.

A step is (Ho et al. 2020, Alg. 1) on latents, with captions dropped for guidance. Where the loss or
a gradient is no number, the update is skipped on the device: the host never waits within a step.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.diffusion.ddpm import q_sample
from latentdiff.diffusion.guidance import drop_captions
from latentdiff.diffusion.loss_weighting import loss_weights
from latentdiff.diffusion.objectives import (
    offset_noise,
    per_sample_loss,
    perturb_input,
    variance_loss,
)
from latentdiff.diffusion.prediction import target
from latentdiff.diffusion.schedules import Schedule
from latentdiff.diffusion.timesteps import LossSecondMomentSampler, TimestepSampler
from latentdiff.evaluation.metrics.heldout_loss import NUM_BUCKETS
from latentdiff.training.learned_variance import VLB_WEIGHT
from latentdiff.training.model import TextToImage
from latentdiff.training.optim.ema import Ema
from latentdiff.training.optim.optimizer import (
    OptimizerName,
    build_optimizer,
    clip_gradients,
    learning_rate,
    parameter_groups,
    step_if_finite,
)
from latentdiff.training.optim.posthoc_ema import PosthocEma, gamma_of
from latentdiff.training.optim.state import load_optimizer_tensors, optimizer_tensors


@dataclass(frozen=True)
class Objective:
    """What the loss is made of, on the device: see config.DiffusionConfig for the meaning."""

    schedule: Schedule
    prediction_type: str
    null_text: Tensor  # (1, L) ids or (1, L, D) states
    sample_timesteps: TimestepSampler
    weighting: str = "none"
    snr_gamma: float | None = None  # None: the weighting's own
    huber_delta: float | None = None  # None: squared errors
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    learned_variance: bool = False

    @property
    def loss_aware(self) -> LossSecondMomentSampler | None:
        """The timestep sampler whose history is part of a run's state; None for any other."""
        sampler = self.sample_timesteps
        return sampler if isinstance(sampler, LossSecondMomentSampler) else None

    def text_with_dropout(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the captions' ids or states with dropped ones replaced by the null caption."""
        text, dropped = batch["text"], batch["dropped"]
        if text.ndim == 3:
            return drop_captions(text, self.null_text, dropped)
        return torch.where(dropped[:, None], self.null_text, text)

    def losses(self, model: Any, batch: Mapping[str, Tensor], *, count: int) -> "Losses":
        """Return the weighted loss of each sample, of `count` in the whole step.

        Where the batch has a mask (B, 1, h, w), a sample's loss is the mean over what it keeps.
        """
        z0, eps = batch["z0"], batch["eps"]
        t, importance_weight = self.sample_timesteps(batch["u"], batch["index_in_step"], count)
        if self.offset_noise:
            eps = offset_noise(eps, batch["offset"], strength=self.offset_noise)
        zt = q_sample(self.schedule, z0, t, eps)
        if self.input_perturbation:
            strength = self.input_perturbation
            zt = perturb_input(self.schedule, zt, t, batch["perturbation"], strength=strength)
        output = model(zt, t, self.text_with_dropout(batch))
        wanted = target(self.schedule, z0, eps, t, prediction_type=self.prediction_type)
        weights = loss_weights(
            self.schedule,
            t,
            prediction_type=self.prediction_type,
            weighting=self.weighting,
            gamma=self.snr_gamma,
        )
        loss = weights * per_sample_loss(
            output[:, : z0.shape[1]],
            wanted,
            huber_delta=self.huber_delta,
            mask=batch.get("mask"),
        )
        if self.learned_variance:
            loss = loss + VLB_WEIGHT * variance_loss(
                self.schedule, output, z0, zt, t, prediction_type=self.prediction_type
            )
        return Losses(loss, t, importance_weight)


class Losses(NamedTuple):
    """What a forward pass gives, by sample: (B,) each."""

    loss: Tensor  # float32, with the objective's weight of its timestep
    t: Tensor
    importance_weight: Tensor  # what makes up for timesteps drawn unevenly


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for the log, all on the device and of this process alone."""

    loss: Tensor  # 0-dim: this process's part of the mean over the whole batch
    grad_norm: Tensor  # 0-dim, before clipping
    ok: Tensor  # 0-dim bool: the update was done
    bucket_losses: Tensor  # (NUM_BUCKETS,) sums, by importance
    bucket_counts: Tensor  # (NUM_BUCKETS,) sums of importance
    indices: Tensor  # (n,) on the CPU: the samples that were used


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate by optimiser step."""

    base: float
    text_base: float
    schedule: str
    lr_warmup_steps: int
    max_steps: int

    def at(self, step: int, *, text: bool = False) -> float:
        """Return the rate of optimiser step `step`, of the U-Net or the text encoder."""
        return learning_rate(
            step,
            base=self.text_base if text else self.base,
            schedule=self.schedule,  # type: ignore[arg-type]  # checked by the config
            lr_warmup_steps=self.lr_warmup_steps,
            max_steps=self.max_steps,
        )


class TrainStep:
    """The state of training and the step that changes it."""

    def __init__(
        self,
        model: TextToImage,
        *,
        objective: Objective,
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
    ) -> None:
        self.accelerator, self.objective, self.lr_schedule = accelerator, objective, lr_schedule
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.wrapped = accelerator.prepare(model)
        self.model = model
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        groups = self._groups(weight_decay, optimizer)
        self.optimizer = build_optimizer(groups, name=optimizer, lr=lr_schedule.base, betas=betas)
        self.ema = None
        if ema_decay is not None:
            self.ema = Ema(model, decay=ema_decay, device=ema_device)
        self.posthoc_emas = {
            width: PosthocEma(model, gamma=gamma_of(width), device=ema_device)
            for width in posthoc_ema_sigma_rel
        }
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=fp16)
        self.skipped = 0  # updates skipped up to the last look, which hold the rate back

    def step(
        self, batches: Iterator[dict[str, Tensor]], *, step: int, count: int, accumulation: int
    ) -> StepResult:
        """Do optimiser step `step` on its micro-batches, which hold `count` samples in all."""
        self.set_learning_rates(step)
        torch.manual_seed(hash((self.seed, step, self.accelerator.process_index)) & 0x7FFFFFFF)
        world, device = self.accelerator.num_processes, self.accelerator.device
        total = torch.zeros((), device=device)
        sums, counts = (torch.zeros(NUM_BUCKETS, device=device) for _ in range(2))
        indices: list[Tensor] = []
        seen: list[Losses] = []
        for accumulated in range(accumulation):
            batch = next(batches)
            indices.append(batch["index"])
            batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
            last = accumulated == accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                losses = self.objective.losses(self.wrapped, batch, count=count)
                weight = losses.importance_weight * batch["weight"]
                loss = (losses.loss * weight).sum() / count
                self.scaler.scale(loss * world).backward()  # DDP takes the mean over processes
            total += loss.detach()
            seen.append(losses._replace(loss=losses.loss.detach()))
            bucket = losses.t * NUM_BUCKETS // self.objective.schedule.num_timesteps
            sums.index_add_(0, bucket, seen[-1].loss * weight)
            counts.index_add_(0, bucket, weight)
        norm, ok = self._update()
        self.update_timestep_history(seen, ok, count=count)
        return StepResult(total, norm, ok, sums, counts, torch.cat(indices))

    def _update(self) -> tuple[Tensor, Tensor]:
        """Clip, step and average where every gradient is a number; return the norm and whether."""
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters.values(), self.max_grad_norm or None)
        ok = torch.isfinite(norm)
        step_if_finite(self.optimizer, ok)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self._averages().values():
            average.update(ok)
        return norm, ok

    def update_timestep_history(self, seen: Sequence[Losses], ok: Tensor, *, count: int) -> None:
        """Add a step's losses to the history that timesteps are drawn by, as one process would."""
        if self.objective.loss_aware is None:
            return
        mine = torch.stack([torch.stack([losses.t.float(), losses.loss]) for losses in seen])
        everyone = self.accelerator.gather(mine[None])  # (processes, accumulation, 2, micro-batch)
        # The order of samples.StepSlots, in which the padding comes last.
        t, losses = everyone.permute(2, 1, 0, 3).flatten(1)[:, :count]
        self.objective.loss_aware.update(t.long(), losses, ok)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint holds as tensors, by part and name; not copies."""
        optimizer, _ = optimizer_tensors(self.optimizer, self._names())
        parts = {
            "model": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": optimizer,
        }
        parts |= {name: average.state_dict() for name, average in self._averages().items()}
        if self.objective.loss_aware is not None:
            parts["timesteps"] = self.objective.loss_aware.state_dict()
        return parts

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds as JSON."""
        _, optimizer = optimizer_tensors(self.optimizer, self._names())
        return {
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load(self, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Take a checkpoint's state back; ValueError names what does not fit."""
        saved = tensors["model"]
        if saved.keys() != self.parameters.keys():
            differing = sorted(saved.keys() ^ self.parameters.keys())
            raise ValueError(f"the checkpoint's weights are not this model's: {differing[:8]}")
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                if saved[name].shape != parameter.shape:
                    raise ValueError(
                        f"{name} is {tuple(saved[name].shape)} in the checkpoint, "
                        f"expected {tuple(parameter.shape)}"
                    )
                parameter.copy_(saved[name])
        load_optimizer_tensors(
            self.optimizer, self._names(), tensors["optimizer"], state["optimizer"]
        )
        for name, average in self._averages().items():
            if name not in tensors:
                raise ValueError(
                    f"the checkpoint holds no {name}: its run did not keep that average; leave "
                    "train.ema and train.posthoc_ema_sigma_rel as they were"
                )
            average.load_state_dict(tensors[name])
        if self.objective.loss_aware is not None:
            self.objective.loss_aware.load_state_dict(tensors.get("timesteps", {}))
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]

    def _groups(self, weight_decay: float, name: OptimizerName) -> list[dict[str, Any]]:
        """Return the optimiser's groups; those of the text encoder are marked."""
        parts: list[tuple[nn.Module, bool]] = [(self.model.unet, False)]
        if self.model.text_encoder is not None:
            parts.append((self.model.text_encoder, True))
        return [
            group | {"is_text": is_text}
            for part, is_text in parts
            for group in parameter_groups(part, weight_decay=weight_decay, name=name)
        ]

    def _averages(self) -> dict[str, Ema | PosthocEma]:
        """Return the averages by the name of their part of a checkpoint."""
        named: dict[str, Ema | PosthocEma] = {} if self.ema is None else {"ema": self.ema}
        return named | {
            f"power_ema_{width:g}".replace(".", "p"): average
            for width, average in self.posthoc_emas.items()
        }

    def set_learning_rates(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_schedule.at(step - self.skipped, text=group["is_text"])

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.parameters.items()}
