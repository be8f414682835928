"""A run that learns its variance: the loss, the two exports, and what is left alone."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from fakes_models import make_components
from fakes_training import make_config, make_world
from torch import Tensor
from transformers import CLIPTokenizer

from latentdiff import LatentDiffPipeline
from latentdiff.diffusion.ddpm import q_sample
from latentdiff.diffusion.losses import hybrid_loss
from latentdiff.diffusion.schedules import Schedule, make_betas
from latentdiff.diffusion.timesteps import (
    SamplingOptions,
    build_timestep_sampler,
    uniform_timesteps,
)
from latentdiff.models.components import Components, load_components, load_vae
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.unet.learned_variance import (
    fit_variance,
    prediction_only,
    without_variance,
)
from latentdiff.training.text_to_image.components import new_components, pretrained_components
from latentdiff.training.text_to_image.export import for_ancestral_sampling, for_any_scheduler
from latentdiff.training.text_to_image.objective import Objective
from latentdiff.training.text_to_image.train_t2i import train

INPUTS = {"zt": (2, 4, 8, 8), "text": (2, 16, 16)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world: Path) -> Path:
    config = make_config(world, world / "run", diffusion__learned_variance=True, train__max_steps=4)
    assert train(config) == 0
    return world / "run"


@pytest.fixture
def learned(tokenizer: CLIPTokenizer) -> Components:
    """A model whose variance channels are not what they start as."""
    components = make_components(tokenizer)
    fit_variance(components, learned=True)
    with torch.no_grad():
        components.unet.conv_out.weight[4:].normal_(0, 0.1)
    return components


def outputs(components: Components) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    zt, text = (torch.randn(*shape, generator=generator) for shape in INPUTS.values())
    with torch.no_grad():
        output: Tensor = components.unet(zt, torch.tensor([3, 700]), text, return_dict=False)[0]
    return output


def test_variance_channels_start_between_the_fixed_ones_and_leave_the_prediction(
    tokenizer: CLIPTokenizer,
) -> None:
    components = make_components(tokenizer)
    before = outputs(components)
    fit_variance(components, learned=True)
    after = outputs(components)
    torch.testing.assert_close(after[:, :4], before, rtol=1e-5, atol=1e-6)
    assert torch.equal(after[:, 4:], torch.zeros(2, 4, 8, 8))
    fit_variance(components, learned=True)
    assert outputs(components).shape[1] == 8


def test_cut_model_is_the_mean_part_exactly(learned: Components) -> None:
    cut = without_variance(learned)
    whole = outputs(learned)
    assert cut.unet.config["out_channels"] == 4
    torch.testing.assert_close(outputs(cut), whole[:, :4], rtol=1e-6, atol=1e-6)
    for name, weight in cut.unet.state_dict().items():
        own = learned.unet.state_dict()[name]
        assert torch.equal(weight, own[:4] if name.startswith("conv_out.") else own), name


def test_prediction_only_is_for_a_while(learned: Components) -> None:
    whole = outputs(learned)
    with prediction_only(learned):
        assert torch.equal(outputs(learned), whole[:, :4])
        assert learned.unet.config["out_channels"] == 4
    assert torch.equal(outputs(learned), whole)
    assert learned.unet.config["out_channels"] == 8


def test_objective_is_the_hybrid_loss() -> None:
    schedule = Schedule.from_betas(make_betas("scaled_linear"))
    objective = Objective(
        schedule,
        prediction_type="v_prediction",
        null_text=Conditioning(torch.zeros(1, 3)),
        sample_timesteps=build_timestep_sampler("uniform", SamplingOptions(1000)),
        learned_variance=True,
    )
    z0, eps, output = torch.randn(3, 5, 4, 2, 2).unbind(0)
    output = torch.cat([output, 0.1 * eps], 1).requires_grad_()
    batch = {
        "z0": z0,
        "eps": eps,
        "u": torch.linspace(0, 0.99, 5, dtype=torch.float64),
        "stratum": torch.arange(5),
        "prompt_embeds": torch.zeros(5, 3),
        "dropped": torch.zeros(5, dtype=torch.bool),
    }
    t = uniform_timesteps(batch["u"], 1000)
    zt = q_sample(schedule, z0, t, eps)
    losses = objective.losses(lambda *_: output, batch, count=5)
    expected = hybrid_loss(schedule, output, z0, zt, t, eps=eps, prediction_type="v_prediction")
    torch.testing.assert_close(losses.loss, expected)


def test_run_learns_its_variance_and_measures_its_prediction(run: Path) -> None:
    unet = load_components(run / "pipeline_learned_variance").unet
    assert float(unet.conv_out.weight[4:].detach().abs().max()) > 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["heldout_loss"] for row in rows if "heldout_loss" in row][-1] < 3
    assert list((run / "samples").glob("*.png"))


def test_stock_diffusers_samples_both_exports_and_the_cut_one_is_the_mean(run: Path) -> None:
    whole = StableDiffusionPipeline.from_pretrained(run / "pipeline_learned_variance")
    cut = StableDiffusionPipeline.from_pretrained(run / "pipeline")
    assert isinstance(whole.scheduler, DDPMScheduler)
    assert whole.scheduler.config.variance_type == "learned_range"
    assert not whole.scheduler.config.clip_sample
    assert isinstance(cut.scheduler, DDIMScheduler)
    channels = cut.unet.config.out_channels
    assert whole.unet.config.out_channels == 2 * channels
    zt = torch.randn(2, channels, 8, 8)
    text = torch.randn(2, 16, cut.unet.config.cross_attention_dim)
    with torch.no_grad():
        both, mean = (p.unet(zt, torch.tensor([5, 900]), text).sample for p in (whole, cut))
    torch.testing.assert_close(mean, both[:, :channels], rtol=1e-6, atol=1e-6)
    assert float(both[:, channels:].abs().max()) > 0
    for stock in (whole, cut):
        stock.set_progress_bar_config(disable=True)
        image = stock("a red circle", num_inference_steps=2, output_type="np").images
        assert image.std() > 0


def test_ours_draws_what_stock_draws_from_the_learned_variance(run: Path) -> None:
    folder = run / "pipeline_learned_variance"
    call = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "np"}
    images = []
    for pipe in (
        StableDiffusionPipeline.from_pretrained(folder),
        LatentDiffPipeline.from_pretrained(folder),
    ):
        pipe.set_progress_bar_config(disable=True)
        images.append(
            pipe("a red circle", generator=torch.Generator().manual_seed(0), **call).images
        )
    assert abs(images[0] - images[1]).max() <= 1 / 255


def test_fine_tuning_goes_on_with_the_variance_or_refuses_to_lose_it(
    run: Path, world: Path
) -> None:
    config = make_config(world, world / "more", model__vae="")
    model = dataclasses.replace(
        config.model, pretrained=str(run / "pipeline_learned_variance"), text_encoder=""
    )
    config = dataclasses.replace(config, model=model)
    with pytest.raises(ValueError, match=r"diffusion\.learned_variance=true"):
        pretrained_components(config)
    chain = dataclasses.replace(config.diffusion, learned_variance=True)
    again = pretrained_components(dataclasses.replace(config, diffusion=chain))
    assert isinstance(again.scheduler, DDPMScheduler)
    cut = for_any_scheduler(without_variance(again))
    assert isinstance(cut.scheduler, DDIMScheduler)
    assert for_ancestral_sampling(cut).scheduler.config.variance_type == "learned_range"


def test_new_model_starts_from_the_same_prediction_with_and_without(world: Path) -> None:
    unets = []
    for learned in (False, True):
        config = make_config(world, world / "new", diffusion__learned_variance=learned)
        components = new_components(
            config,
            load_vae(world / "vae"),
            captions=["a red circle"],
            tokenizer_dir=world / "words",
        )
        unets.append(components.unet)
    plain, learning = unets
    weights = learning.state_dict()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weights[name][: len(weight)], weight), name
