"""What only a GPU can show of a training step: precision, skipped updates, waits of the host."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from fakes_steps import CASES, B, batch_of, build, make_model
from torch import Tensor, nn
from transformers import CLIPTokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def seen() -> Iterator[dict[str, set[torch.dtype]]]:
    """The dtypes that layers give, by the layer's class."""
    dtypes: dict[str, set[torch.dtype]] = {}

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            dtypes.setdefault(type(layer).__name__, set()).add(output.dtype)

    hook = nn.modules.module.register_module_forward_hook(note)
    yield dtypes
    hook.remove()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("case", CASES)
def test_layers_compute_in_half_precision_and_state_is_float32(
    case: str,
    precision: str,
    tokenizer: CLIPTokenizer,
    seen: dict[str, set[torch.dtype]],
) -> None:
    built = build(make_model(case, tokenizer), Accelerator(mixed_precision=precision))
    batch = batch_of(built.model)
    if built.encoder is not None:
        built.encoder.encode(batch, device=built.step.accelerator.device)
    seen.clear()
    result = built.step.step(iter([batch]), step=0, count=B, accumulation=1)
    half = torch.bfloat16 if precision == "bf16" else torch.float16
    assert half in seen["Linear"]
    assert half in seen["Conv2d"] | seen.get("LoRACompatibleConv", set())
    assert result.loss.dtype == torch.float32
    assert bool(result.ok)
    states = [x for one in built.step.optimizer.state.values() for x in one.values()]
    assert {x.dtype for x in (*built.step.parameters.values(), *states)} == {torch.float32}
    for ema in built.step.emas().values():
        assert {x.dtype for x in ema.tensors.values()} == {torch.float32}


@pytest.mark.parametrize("case", CASES)
def test_the_host_does_not_wait_within_a_step(case: str, tokenizer: CLIPTokenizer) -> None:
    built = build(make_model(case, tokenizer), Accelerator(mixed_precision="bf16"))
    for step in range(2):  # kernels are loaded, and state is made, in the first
        batch = {name: x.pin_memory() for name, x in batch_of(built.model).items()}
        torch.cuda.synchronize()
        if step:
            torch.cuda.set_sync_debug_mode("error")
        try:
            if built.encoder is not None:
                built.encoder.encode(batch, device=built.step.accelerator.device)
            built.step.step(iter([batch]), step=step, count=B, accumulation=1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_update_that_is_not_finite_is_skipped(precision: str, tokenizer: CLIPTokenizer) -> None:
    built = build(make_model("sd", tokenizer), Accelerator(mixed_precision=precision))
    batch = batch_of(built.model)
    before = {name: p.detach().clone() for name, p in built.step.parameters.items()}
    averages = {name: x.clone() for name, x in built.step.emas()["ema"].tensors.items()}
    batch["z0"][0] = float("nan")
    result = built.step.step(iter([batch]), step=0, count=B, accumulation=1)
    assert not bool(result.ok)
    assert all(torch.equal(p, before[name]) for name, p in built.step.parameters.items())
    assert all(torch.equal(x, averages[n]) for n, x in built.step.emas()["ema"].tensors.items())
