"""The swiss roll: its entropy, a bound that respects it, and a product of two distributions."""

import json
import math
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes_diffusion import Mixture
from PIL import Image

from latentdiff.config.options import RollOptions
from latentdiff.diffusion.ddpm import Model
from latentdiff.diffusion.schedules import Schedule, make_betas
from latentdiff.evaluation.swiss_roll import (
    Clouds,
    SwissRoll,
    posterior_distance,
    sample_clouds,
    swiss_roll,
)

pytest.importorskip("matplotlib")
SCRIPT = Path(__file__).parents[2] / "scripts" / "swiss_roll.py"


@pytest.fixture(scope="module")
def short() -> tuple[dict[str, Any], Clouds]:
    return swiss_roll(RollOptions(max_steps=1200, num_timesteps=50, num_points=1000))


def test_density_is_one_in_all_and_that_of_the_samples() -> None:
    roll = SwissRoll(noise=0.1)
    points, area = roll.grid()
    p = roll.log_prob(points).exp() * area
    assert float(p.sum()) == pytest.approx(1, abs=1e-6)
    x = roll.sample(20_000, generator=torch.Generator().manual_seed(0)).double()
    for power in (1, 2):
        moment = (p[:, None] * points**power).sum(0)
        spread = (x**power).std(0) / len(x) ** 0.5
        assert bool(((x**power).mean(0) - moment).abs().le(4 * spread).all())


def test_entropy_is_the_mean_log_density_of_samples() -> None:
    roll = SwissRoll()
    x = roll.sample(20_000, generator=torch.Generator().manual_seed(0))
    bits = -roll.log_prob(x) / 2 / math.log(2)
    error = float(bits.std()) / len(bits) ** 0.5
    assert roll.entropy_bits() == pytest.approx(float(bits.mean()), abs=4 * error)


def test_entropy_of_a_roll_of_noise_alone_is_that_of_a_gaussian() -> None:
    point = SwissRoll(noise=0.5, first_angle=0.0, last_angle=1e-6)
    expected = 0.5 * math.log2(2 * math.pi * math.e * 0.25)
    assert point.entropy_bits() == pytest.approx(expected, abs=1e-3)


def test_no_bound_is_below_the_entropy(short: tuple[dict[str, Any], Clouds]) -> None:
    """After a second or two of training the bound lies between the truth and one Gaussian."""
    figures, _ = short
    for name in ("learned_range", "fixed_small", "fixed_large", "flow"):
        bound = figures[name]
        assert bound["above_entropy"] > 4 * bound["above_entropy_se"] > 0, name
    assert figures["learned_range"]["bits_per_dim"] < figures["gaussian"]
    assert figures["learned_range"]["bits_per_dim"] < figures["fixed_small"]["bits_per_dim"]


def test_reverse_chain_ends_on_the_roll(short: tuple[dict[str, Any], Clouds]) -> None:
    _, clouds = short
    roll = SwissRoll()
    assert clouds.times[0] == 0
    assert clouds.times[-1] == 50
    on_roll = roll.log_prob(clouds.reverse[0]).mean()
    assert float(on_roll) > float(roll.log_prob(clouds.reverse[-1]).mean()) + 2
    torch.testing.assert_close(clouds.reverse[-1].std(0), torch.ones(2), rtol=0.15, atol=0)


def exact_denoiser(roll: SwissRoll, schedule: Schedule) -> Model:
    """The roll as Gaussians along its curve: the best v, and the large of the fixed variances."""
    part = torch.linspace(roll.first_angle, roll.last_angle, 150, dtype=torch.float64)
    centres = roll.curve(part)
    world = Mixture(torch.full((150,), 1 / 150), centres, torch.full_like(centres, roll.noise**2))
    v = world.model(schedule, "v_prediction")
    return lambda xt, t: torch.cat([v(xt, t), torch.ones_like(xt)], 1)


def test_product_with_a_second_distribution_is_sampled() -> None:
    """With the best denoiser nothing but the widened score is approximate."""
    roll, schedule = SwissRoll(), Schedule.from_betas(make_betas("cosine", 100))
    options = RollOptions(num_timesteps=100, num_points=1000, known=0.5, tolerance=0.1)
    clouds = sample_clouds(roll, schedule, exact_denoiser(roll, schedule), options)
    guided, unguided = posterior_distance(clouds, roll, options)
    assert guided < 0.2
    assert unguided > 0.4
    assert float(clouds.posterior[:, 0].mean()) == pytest.approx(0.5, abs=0.05)
    assert float(clouds.posterior[:, 0].std()) < 0.2


def test_script_writes_the_figure_and_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--steps", "5", "--num_timesteps", "8", "--num_points", "100"]
    monkeypatch.setattr(sys, "argv", ["swiss_roll.py", "--out", str(tmp_path / "new"), *small])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 0
    assert json.loads((tmp_path / "new" / "swiss_roll.json").read_text())["entropy"] < 1.2
    with Image.open(tmp_path / "new" / "swiss_roll.png") as image:
        assert min(image.size) > 500
    monkeypatch.setattr(sys, "argv", ["swiss_roll.py", "--tolerance", "0"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 2
    assert "tolerance=0" in capsys.readouterr().err
