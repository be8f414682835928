"""One optimiser step, and what must survive between two: weights, optimiser, EMA, scaler.

A step is (Ho et al. 2020, Alg. 1) on latents, with captions dropped for guidance. Where the loss or
a gradient is no number, the update is skipped on the device: the host never waits within a step.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from latentdiff.diffusion.ddpm import Schedule, q_sample
from latentdiff.diffusion.guidance import drop_captions
from latentdiff.diffusion.objectives import loss_weights, offset_noise, per_sample_loss, target
from latentdiff.diffusion.timesteps import logit_normal_timesteps, stratify, uniform_timesteps
from latentdiff.training.components import TextToImage
from latentdiff.training.ema import Ema
from latentdiff.training.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    masked_step,
    parameter_groups,
)
from latentdiff.training.optimizer_state import load_optimizer_tensors, optimizer_tensors

NUM_BUCKETS = 4  # of timesteps, in the log


@dataclass(frozen=True)
class Objective:
    """What the loss is made of, on the device: see config.DiffusionConfig for the meaning."""

    schedule: Schedule
    prediction_type: str
    null_text: Tensor  # (1, L) ids or (1, L, D) states
    weighting: str = "none"
    weighting_gamma: float = 5.0
    timesteps: str = "uniform"
    offset_noise: float = 0.0
    batch_size: int = 1  # of a whole step, for stratified timesteps

    def timesteps_of(self, u: Tensor, place: Tensor) -> Tensor:
        """Turn uniform draws u (B,) into timesteps (B,) int64."""
        num = self.schedule.num_timesteps
        if self.timesteps == "stratified":
            u = stratify(u, place % self.batch_size, num_places=self.batch_size)
        if self.timesteps == "logit_normal":
            return logit_normal_timesteps(u, num)
        return uniform_timesteps(u, num)

    def text_of(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the captions' ids or states with dropped ones replaced by the null caption."""
        text, dropped = batch["text"], batch["dropped"]
        if text.ndim == 3:
            return drop_captions(text, self.null_text, dropped)
        return torch.where(dropped[:, None], self.null_text, text)

    def losses(self, model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the weighted loss of each sample (B,) float32 and its timestep (B,)."""
        z0, eps = batch["z0"], batch["eps"]
        t = self.timesteps_of(batch["u"], batch["place"])
        if self.offset_noise:
            eps = offset_noise(eps, batch["offset"], strength=self.offset_noise)
        zt = q_sample(self.schedule, z0, t, eps)
        output = model(zt, t, self.text_of(batch))
        wanted = target(self.schedule, z0, eps, t, prediction_type=self.prediction_type)
        weights = loss_weights(
            self.schedule,
            t,
            prediction_type=self.prediction_type,
            weighting=self.weighting,
            gamma=self.weighting_gamma,
        )
        return weights * per_sample_loss(output, wanted), t


@dataclass(frozen=True)
class StepResult:
    """What a step leaves for the log, all on the device and of this process alone."""

    loss: Tensor  # 0-dim: this process's part of the mean over the whole batch
    grad_norm: Tensor  # 0-dim, before clipping
    ok: Tensor  # 0-dim bool: the update was done
    bucket_losses: Tensor  # (NUM_BUCKETS,) sums
    bucket_counts: Tensor  # (NUM_BUCKETS,)
    indices: Tensor  # (n,) on the CPU: the samples that were used


@dataclass(frozen=True)
class RatePlan:
    """The learning rate by optimiser step."""

    base: float
    text_base: float
    schedule: str
    warmup_steps: int
    max_steps: int

    def at(self, step: int, *, text: bool = False) -> float:
        """Return the rate of optimiser step `step`, of the U-Net or the text tower."""
        return learning_rate(
            step,
            base=self.text_base if text else self.base,
            schedule=self.schedule,  # type: ignore[arg-type]  # checked by the config
            warmup_steps=self.warmup_steps,
            max_steps=self.max_steps,
        )


class Engine:
    """The state of training and the step that changes it."""

    def __init__(
        self,
        model: TextToImage,
        *,
        objective: Objective,
        accelerator: Accelerator,
        rates: RatePlan,
        weight_decay: float,
        betas: tuple[float, float],
        max_grad_norm: float,
        ema_decay: float | None,
        fp16: bool,
        seed: int,
    ) -> None:
        self.accelerator, self.objective, self.rates = accelerator, objective, rates
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.wrapped = accelerator.prepare(model)
        self.model = model
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        groups = self._groups(weight_decay)
        self.optimizer = build_optimizer(groups, name="adamw", lr=rates.base, betas=betas)
        self.ema = Ema(model, decay=ema_decay) if ema_decay is not None else None
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=fp16)
        self.skipped = 0  # updates skipped up to the last look, which hold the rate back

    def step(
        self, batches: Iterator[dict[str, Tensor]], *, step: int, count: int, accumulation: int
    ) -> StepResult:
        """Do optimiser step `step` on its micro-batches, which hold `count` samples in all."""
        self._set_rates(step)
        torch.manual_seed(hash((self.seed, step, self.accelerator.process_index)) & 0x7FFFFFFF)
        world, device = self.accelerator.num_processes, self.accelerator.device
        total = torch.zeros((), device=device)
        sums, counts = (torch.zeros(NUM_BUCKETS, device=device) for _ in range(2))
        indices = []
        for accumulated in range(accumulation):
            batch = next(batches)
            indices.append(batch["index"])
            batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
            last = accumulated == accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                losses, t = self.objective.losses(self.wrapped, batch)
                loss = (losses * batch["weight"]).sum() / count
                self.scaler.scale(loss * world).backward()  # DDP takes the mean over processes
            total += loss.detach()
            bucket = t * NUM_BUCKETS // self.objective.schedule.num_timesteps
            sums.index_add_(0, bucket, losses.detach() * batch["weight"])
            counts.index_add_(0, bucket, batch["weight"])
        norm, ok = self._update()
        return StepResult(total, norm, ok, sums, counts, torch.cat(indices))

    def _update(self) -> tuple[Tensor, Tensor]:
        """Clip, step and average where every gradient is a number; return the norm and whether."""
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters.values(), self.max_grad_norm or None)
        ok = torch.isfinite(norm)
        masked_step(self.optimizer, ok)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(ok)
        return norm, ok

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return what a checkpoint holds as tensors, by part and name; not copies."""
        optimizer, _ = optimizer_tensors(self.optimizer, self._names())
        parts = {
            "model": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": optimizer,
        }
        if self.ema is not None:
            parts["ema"] = self.ema.state_dict()
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
        if self.ema is not None:
            self.ema.load_state_dict(dict(tensors["ema"]))
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]

    def _groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimiser's groups; those of the text tower are marked."""
        groups = [
            group | {"is_text": False}
            for group in parameter_groups(self.model.unet, weight_decay=weight_decay)
        ]
        if self.model.text_encoder is not None:
            groups += [
                group | {"is_text": True}
                for group in parameter_groups(self.model.text_encoder, weight_decay=weight_decay)
            ]
        return groups

    def _set_rates(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates.at(step - self.skipped, text=group["is_text"])

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.parameters.items()}
