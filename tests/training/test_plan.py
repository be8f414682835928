"""What is said before training: parameters by part, memory that is there in the end, time left."""

import gc
import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from fakes_data import save_image
from fakes_memory import allocated_peak
from fakes_models import make_vae
from fakes_training import make_config, make_world
from torch import Tensor, nn

from latentdiff.config.diffusion import DiffusionConfig
from latentdiff.config.model import ConditionConfig
from latentdiff.config.text_to_image import Config
from latentdiff.models.build import build_unet
from latentdiff.pipeline.files.model_card import model_card
from latentdiff.pipeline.files.model_info import ModelInfo
from latentdiff.training.distributed import start_accelerator
from latentdiff.training.inputs.batches import BatchLayout
from latentdiff.training.metrics_log import log_throughput
from latentdiff.training.optim.memory import optimizer_bytes
from latentdiff.training.text_to_image import memory, plan
from latentdiff.training.text_to_image.memory import estimate_activations
from latentdiff.training.text_to_image.setup import setup
from latentdiff.training.text_to_image.train_t2i import train

CHANNELS, LATENT_SIZE = 4, 16


class Denoiser(nn.Module):
    """A U-Net as TextToImage has it."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = build_unet(
            sample_size=LATENT_SIZE,
            in_channels=CHANNELS,
            block_out_channels=(32, 64),
            attention_levels=(False, True),
            layers_per_block=1,
            head_dim=16,
            cross_attention_dim=24,
        )

    def forward(self, zt: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.unet(zt, t, text, return_dict=False)[0]


def inputs(n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.zeros(n, CHANNELS, LATENT_SIZE, LATENT_SIZE),
        torch.zeros(n, dtype=torch.int64),
        torch.zeros(n, 7, 24),
    )


def measured_peak(model: nn.Module, arguments: tuple[Tensor, ...], *, precision: str) -> int:
    """Run a real pass, and read its peak off PyTorch's own record of what is allocated."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def work() -> None:
        with autocast(precision):
            output = model(*arguments)
        output.float().square().mean().backward()

    return allocated_peak(work)


def autocast(precision: str):
    return nullcontext() if precision == "fp32" else torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_estimated_activations_are_those_a_real_pass_allocates(
    precision: str, checkpointing: bool
) -> None:
    model = Denoiser().train()
    if checkpointing:
        model.unet.enable_gradient_checkpointing()
    estimate = estimate_activations(
        model, inputs, autocast=lambda: autocast(precision), accumulates=True
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    peak = measured_peak(model, inputs(), precision=precision)
    print(f"{precision} {checkpointing=}: estimated {estimate:,}, measured {peak:,}")
    assert estimate == pytest.approx(peak, rel=0.1)


def test_memory_of_earlier_work_is_no_part_of_a_peak() -> None:
    class Cycle:
        def __init__(self) -> None:
            self.itself, self.tensor = self, torch.zeros(1_000_000)

    def collects() -> None:
        numbers = torch.zeros(100_000)
        gc.collect()
        torch.zeros_like(numbers)

    gc.disable()
    try:
        assert allocated_peak(Cycle) == 4_000_000
        assert allocated_peak(collects) == 800_000
    finally:
        gc.enable()


def test_estimate_draws_nothing_and_leaves_the_model_as_it_is() -> None:
    model = Denoiser().train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    estimate_activations(model, inputs, autocast=nullcontext)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_eight_bits_take_a_quarter_of_the_state_of_large_parameters() -> None:
    groups = [
        {"params": [torch.zeros(100, 100)], "orthogonal": True},
        {"params": [torch.zeros(10)]},
    ]
    plain = [{"params": group["params"]} for group in groups]
    assert optimizer_bytes(plain, name="adamw") == 2 * 4 * 10_010
    assert optimizer_bytes(plain, name="adamw8bit") == 2 * 10_000 + 2 * 4 * 10
    assert optimizer_bytes(groups, name="muon") == 4 * 10_000 + 2 * 4 * 10


def test_throughput_gives_the_time_that_the_rest_takes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log_throughput(10.0, num_images=10 * (2 * 3600 + 5 * 60 + 30))
    assert "10 images/s: the rest takes about 2 h 5 min" in caplog.text


def test_plan_is_logged_before_the_first_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    caplog.set_level(logging.INFO)
    config = make_config(make_world(tmp_path), tmp_path / "run", train__max_steps=2)
    save_image(Path(config.data.root) / "samples" / "sheet.png")
    assert train(config) == 0
    vae = sum(parameter.numel() for parameter in make_vae().parameters())
    for message in (
        "training images: ",
        "by-product, not used: samples/sheet.png",
        "parameters: U-Net 0.4 M trained; text encoder 31,200 trained",
        f"VAE {vae:,} frozen",
        "activations of 4 at once",
        "images/s: the rest takes about 0 s",
    ):
        assert message in caplog.text
    messages = [record.getMessage() for record in caplog.records]
    assert messages.index(next(m for m in messages if m.startswith("memory of a"))) < (
        messages.index(next(m for m in messages if "images/s" in m))
    )


@pytest.mark.parametrize(("fraction", "level"), [(0.0, "INFO"), (1e-6, "WARNING")])
def test_no_heldout_image_is_a_warning_only_where_some_are_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fraction: float, level: str
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    caplog.set_level(logging.INFO)
    world = make_world(tmp_path)
    data = {"data__root": world / "data" / "train", "data__heldout_fraction": fraction}
    config = make_config(world, tmp_path / "run", train__max_steps=1, **data)
    assert train(config) == 0
    [record] = [one for one in caplog.records if "no held-out loss" in one.getMessage()]
    assert record.levelname == level
    assert "training images: 10 in train\n" in caplog.text  # the root's own name, not "."
    assert "steps 0 to 1, 4 images a step, " in caplog.text


def test_micro_batch_is_halved_until_its_memory_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "activations_of", lambda run: run.layout.micro_batch_size * 10**6)
    world = make_world(tmp_path)
    config = make_config(world, tmp_path / "run", train__batch_size=7)
    run = setup(config, tmp_path / "run", start_accelerator(config))
    needed = memory.estimate_memory(run).on_device

    def sizes(available: int | None, *, given: int = 0) -> tuple[int, int]:
        settings = replace(config, train=replace(config.train, micro_batch_size=given))
        layout = BatchLayout.of(7, given, 1)
        fitted = memory.fitting_layout(
            replace(run, config=settings, layout=layout), available=available
        )
        return fitted.micro_batch_size, fitted.accumulation

    assert sizes(None) == sizes(needed) == (7, 1)
    assert sizes(needed - 1) == sizes(needed - 3 * 10**6) == (4, 2)
    assert sizes(needed - 5 * 10**6) == (2, 4)
    assert sizes(1) == (1, 7)
    assert sizes(1, given=4) == (4, 2)


@pytest.mark.parametrize(
    ("caption_dropout", "dropout", "named"),
    [(0.1, 0.1, ""), (0.1, 0.0, "condition.dropout=0"), (0.0, 0.1, "caption_dropout=0")],
)
def test_edits_without_dropout_are_a_warning_and_a_line_of_the_card(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    caption_dropout: float,
    dropout: float,
    named: str,
) -> None:
    config = Config(
        diffusion=DiffusionConfig(caption_dropout=caption_dropout),
        condition=ConditionConfig(kind="instruct_pix2pix", dropout=dropout),
    )
    plan.warn_of_dropout(config)
    assert (named in caplog.text) if named else not caplog.text
    info = ModelInfo(
        caption_dropout=caption_dropout,
        condition_kind="instruct_pix2pix",
        condition_dropout=dropout,
    )
    card = model_card(info, name="edits").replace("\\", "")
    assert f"| Condition dropout | {dropout} |" in card
    assert (named in card) if named else "| Guidance |" not in card
