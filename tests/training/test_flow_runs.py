"""Rectified flow as an objective: from scratch, converted from epsilon, sampled by stock."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from fakes_finetune import finetuning, open_ours
from fakes_training import make_config, read_metrics

from latentdiff.models.build import schedule_of
from latentdiff.models.components import load_components
from latentdiff.pipeline.schedulers import make_scheduler
from latentdiff.training.text_to_image.components import pretrained_components
from latentdiff.training.text_to_image.train_t2i import train

FLOW = "flow_prediction"


@pytest.fixture(scope="module")
def flow_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from scratch that predicts rectified flow, at logit-normal timesteps."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = tmp_path_factory.mktemp("flow") / "run"
    settings = {
        "diffusion__prediction_type": FLOW,
        "diffusion__timestep_sampling": "logit_normal",
        "train__max_steps": 2,
    }
    assert train(make_config(world, run, **settings)) == 0
    return run


def test_run_exports_what_stock_diffusers_samples_as_we_do(flow_run: Path) -> None:
    folder = flow_run / "pipeline"
    assert set(read_metrics(flow_run, "heldout_loss"))
    stock = StableDiffusionPipeline.from_pretrained(folder)
    ours = open_ours(folder)
    assert type(stock.scheduler).__name__ == "UniPCMultistepScheduler"
    assert stock.scheduler.config.use_flow_sigmas
    prompt, options = "a red circle", {"num_inference_steps": 3, "guidance_scale": 2.0}
    for name in ("unipc", "dpm++2m"):
        ours.set_scheduler(name)
        if name == "dpm++2m":
            stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
        a, b = (
            pipe(
                prompt, generator=torch.Generator().manual_seed(0), output_type="np", **options
            ).images[0]
            for pipe in (stock, ours)
        )
        assert np.abs(a - b).max() < 1 / 255


def test_other_samplers_are_refused_by_name(flow_run: Path) -> None:
    scheduler = load_components(flow_run / "pipeline").scheduler
    for name in ("ddim", "euler", "lcm"):
        with pytest.raises(ValueError, match=r"rectified flow.*unipc"):
            make_scheduler(name, trained=scheduler)
    for name in ("unipc", "dpm++2m", "dpm++2m-sde", "dpm++2s", "deis", "unipc-karras"):
        assert schedule_of(make_scheduler(name, trained=scheduler)).is_flow


def test_img2img_noises_along_the_path(flow_run: Path) -> None:
    ours, image = open_ours(flow_run / "pipeline"), np.full((32, 32, 3), 200, np.uint8)
    made = ours("a red circle", image=image, strength=0.5, num_inference_steps=4, seed=0).images[0]
    assert made.size == (32, 32)


def test_card_names_the_node_that_comfyui_needs(flow_run: Path) -> None:
    assert "ModelSamplingSD3" in (flow_run / "pipeline" / "README.md").read_text()


def test_epsilon_model_becomes_one_of_flow_and_not_back(
    world: Path, flow_run: Path, tmp_path: Path
) -> None:
    config = finetuning(world, tmp_path / "to_flow", diffusion__prediction_type=FLOW)
    components = pretrained_components(config)
    assert components.scheduler.config["prediction_type"] == FLOW
    assert schedule_of(components.scheduler).is_flow
    back = finetuning(
        world,
        tmp_path / "back",
        model__pretrained=flow_run / "pipeline",
        diffusion__prediction_type="epsilon",
    )
    with pytest.raises(ValueError, match="rectified flow, which has no betas"):
        pretrained_components(back)


def test_model_is_fine_tuned_to_v_and_zero_terminal_snr(world: Path, tmp_path: Path) -> None:
    config = finetuning(
        world,
        tmp_path / "run",
        diffusion__prediction_type="v_prediction",
        diffusion__zero_terminal_snr="true",
    )
    scheduler = pretrained_components(config).scheduler
    assert float(schedule_of(scheduler).alphas_cumprod[-1]) == pytest.approx(0, abs=1e-12)
    assert scheduler.config["timestep_spacing"] == "trailing"
    refused = finetuning(world, tmp_path / "run", diffusion__zero_terminal_snr="true")
    with pytest.raises(ValueError, match="zero-terminal-SNR"):
        pretrained_components(refused)


@pytest.mark.parametrize(
    "other",
    [
        {"diffusion__zero_terminal_snr": "true"},
        {"diffusion__beta_schedule": "cosine"},
        {"diffusion__learned_variance": "true"},
    ],
)
def test_settings_of_a_ddpm_chain_are_refused_with_flow(
    world: Path, tmp_path: Path, other: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"flow"):
        make_config(world, tmp_path / "run", diffusion__prediction_type=FLOW, **other)
