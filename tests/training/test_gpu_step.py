"""A training step on a GPU that is not there: every tensor on it, and no wait of the host for it.

Each case is a run's own train step, built by `build_train_step`, on batches as a loader gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes_gpu import CUDA, META, HostSyncs, accelerator_on, fake_gpu
from fakes_models import make_components
from fakes_steps import (
    CASES,
    FACTOR,
    SIDE,
    TOKENS,
    B,
    C,
    batch_of,
    build,
    make_model,
    run_step,
)
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import CLIPTokenizer

from latentdiff.data.cache.online_encode import OnlineLatentEncoder
from latentdiff.models.build import schedule_of
from latentdiff.models.latents import LatentCodec
from latentdiff.training.inputs.encode import OnlinePromptEmbeds
from latentdiff.training.objective import Losses, TrainingObjective


@pytest.mark.parametrize("case", CASES)
def test_step_stays_on_the_gpu_and_the_host_does_not_wait(
    case: str, tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(case, tokenizer)
    with fake_gpu(monkeypatch):
        step = (built := build(model, accelerator_on(CUDA))).step
        result, syncs = run_step(built)
    assert syncs == []
    assert {result.loss.device, result.grad_norm.device, result.ok.device} == {CUDA}
    state = [x for one in step.optimizer.state.values() for x in one.values()]
    averages = [x for ema in step.emas().values() for x in ema.state_dict().values()]
    assert state
    assert len(averages) > 0 or not built.model.config.train.ema
    tensors = [*step.model.parameters(), *step.parameters.values(), *state, *averages]
    assert {x.device for x in tensors} == {CUDA}


@pytest.mark.parametrize("case", CASES)
def test_backward_pass_needs_no_number_of_the_device(case: str, tokenizer: CLIPTokenizer) -> None:
    model = make_model(case, tokenizer)
    built = build(model, accelerator_on(META))
    batch = {name: x.to(META) for name, x in batch_of(model).items()}
    if built.encoder is not None and built.encoder.uses_vae:  # autocast does not know this device
        channels = model.components.unet.config["in_channels"] - C
        batch["condition"] = torch.zeros(B, channels, SIDE, SIDE, device=META)
    if "control" in batch:
        batch["control"] = batch["control"].float()
    losses = built.step.objective.losses(built.step.wrapped, batch, count=B)
    losses.loss.sum().backward()
    gradients = {name: p.grad for name, p in built.step.parameters.items()}
    unused = [name for name, gradient in gradients.items() if gradient is None]
    assert [name for name in unused if not name.startswith("text_encoder")] == []
    assert {x.device for x in gradients.values() if x is not None} == {META}


def test_captions_and_images_are_encoded_on_the_gpu_without_a_wait(
    tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    components, px = make_components(tokenizer), SIDE * FACTOR
    images = OnlineLatentEncoder.__new__(OnlineLatentEncoder)  # without a folder
    images.codec = LatentCodec(components.vae)
    pixels, noise = torch.zeros(B, px, px, 3, dtype=torch.uint8), torch.randn(B, C, SIDE, SIDE)
    with fake_gpu(monkeypatch):
        components.vae.to(CUDA)
        prompts = OnlinePromptEmbeds(components, CUDA)
        with HostSyncs() as syncs:
            z0 = images.encode(pixels, noise)
            text = prompts.encode(torch.ones(B, TOKENS, dtype=torch.int64))
    assert syncs.found == []
    assert {z0.device, *(x.device for x in text.tensors().values())} == {CUDA}


def test_a_table_left_on_the_cpu_is_found(
    tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("sd", tokenizer)
    with fake_gpu(monkeypatch):
        built = build(model, accelerator_on(CUDA))
        objective: Any = built.step.objective
        on_cpu = schedule_of(model.components.scheduler)
        built.step.objective = replace(objective, schedule=on_cpu)
        with pytest.raises(RuntimeError, match="same device"):
            run_step(built)


WAITS: dict[str, Callable[[Tensor], object]] = {
    "_local_scalar_dense": lambda loss: loss.sum().item(),
    "index": lambda loss: loss[loss > 0],
    "_to_copy from cuda to cpu": lambda loss: loss.cpu(),
    "_to_copy from cpu to cuda": lambda loss: torch.ones(B).to(loss),
    "copy_ from cpu to cuda": lambda loss: torch.zeros_like(loss).copy_(torch.ones(B)),
}


def test_every_wait_of_the_host_is_found(
    tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waiting:
        """An objective that waits for its losses in every way."""

        loss_aware = None

        def __init__(self, objective: TrainingObjective) -> None:
            self.objective, self.schedule = objective, objective.schedule
            self.prediction_type = objective.prediction_type

        def losses(self, model: Any, batch: Any, *, count: int) -> Losses:
            losses = self.objective.losses(model, batch, count=count)
            for wait in WAITS.values():
                with suppress(DataDependentOutputException, DynamicOutputShapeException):
                    wait(losses.loss.detach())
            with suppress(DataDependentOutputException):
                assert losses.loss.sum() > 0
            return losses

    model = make_model("sd", tokenizer)
    with fake_gpu(monkeypatch):
        built = build(model, accelerator_on(CUDA))
        built.step.objective = Waiting(built.step.objective)
        _, syncs = run_step(built)
    assert syncs == [*WAITS, "_local_scalar_dense"]
