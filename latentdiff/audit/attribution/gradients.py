"""The gradients of an image's loss in all weights that train, at fixed timesteps and noise.

Every image is measured at the same timesteps, in the middles of equal strata, and with the same
noise, so that gradients differ by the images and captions alone. Gradients of millions of weights
are projected to some thousand numbers by a random projection that keeps inner products.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from latentdiff.evaluation.metrics.heldout_loss import stratified_timesteps
from latentdiff.models.conditioning import Conditioning
from latentdiff.training.text_to_image.objective import Objective
from latentdiff.training.text_to_image.train_step import TrainStep

Measured = Literal["loss", "square"]  # the loss, or the mean square of the model's output


@dataclass(frozen=True, eq=False)
class Sample:
    """An image as the loss reads it: z0 (C, h, w), its caption's conditioning, mask (1, h, w)."""

    z0: Tensor
    text: Conditioning
    mask: Tensor | None = None


class RandomProjection:
    """CountSketch: each number is added, with a random sign, to one of `size` sums.

    Inner products are kept on average, with a variance of at most 2 |x|^2 |y|^2 / size (Charikar et
    al. 2002; Weinberger et al. 2009, "Feature hashing for large scale multitask learning",
    Lemma 2). Costs one addition a number, and 4 bytes.
    """

    def __init__(
        self, sizes: Sequence[int], *, size: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        """sizes: numbers of elements of the tensors that are projected together."""
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        self._places = [
            torch.randint(2 * size, (num,), generator=generator, dtype=torch.int32).to(device)
            for num in sizes
        ]

    def __call__(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the projection of tensors, (size,) float32; None counts as zeros."""
        sums = torch.zeros(2 * self.size, device=self._places[0].device)
        for tensor, places in zip(tensors, self._places, strict=True):
            if tensor is not None:
                sums.index_add_(0, places, tensor.detach().reshape(-1).float())
        return sums[: self.size] - sums[self.size :]


class SampleGradients:
    """Measures projected gradients of single images by the model of a train step, as it is now."""

    def __init__(
        self, train_step: TrainStep, *, draws: int, size: int, seed: int, draws_at_once: int = 16
    ) -> None:
        """draws: timesteps of each image; size: numbers that gradients are projected to."""
        assert isinstance(train_step.objective, Objective)  # no distillation
        self.train_step, self.seed, self.draws_at_once = train_step, seed, draws_at_once
        device = train_step.accelerator.device
        self._t = stratified_timesteps(draws, train_step.objective.schedule.num_timesteps)
        self._objective = replace(
            train_step.objective,
            sample_timesteps=self._fixed_timesteps,
            offset_noise=0.0,
            input_perturbation=0.0,
        )
        self._parameters = list(train_step.parameters.values())
        sizes = [parameter.numel() for parameter in self._parameters]
        self.project = RandomProjection(sizes, size=size, seed=seed, device=device)

    def of(self, sample: Sample, measured: Sequence[Measured]) -> dict[Measured, Tensor]:
        """Return the projected gradient of each measured mean over the draws, (size,) on the CPU.

        FloatingPointError where one is not finite.
        """
        model, count = self.train_step.model, len(self._t)
        found = dict.fromkeys(measured, torch.zeros(()))
        was_training, _ = model.training, model.eval()
        for draws in torch.arange(count).split(self.draws_at_once):
            values = self._values(sample, draws)
            for k, name in enumerate(measured):
                gradients = torch.autograd.grad(
                    values[name].sum() / count,
                    self._parameters,
                    retain_graph=k + 1 < len(measured),
                    allow_unused=True,
                )
                found[name] = found[name] + self.project(gradients).cpu()
        model.train(was_training)
        if not all(bool(one.isfinite().all()) for one in found.values()):
            raise FloatingPointError("a gradient became NaN or Inf; is the checkpoint damaged?")
        return found

    @torch.no_grad()
    def losses(self, sample: Sample) -> Tensor:
        """Return the loss of an image at each of the timesteps, (draws,) on the CPU."""
        model = self.train_step.model
        was_training, _ = model.training, model.eval()
        parts = torch.arange(len(self._t)).split(self.draws_at_once)
        losses = torch.cat([self._values(sample, draws)["loss"].cpu() for draws in parts])
        model.train(was_training)
        return losses

    def _values(self, sample: Sample, draws: Tensor) -> dict[Measured, Tensor]:
        """Return loss and mean squared output of an image at some of the draws, (n,) each."""
        accelerator, outputs = self.train_step.accelerator, list[Tensor]()
        batch = {name: x.to(accelerator.device) for name, x in self._batch(sample, draws).items()}

        def model(zt: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            outputs.append(self.train_step.model(zt, t, conditioning))
            return outputs[-1]

        with accelerator.autocast():
            losses = self._objective.losses(model, batch, count=len(self._t))
        channels = sample.z0.shape[0]  # without a learned variance
        square = outputs[-1][:, :channels].float().square().mean((1, 2, 3))
        return {"loss": losses.loss, "square": square}

    def _batch(self, sample: Sample, draws: Tensor) -> dict[str, Tensor]:
        num, shape = len(draws), sample.z0.shape
        generator = torch.Generator().manual_seed(self.seed)
        eps = torch.randn(len(self._t), *shape, generator=generator)[draws]
        masks = {} if sample.mask is None else {"mask": sample.mask.expand(num, 1, *shape[1:])}
        return {
            "z0": sample.z0.expand(num, *shape),
            "eps": eps,
            "u": torch.zeros(num),
            "stratum": draws,
            "dropped": torch.zeros(num, dtype=torch.bool),
            **sample.text.expand(num).tensors(),
            **masks,
        }

    def _fixed_timesteps(self, u: Tensor, draws: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the timesteps of draws, which stand where a sampler has the strata."""
        return self._t.to(draws.device)[draws], torch.ones_like(u)
