"""A stage of distillation: its targets by hand and by diffusers, its run, and what it exports."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, StableDiffusionPipeline
from fakes_faults import assert_same_state, start_ranks
from fakes_finetune import QUICK, generate, open_ours
from fakes_training import make_config, make_world, read_metrics
from test_finetune import stopping_after
from torch import Tensor

from latentdiff.config.text_to_image import Config
from latentdiff.diffusion.distillation import CLEAN, ddim_step, trailing_timesteps
from latentdiff.diffusion.schedules import Schedule
from latentdiff.models.build import make_ddpm_scheduler
from latentdiff.models.components import load_components
from latentdiff.models.conditioning import Conditioning
from latentdiff.models.unet.guidance_embedding import PROJECTION, guidance_features
from latentdiff.pipeline.files.model_info import default_steps, read_model_info
from latentdiff.pipeline.schedulers import distilled_scheduler
from latentdiff.training.distill import consistency, objective
from latentdiff.training.distributed import start_accelerator
from latentdiff.training.optim.ema import Ema
from latentdiff.training.text_to_image.setup import Run, setup
from latentdiff.training.text_to_image.train_t2i import train

ZERO_SNR = {"diffusion__prediction_type": "v_prediction", "diffusion__zero_terminal_snr": "true"}
GUIDED = {"distill__method": "guided", "distill__num_steps": 8}
HALVED = {"distill__method": "progressive", "distill__num_steps": 4}


def distilling(world: Path, teacher: Path, run: Path, **overrides: Any) -> Config:
    plain = {"model__vae": "", "model__pretrained": teacher, "diffusion__caption_dropout": 0}
    return make_config(world, run, **(QUICK | plain | {"preview__num_steps": 2} | overrides))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder; base/pipeline, a teacher of zero terminal SNR; guided/, its first student."""
    world = make_world(tmp_path_factory.mktemp("world"))
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {"train__max_steps": 2, "preview__num_nearest": 0, "model__unet__dropout": 0}
    assert train(make_config(world, world / "base", **(settings | ZERO_SNR))) == 0
    config = distilling(world, world / "base" / "pipeline", world / "guided", **GUIDED)
    assert train(config) == 0
    return world


def set_up(world: Path, run: Path, **overrides: Any) -> tuple[Run, dict[str, Tensor]]:
    """Return a stage before its first step, and its first batch."""
    name = "base" if overrides["distill__method"] == "guided" else "guided"
    config = distilling(world, world / name / "pipeline", run, **overrides)
    accelerator = start_accelerator(config)
    run.mkdir()
    stage = setup(config, run, accelerator)
    batches = stage.train_data.batches(
        stage.layout, first_step=0, last_step=1, accelerator=accelerator, seed=config.train.seed
    )
    return stage, next(iter(batches))


def predict(unet: Any, zt: Tensor, t: Tensor, text: Tensor, scale: Tensor | None = None) -> Tensor:
    features = None if scale is None else guidance_features(unet, scale, num=len(zt))
    with torch.no_grad():
        return unet(zt, t, text, timestep_cond=features).sample


def noised(scheduler: DDIMScheduler, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    signal = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    return signal.sqrt() * z0 + (1 - signal).sqrt() * eps


def steps_of(scheduler: DDIMScheduler, num: int) -> Tensor:
    scheduler.set_timesteps(num)
    return scheduler.timesteps


def batch_steps(batch: dict[str, Tensor], num: int) -> Tensor:
    return (batch["u"] * num).long()


def test_guided_loss_is_the_error_from_the_guided_prediction_of_the_teacher(
    world: Path, tmp_path: Path
) -> None:
    stage, batch = set_up(world, tmp_path / "run", **GUIDED, distill__max_guidance=5)
    teacher = load_components(world / "base" / "pipeline").unet.eval()
    scheduler = stage.components.scheduler
    t = steps_of(scheduler, 8)[batch_steps(batch, 8)]
    zt = noised(scheduler, batch["z0"], batch["eps"], t)
    scale = (1 + 4 * batch["guidance"]).view(-1, 1, 1, 1)
    text = batch["prompt_embeds"]
    null = stage.train_data.null_text.prompt_embeds.expand_as(text)
    cond, uncond = predict(teacher, zt, t, text), predict(teacher, zt, t, null)
    expected = (cond - (uncond + scale * (cond - uncond))).square().flatten(1).mean(1)
    found = stage.train_step.objective.losses(stage.train_step.model.eval(), batch, count=4)
    assert torch.equal(found.t, t)
    assert batch["guidance"].unique().numel() == 4
    assert expected.min() > 0
    torch.testing.assert_close(found.loss.detach(), expected, rtol=1e-3, atol=1e-9)


def test_inverse_square_weighs_each_loss_by_its_guidance_scale(world: Path, tmp_path: Path) -> None:
    found = []
    for weighting in ("none", "inverse_square"):
        weighed = {"distill__guidance_weighting": weighting}
        stage, batch = set_up(world, tmp_path / weighting, **GUIDED, **weighed)
        step = stage.train_step
        found.append(step.objective.losses(step.model.eval(), batch, count=4).loss.detach())
    scale = 1 + 7 * batch["guidance"]
    torch.testing.assert_close(found[1], found[0] * 8 / scale**2)


def test_the_guidance_embedding_has_a_learning_rate_of_its_own(world: Path, tmp_path: Path) -> None:
    stage, batch = set_up(world, tmp_path / "run", **GUIDED, distill__guidance_lr_factor=10)
    step = stage.train_step
    step.step(iter([batch]), step=1, count=4, accumulation=1)
    *others, own = sorted(step.optimizer.param_groups, key=lambda group: group["lr"])
    assert own["params"] == [step.parameters[f"unet.{PROJECTION}"]]
    assert {group["lr"] for group in others} == {step.lr_schedule.at(1)}
    assert own["lr"] == pytest.approx(10 * step.lr_schedule.at(1))


def test_halved_target_is_one_step_of_diffusers_for_two_of_the_teacher(
    world: Path, tmp_path: Path
) -> None:
    stage, batch = set_up(world, tmp_path / "run", **HALVED)
    scheduler, objective = stage.components.scheduler, stage.train_step.objective
    teacher = load_components(world / "guided" / "pipeline").unet.eval()
    number, scale = torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 2.0, 5.0, 8.0])
    t, text = steps_of(scheduler, 4)[number], batch["prompt_embeds"]
    zt = noised(scheduler, batch["z0"], batch["eps"], t)
    target = objective.target(zt, number, Conditioning(text), scale)

    def step(at: Tensor, output: Tensor, z: Tensor) -> Tensor:
        pairs = zip(output, at.tolist(), z, strict=True)
        return torch.stack([scheduler.step(*one).prev_sample for one in pairs])

    once, fine, z = step(t, target, zt), steps_of(scheduler, 8), zt
    for k in range(2):
        at = fine[2 * number + k]
        z = step(at, predict(teacher, z, at, text, scale), z)
    torch.testing.assert_close(once, z, rtol=1e-3, atol=1e-4)


def test_student_begins_as_its_teacher_and_alone_is_trained(world: Path, tmp_path: Path) -> None:
    stage, _ = set_up(world, tmp_path / "run", **HALVED)
    assert stage.teacher is not None
    before = stage.teacher.unet.state_dict()
    for name, tensor in stage.components.unet.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.data_ptr() != before[name].data_ptr()
    assert not any(p.requires_grad for p in stage.teacher.unet.parameters())
    trained = stage.train_step.parameters
    assert all(name.startswith("unet.") for name in trained)
    assert "unet.time_embedding.cond_proj.weight" in trained


def test_draw_of_the_guidance_changes_no_other(world: Path, tmp_path: Path) -> None:
    stage, batch = set_up(world, tmp_path / "run", **GUIDED)
    plain = distilling(world, world / "base" / "pipeline", tmp_path / "plain")
    (tmp_path / "plain").mkdir()
    other = setup(plain, tmp_path / "plain", stage.accelerator)
    first = next(iter(other.train_data.batches(
        other.layout, first_step=0, last_step=1, accelerator=stage.accelerator, seed=0
    )))  # fmt: skip
    assert "guidance" not in first
    assert all(torch.equal(first[name], batch[name]) for name in first)


@pytest.mark.parametrize(
    "settings",
    [{"train__micro_batch_size": 1}, {"data__num_workers": 2, "train__micro_batch_size": 2}],
    ids=["accumulated", "workers"],
)
def test_losses_of_a_stage_are_equal_on_every_layout(
    world: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = distilling(world, world / "base" / "pipeline", tmp_path / "run", **GUIDED, **settings)
    assert train(config) == 0
    ours, whole = read_metrics(tmp_path / "run"), read_metrics(world / "guided")
    assert len(whole) == 4
    assert ours == pytest.approx(whole, rel=1e-4, abs=1e-8)


@pytest.mark.slow
def test_two_processes_lose_what_one_does(world: Path, tmp_path: Path) -> None:
    teacher = {"model__vae": "", "model__pretrained": world / "base" / "pipeline"}
    settings = QUICK | teacher | GUIDED | {"diffusion__caption_dropout": 0, "preview__num_steps": 2}
    child = start_ranks(world, tmp_path / "run", num=2, **settings)
    assert child.wait() == 0, child.output()
    assert "(2 processes x 2 x 1 accumulated)" in child.output()
    ours, whole = read_metrics(tmp_path / "run"), read_metrics(world / "guided")
    assert ours == pytest.approx(whole, rel=1e-4, abs=1e-8)


def test_stopped_stage_continues_bit_for_bit(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = HALVED | {"train__checkpoint_every_steps": 1, "train__ema": "true"}
    often |= {"distill__guidance_lr_factor": 10, "distill__guidance_weighting": "inverse_square"}
    teacher, whole, pieces = world / "guided" / "pipeline", tmp_path / "whole", tmp_path / "pieces"
    assert train(distilling(world, teacher, whole, **often)) == 0
    with monkeypatch.context() as patch:
        stopping_after(patch, 2)
        train(distilling(world, teacher, pieces, **often))
    assert not (pieces / "pipeline").exists()
    assert train(distilling(world, teacher, pieces, **often)) == 0
    assert_same_state(whole, pieces, step=4)


def test_resume_with_another_teacher_is_refused(world: Path, tmp_path: Path) -> None:
    import shutil

    teacher = tmp_path / "teacher"
    shutil.copytree(world / "base" / "pipeline", teacher)
    run = tmp_path / "run"
    assert train(distilling(world, teacher, run, **GUIDED)) == 0
    unet = load_components(teacher).unet
    with torch.no_grad():
        unet.conv_out.bias += 1
    unet.save_pretrained(teacher / "unet")
    with pytest.raises(ValueError, match="trained on other weights than"):
        train(distilling(world, teacher, run, **GUIDED, train__max_steps=5))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"diffusion__caption_dropout": 0.1}, "set diffusion.caption_dropout=0.0"),
        ({"finetune__method": "lora"}, "set finetune.method='full'"),
        ({"diffusion__timestep_sampling": "loss_aware"}, "loss_aware has no form"),
        ({"distill__max_guidance": 2, "distill__min_guidance": 3}, r"is below distill\.min"),
        ({"model__pretrained": "", "model__vae": "x"}, "set model.pretrained"),
        (
            {
                "distill__guidance_lr_factor": 10,
                "train__optimizer": "prodigy",
                "train__learning_rate": 1,
            },
            "set distill.guidance_lr_factor=1",
        ),
        ({"distill__method": "none"}, "distill.num_steps=8 has no effect"),
    ],
)
def test_settings_that_exclude_distillation_are_named(
    world: Path, tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        distilling(world, world / "base" / "pipeline", tmp_path, **(GUIDED | overrides))


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        ("guided", GUIDED, "is distilled already"),
        ("guided", {}, "plain training knows no scale"),
        ("base", HALVED, "expected the student"),
    ],
)
def test_teacher_of_the_wrong_kind_is_refused_before_heavy_work(
    world: Path, tmp_path: Path, teacher: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(distilling(world, world / teacher / "pipeline", tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_stock_pipeline_opens_the_student_and_makes_our_image(world: Path) -> None:
    folder = world / "guided" / "pipeline"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert settings["timestep_spacing"] == "trailing"
    assert settings["rescale_betas_zero_snr"]
    assert settings["set_alpha_to_one"]
    stock = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    for scale in (1.5, 4.0):
        theirs = generate(stock, guidance_scale=scale, num_inference_steps=4)
        ours = generate(open_ours(folder), guidance_scale=scale, num_inference_steps=4)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1 / 255)
    info = read_model_info(folder)
    assert default_steps(info, 30) == 8
    assert "num_inference_steps=8" in (folder / "README.md").read_text()


def test_a_student_of_an_epsilon_teacher_keeps_its_betas() -> None:
    trained = make_ddpm_scheduler()
    scheduler = distilled_scheduler(trained)
    assert scheduler.config["prediction_type"] == "epsilon"
    assert torch.equal(scheduler.betas, trained.betas)
    assert not scheduler.config["rescale_betas_zero_snr"]
    for num in (1, 2, 4, 8, 16, 32):
        assert torch.equal(steps_of(scheduler, num), trailing_timesteps(num, 1000))


def test_two_steps_of_a_student_that_fits_its_targets_are_four_of_its_teacher(
    world: Path, tmp_path: Path
) -> None:
    stage, batch = set_up(
        world, tmp_path / "run", distill__method="progressive", distill__num_steps=2
    )
    objective, model = stage.train_step.objective, stage.train_step.model
    text, conditioning = batch["prompt_embeds"], Conditioning.of(batch)
    assert stage.teacher is not None
    scale, path = torch.full((4,), 3.0), trailing_timesteps(4, 1000)
    whole = [batch["eps"]]  # the latents before each of the teacher's steps, and at the end
    for k, t in enumerate(path):
        at, after = t.expand(4), (path[k + 1] if k < 3 else torch.tensor(CLEAN)).expand(4)
        output = predict(stage.teacher.unet, whole[-1], at, text, scale)
        whole.append(step_to(objective.schedule, output, whole[-1], at, after))
    inputs = whole[0], whole[2]
    wanted = [
        objective.target(z, torch.full((4,), k), conditioning, scale) for k, z in enumerate(inputs)
    ]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def error() -> float:
        z = whole[0]
        for k, ends in enumerate((path[2], torch.tensor(CLEAN))):
            at = path[2 * k].expand(4)
            output = predict(model.unet, z, at, text, scale)
            z = step_to(objective.schedule, output, z, at, ends.expand(4))
        return (z - whole[-1]).square().mean().item()

    before = error()
    for _ in range(40):
        outputs = [
            model(z, path[2 * k].expand(4), conditioning, scale) for k, z in enumerate(inputs)
        ]
        loss = sum((o - w).square().mean() for o, w in zip(outputs, wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert error() < 0.1 * before


def step_to(schedule: Schedule, output: Tensor, z: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    return ddim_step(schedule, output, z, t, t_next, prediction_type="v_prediction")


def test_teacher_of_an_lcm_lora_shares_its_weights_once_cast_and_laid_out(
    world: Path, tmp_path: Path
) -> None:
    modes = {
        **{"train__ema": "true", "train__precision": "bf16", "train__frozen_dtype": "bf16"},
        **{"train__channels_last": True, "finetune__method": "lora", "finetune__lora_rank": 2},
    }
    config = distilling(
        *(world, world / "base" / "pipeline", tmp_path / "run"),
        **(modes | {"distill__method": "lcm_lora", "distill__num_steps": 2}),
    )
    (tmp_path / "run").mkdir()
    stage = setup(config, tmp_path / "run", start_accelerator(config))
    assert stage.teacher is not None
    own = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in stage.components.unet.named_parameters()
    }
    for name, parameter in stage.teacher.unet.named_parameters():
        assert parameter.data_ptr() == own[name].data_ptr(), name
        assert parameter.dtype == torch.bfloat16
        assert not parameter.requires_grad


def test_target_of_an_lcm_lora_has_the_average_of_the_train_step(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"distill__method": "lcm_lora", "distill__num_steps": 2, "finetune__method": "lora"}
    ema = {"train__ema": "true"}
    config = distilling(world, world / "base" / "pipeline", tmp_path / "run", **(lora | ema))
    (tmp_path / "run").mkdir()
    step, asked = setup(config, tmp_path / "run", start_accelerator(config)).train_step, []
    monkeypatch.setattr(Ema, "swap_weights", lambda _, model: asked.append(model) or nullcontext())
    with step.objective.averaged():  # type: ignore[attr-defined]
        pass
    assert asked == [step.model]


@pytest.mark.parametrize("module", [consistency, objective])
def test_losses_of_distillation_import_no_run(module: Any) -> None:
    """Text-to-image training imports them, and they would close a circle."""
    assert "training.text_to_image" not in Path(module.__file__).read_text("utf-8")
