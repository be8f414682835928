"""Latent consistency on Gaussian data, whose exact denoiser, and so consistency model, is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.distillation import consistency_scalings, consistent_x0, ddim_step
from latentdiff.diffusion.guidance import classifier_free
from latentdiff.diffusion.prediction import target
from latentdiff.diffusion.schedules import Schedule, make_betas, rescale_zero_terminal_snr
from latentdiff.models.conditioning import Conditioning
from latentdiff.training.distill.consistency import HUBER_C, Consistency

SCALE, STD = 3.0, 0.4
NUMBERS = torch.tensor([0, 1, 25, 48, 49])  # steps of the grid, the last of which ends at 0


def schedule_for(prediction_type: str) -> Schedule:
    betas = make_betas("scaled_linear")
    is_epsilon = prediction_type == "epsilon"  # which needs a signal at every step
    return Schedule.from_betas(betas if is_epsilon else rescale_zero_terminal_snr(betas))


class Gaussian:
    """Data N(m, 0.4^2), m being 0.7 of the prompt's embedding: its teacher and its student."""

    def __init__(self, prediction_type: str) -> None:
        self.prediction_type, self.schedule = prediction_type, schedule_for(prediction_type)
        self.offset = 0.0  # of the student's clean end
        self.objective = Consistency(
            self.schedule,
            prediction_type,
            self.teacher,
            Conditioning(torch.zeros(1, 1, 1)),
            sample_steps=lambda *_: (NUMBERS, torch.ones(len(NUMBERS))),
            min_guidance=SCALE,
            max_guidance=SCALE,
            averaged=self.averaged,
        )

    def output(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        signal, noise = self.factors(t)
        eps = (xt - signal * x0) / noise
        return target(self.schedule, x0, eps, t, prediction_type=self.prediction_type)

    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        tables = self.schedule.sqrt_alphas_cumprod, self.schedule.sqrt_one_minus_alphas_cumprod
        return tables[0][t].view(-1, 1, 1, 1), tables[1][t].view(-1, 1, 1, 1)

    def teacher(self, xt: Tensor, t: Tensor, text: Conditioning, scale: Any = None) -> Tensor:
        assert text.prompt_embeds is not None
        mean, (signal, noise) = 0.7 * text.prompt_embeds.view(-1, 1, 1, 1), self.factors(t)
        x0 = mean + signal * STD**2 * (xt - signal * mean) / (signal**2 * STD**2 + noise**2)
        return self.output(x0, xt, t)

    def student(self, xt: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """The output that the consistency function makes the end of the guided DDIM chain."""
        path, z, at = self.objective.path, xt.double(), t.clone()
        null = Conditioning(torch.zeros_like(text.prompt_embeds))  # type: ignore[arg-type]
        for k in range(len(path) - 1):
            guided = classifier_free(self.teacher(z, at, null), self.teacher(z, at, text), SCALE)
            to = torch.where(at == path[k], path[k + 1], at)
            moved = ddim_step(
                self.schedule, guided, z, at, to, prediction_type=self.prediction_type
            )
            z, at = torch.where((at == path[k]).view(-1, 1, 1, 1), moved, z), to
        skip, out = consistency_scalings(t, like=z)
        x0 = torch.where(out > 0, (z + self.offset - skip * xt) / out.clamp(min=1e-9), 0.0)
        return self.output(x0, xt.double(), t)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        kept, self.offset = self.offset, 0.0
        yield
        self.offset = kept


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = len(NUMBERS), 2, 3, 3
    z0, eps = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    text, ones = torch.ones(len(NUMBERS), 1, 1), torch.ones(len(NUMBERS))
    return {"z0": z0, "eps": eps, "prompt_embeds": text, "guidance": ones} | dict.fromkeys(
        ("u", "stratum"), ones
    )


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_the_map_to_the_end_of_the_guided_chain_has_no_loss(prediction_type: str) -> None:
    world = Gaussian(prediction_type)
    losses = world.objective.losses(world.student, batch(), count=5)
    assert losses.t.tolist() == [999, 979, 499, 39, 19]
    assert losses.loss.max() < 1e-4
    world.objective.min_guidance = world.objective.max_guidance = 2 * SCALE
    assert world.objective.losses(world.student, batch(), count=5).loss.max() > 1e-2


def test_an_error_counts_against_the_averaged_weights_by_the_pseudo_huber_loss() -> None:
    world = Gaussian("v_prediction")
    world.offset = 0.1
    losses = world.objective.losses(world.student, batch(), count=5).loss
    expected = (0.1**2 + HUBER_C**2) ** 0.5 - HUBER_C
    torch.testing.assert_close(losses, torch.full((5,), expected), rtol=1e-3, atol=0)


def test_a_clean_sample_is_its_own_end() -> None:
    schedule, xt = schedule_for("v_prediction"), torch.randn(2, 4, 3, 3)
    t = torch.zeros(2, dtype=torch.int64)
    end = consistent_x0(schedule, torch.randn_like(xt), xt, t, prediction_type="v_prediction")
    assert torch.equal(end, xt)
