"""Runs in less memory: they resume bit for bit, export, and refuse what they cannot keep."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from fakes_finetune import finetuning
from fakes_training import read_metrics
from safetensors.torch import load_file

from latentdiff.config.train import TrainConfig
from latentdiff.training.inputs.batches import BatchLayout
from latentdiff.training.text_to_image.memory_modes import (
    check_layout,
    check_memory_modes,
    idle_parts_on,
)
from latentdiff.training.text_to_image.train_t2i import train

BF16 = {"train__precision": "bf16"}
MODES: dict[str, dict[str, object]] = {
    "lora on a bf16 base": BF16
    | {"finetune__method": "lora", "finetune__lora_rank": 2, "train__frozen_dtype": "bf16"},
    "fused bf16": BF16
    | {
        "train__full_bf16": "true",
        "train__optimizer": "adafactor",
        "train__fused_backward_pass": "true",
        "train__max_grad_norm": 0,
        "train__gradient_checkpointing": "true",
    },
}


def _run(world: Path, folder: Path, **settings: object) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    quick = {"preview__num_steps": 1, "train__max_steps": 3}
    assert train(finetuning(world, folder, **(quick | settings))) == 0
    return folder


def _state(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:09d}"
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {f"{i} {name}": x for i, part in enumerate(parts) for name, x in part.items()}


@pytest.mark.parametrize("mode", MODES)
def test_stopped_run_continues_bit_for_bit(
    world: Path, tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = MODES[mode]
    with caplog.at_level(logging.INFO):
        whole = _run(world, tmp_path / "whole", **settings)
    stopped = _run(world, tmp_path / "run", **(settings | {"train__max_steps": 1}))
    _run(world, stopped, **settings)
    first, second = _state(whole, 3), _state(stopped, 3)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = read_metrics(whole)
    assert losses == read_metrics(stopped)
    assert len(losses) == 3
    plan = json.loads((whole / "plan.json").read_text())["memory"]
    if "fused" in mode:
        assert "taken as 0" in caplog.text
        assert plan["gradients"] < plan["weights"] / 5
    if "bf16" in mode:
        assert "bf16" in caplog.text
    saved = load_file(whole / "checkpoints" / "step-000000003" / "model.safetensors")
    expected = torch.bfloat16 if "fused" in mode else torch.float32  # of adapters
    assert {x.dtype for x in saved.values()} == {expected}
    assert (whole / "pipeline" / "unet").is_dir()


REFUSED = {
    "max_grad_norm=1 clips": {"fused_backward_pass": True},
    "micro_batch_size": {"fused_backward_pass": True, "max_grad_norm": 0.0, "micro_batch_size": 2},
    "ema_device=cpu": {"fused_backward_pass": True, "max_grad_norm": 0.0},
    "optimizer=muon.*adafactor": {"full_bf16": True, "optimizer": "muon"},
    "mixed_precision=fp32": {"frozen_dtype": "bf16", "mixed_precision": "fp32"},
    "mixed_precision=fp16": {"fused_backward_pass": True, "mixed_precision": "fp16"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_mode_cannot_keep_is_refused_by_name(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**REFUSED[message]).check()  # type: ignore[arg-type]


def test_several_processes_and_accumulation_are_refused_in_the_fused_pass() -> None:
    settings = TrainConfig(
        fused_backward_pass=True, max_grad_norm=0.0, ema=False, optimizer="adafactor"
    )
    settings.check()

    class Two(Accelerator):
        num_processes = 2  # type: ignore[assignment]

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match="start one process"):
        check_memory_modes(settings, Two(cpu=True))
    with pytest.raises(ValueError, match=r"train\.batch_size=2"):
        check_layout(settings, BatchLayout(8, 2, 1))


class _Part(torch.nn.Module):
    """A part of a model that notes where it is, and may not fit there."""

    def __init__(self, *, fits: bool) -> None:
        super().__init__()
        self.device, self.fits = torch.device("cpu"), fits

    def to(self, device: torch.device) -> "_Part":  # type: ignore[override]
        if device.type != "cpu" and not self.fits:
            raise torch.OutOfMemoryError("out of memory")
        self.device = device
        return self


def test_an_idle_part_that_does_not_fit_leaves_none_on_the_device() -> None:
    parts = _Part(fits=True), _Part(fits=True), _Part(fits=False)
    components: Any = SimpleNamespace(vae=parts[0], text_encoder=parts[1], text_encoder_2=parts[2])
    with (
        pytest.raises(torch.OutOfMemoryError),
        idle_parts_on(torch.device("meta"), components),
    ):
        pass
    assert [part.device.type for part in parts] == ["cpu"] * 3
