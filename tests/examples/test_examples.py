"""The examples run as their first lines say, and show what they are there to show."""

import importlib.util
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes_clip import random_clip
from fakes_pipeline import tiny_tokenizer
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    """Import an example, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_ddpm_learns_the_roll() -> None:
    figures = load("ddpm").main(num_steps=2000, num_points=500)
    assert figures["share_of_noise_on_the_roll"] < 0.35
    assert figures["share_of_samples_on_the_roll"] > 0.45


@pytest.mark.slow
def test_flow_bounds_the_entropy_and_corrections_widen_a_short_chain() -> None:
    figures = load("continuous_time").main(num_steps=700, num_points=400)
    entropy, bound, flow = figures["entropy"], "variational_bound_", "probability_flow_"
    assert entropy < figures[f"{flow}fixed_small"] < figures[f"{bound}fixed_small"]
    assert entropy < figures[f"{flow}fixed_large"]
    assert entropy < figures[f"{bound}fixed_large"] < figures[f"{bound}fixed_small"]
    assert figures["variance_0_corrections"] < figures["variance_1_corrections"]


@pytest.mark.slow
def test_learned_schedule_lowers_the_error_and_zero_snr_keeps_the_brightness() -> None:
    module = load("noise_schedules")
    figures = module.main(num_steps=700, num_points=2000, num_images=200)
    assert figures["standard_error_learned"] < figures["standard_error_straight"]
    assert figures["terminal_snr_zero"] == 0 < figures["terminal_snr_stable_diffusion"]
    assert figures["brightness_std_stable_diffusion"] < 0.7
    assert figures["brightness_std_zero"] == pytest.approx(1, abs=0.2)


def test_clip_guidance_climbs_the_score_and_writes_both_rows(tmp_path: Path) -> None:
    random_clip().save_pretrained(tmp_path / "clip")
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    scores = load("clip_guidance").main(
        str(tmp_path / "clip"), text="a cat", out=tmp_path / "a.png", num_images=2, steps=8
    )
    assert scores["guided"] > scores["unguided"]
    assert Image.open(tmp_path / "a.png").width > 2 * 64


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example_has_help_and_is_run_as_its_docstring_says(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = path.read_text(encoding="utf-8")
    assert f"\npython examples/{path.name}" in text
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert not end.value.code
    assert "usage:" in capsys.readouterr().out
