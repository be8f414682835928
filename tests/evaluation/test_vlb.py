"""scripts/evaluate.py --bound: figures, plots and images of a folder, and what cannot be done."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fakes_models import make_components, save_folder
from fakes_scripts import run_script
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from latentdiff.config.options import EvalModelOptions
from latentdiff.data.shapes import write_shapes
from latentdiff.diffusion.bound import difference, estimate, evaluate_bound, per_timestep
from latentdiff.evaluation.eval_set import EvalModel, open_eval_model
from latentdiff.evaluation.evaluate import write_metrics
from latentdiff.evaluation.metrics.vlb import (
    LEARNED,
    CaptionBound,
    Chain,
    bound_samples,
    caption_bound,
    pilot_plan,
    timestep_bins,
    unet_model,
)
from latentdiff.evaluation.report.vlb import varied_indices
from latentdiff.models.build import build_unet, make_ddpm_scheduler

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """A tiny model of a chain of 16 steps that has a learned variance."""
    torch.manual_seed(0)
    components = make_components(tokenizer)
    unet = build_unet(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        head_dim=8,
        norm_num_groups=4,
    )
    scheduler = make_ddpm_scheduler(num_timesteps=16, beta_end=0.5, beta_schedule="linear")
    path = tmp_path_factory.mktemp("model") / "sd"
    save_folder(replace(components, unet=unet.eval(), scheduler=scheduler), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_shapes(root, num_train=3, num_test=6, size_px=32)
    return root


@pytest.fixture(scope="module")
def eval_model(model: Path, data: Path) -> EvalModel:
    return open_eval_model(str(model), EvalModelOptions(data=str(data), batch_size=4, device="cpu"))


@pytest.fixture(scope="module")
def bound(eval_model: EvalModel) -> CaptionBound:
    """The full sum, twice."""
    chain = Chain.of(eval_model.components)
    return caption_bound(chain, eval_model.latents, plan=None, repeats=2, batch_size=4, seed=0)


def run(*arguments: object) -> int:
    """Run the script in this process, generating no images; return its exit status."""
    return int(run_script("evaluate.py", *arguments, "--num_images", "0") or 0)


def test_bound_report_holds_figures_plots_and_images(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "eval"
    small = ["--draws", 6, "--pilot", 2, "--image_steps", 4, "--compare_variance", '["3"]']
    assert run(model, "--data", data, "--out", out, "--bound", *small) == 0
    assert str(out / "metrics.json") in capsys.readouterr().out
    figures = json.loads((out / "metrics.json").read_text())["bound"]
    assert figures["num_images"] == 6
    assert figures["variance_type"] == LEARNED
    caption_bits = figures["caption_bits_per_dim"]
    parts = [figures[name]["bits_per_dim"]["mean"] for name in ("unconditional", "conditional")]
    assert caption_bits["mean"] == pytest.approx(parts[0] - parts[1])
    assert caption_bits["interval_95"][0] < caption_bits["mean"] < caption_bits["interval_95"][1]
    dims = math.prod(figures["latent_shape"])
    assert figures["caption_bits_per_image"]["mean"] == pytest.approx(dims * caption_bits["mean"])
    conditional = figures["conditional"]
    terms = sum(conditional[name]["mean"] for name in ("L_T", "sum_L_t", "L_0"))
    assert terms == pytest.approx(conditional["bits_per_dim"]["mean"])
    along = figures["along_the_chain"]
    assert sum(row["conditional"]["mean"] for row in along) == pytest.approx(
        conditional["sum_L_t"]["mean"]
    )
    assert figures["variance"]["3"][LEARNED]["over_learned"]["mean"] == 0
    assert figures["variance"]["3"]["fixed_small"]["over_learned"]["mean"] != 0
    for name in ("bound_terms", "rate_distortion", "progressive", "interpolation"):
        with Image.open(out / f"{name}.png") as image:
            assert min(image.size) > 100


def test_sheets_show_images_of_unlike_captions_where_there_are() -> None:
    captions = ["a", "a", "b", "c", "a", "b", "c"]
    assert varied_indices(captions, 2) == [0, 3]
    assert varied_indices(captions, 3) == [0, 2, 3]
    assert varied_indices(["a"] * 5, 2) == [0, 4]
    assert varied_indices(["a"], 6) == [0]


def test_folder_bound_is_that_of_the_library_on_the_same_draws(
    eval_model: EvalModel, bound: CaptionBound
) -> None:
    chain = Chain.of(eval_model.components)
    first = eval_model.latents.select(range(4))  # of a batch of four
    by_hand = evaluate_bound(
        chain.schedule,
        unet_model(eval_model.components.unet, first.conditioning, num_outputs=8),
        first.z0,
        generator=eval_model.generator(),
        prediction_type="epsilon",
        variance_type=LEARNED,
    )
    torch.testing.assert_close(bound.conditional.total()[:4], by_hand.total())
    assert not torch.equal(bound.unconditional.bits, bound.conditional.bits)
    assert float(difference(bound.unconditional, bound.conditional).abs().max()) < 1


def test_estimate_from_a_few_draws_agrees_with_the_full_sum(
    eval_model: EvalModel, bound: CaptionBound
) -> None:
    chain, full = Chain.of(eval_model.components), estimate(bound.conditional.total())
    latents = eval_model.latents
    plan = pilot_plan(chain, latents, num_draws=4, num_pilot=3, batch_size=4, seed=0)
    assert plan is not None
    samples = bound_samples(
        chain, latents.z0, latents.conditioning, plan=plan, repeats=8, batch_size=4, seed=0
    )
    total = estimate(samples.total())
    apart = (full.se_noise**2 + total.se_noise**2) ** 0.5
    assert abs(total.mean - full.mean) < 4 * apart
    assert pilot_plan(chain, latents, num_draws=15, num_pilot=3, batch_size=4, seed=0) is None


def test_bins_sum_to_the_bound_and_meet_the_profile(bound: CaptionBound) -> None:
    profile = per_timestep(bound.conditional, 16)
    along = timestep_bins(bound, 16, count=6)
    assert [s.first for s in along[1:]] == [s.last + 1 for s in along[:-1]]
    assert (along[0].first, along[-1].last) == (1, 15)
    for one in along:
        part = slice(one.first, one.last + 1)
        assert one.conditional.mean == pytest.approx(float(profile.bits[part].sum()))
        assert one.x0_rmse**2 == pytest.approx(float(profile.x0_rmse[part].square().mean()))
        assert one.rate == pytest.approx(float(profile.rate[part].mean()))
        apart = one.unconditional.mean - one.conditional.mean
        assert one.caption.mean == pytest.approx(apart)
    assert len(timestep_bins(bound, 16, count=100)) == 15


def test_fixed_variance_of_a_learned_model_reads_the_mean_alone(eval_model: EvalModel) -> None:
    text, t = eval_model.latents.conditioning[:2], torch.tensor([3, 14])
    xt = torch.randn(2, 4, 8, 8)
    both: Tensor = unet_model(eval_model.components.unet, text, num_outputs=8)(xt, t)
    mean: Tensor = unet_model(eval_model.components.unet, text, num_outputs=4)(xt, t)
    assert both.shape[1] == 8
    assert torch.equal(mean, both[:, :4])
    assert Chain.of(eval_model.components, variance_type="fixed_large").num_outputs == 4


def test_shorter_chains_give_the_model_its_own_timesteps(eval_model: EvalModel) -> None:
    chain = Chain.of(eval_model.components, steps="5")
    assert chain.schedule.timesteps.tolist() == [0, 4, 8, 11, 15]


def test_images_are_evenly_spaced_over_the_heldout_split(model: Path, data: Path) -> None:
    options = EvalModelOptions(data=str(data), num_heldout=2, device="cpu")
    few = open_eval_model(str(model), options).latents
    every = open_eval_model(str(model), replace(options, num_heldout=99)).latents
    assert len(few) == 2
    assert len(every) == 6
    assert [every.captions[0], every.captions[-1]] == list(few.captions)
    train = open_eval_model(str(model), replace(options, split="train", num_heldout=99)).latents
    assert len(train) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bound", "--draws", 0], "draws=0"),
        (["--bound", "--chain", "nine"], "'nine'"),
        (["--bound", "--chain", "17"], "17"),
        (["--bound", "--variance_type", "small"], "fixed_small"),
        (["--bound", "--num_heldout", 0], "num_heldout=0"),
        (["--bound", "--device", "nonsense"], "nonsense"),
        (["--bound", "--split", "test"], "split"),
        (["--guidance_sweep", "[1]", "--sweep_images", 1], "sweep_images=1"),
        (["--boundd"], "boundd"),
    ],
)
def test_bad_input_is_named_and_status_two(
    model: Path, data: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(model, "--data", data, "--out", data / "never", *arguments) == 2
    assert not (data / "never").exists()
    stderr = capsys.readouterr().err
    assert message in stderr
    assert "Traceback" not in stderr


def test_missing_folder_model_and_split_are_named(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([model, "--data", tmp_path / "none"], "does not exist"),
        ([tmp_path / "none", "--data", data], "none"),
        ([model, "--data", data / "train"], "no image in its heldout split"),
    ):
        assert run(*arguments, "--out", tmp_path / "out", "--bound", "--heldout_fraction", 0) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sections_of_metrics_are_kept_and_broken_ones_refused(tmp_path: Path) -> None:
    write_metrics(tmp_path, {"a": 1, "b": 2})
    path = write_metrics(tmp_path, {"b": 3})
    assert json.loads(path.read_text()) == {"a": 1, "b": 3}
    path.write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json is not valid JSON"):
        write_metrics(tmp_path, {})
