"""The fidelity-diversity sweep over guidance scales."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from fakes_clip import random_clip
from fakes_models import make_components, save_folder
from fakes_pipeline import tiny_tokenizer
from transformers import CLIPTokenizer

from latentdiff.data.shapes import write_shapes
from latentdiff.evaluation.report.sweeps import pair_distance

pytest.importorskip("matplotlib")
SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate.py"


def test_pair_distance_is_that_of_all_pairs() -> None:
    z0 = torch.randn(3, 4, 2, 5, 5)
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    squared = torch.stack([(z0[:, i] - z0[:, j]).square().flatten(1).mean(1) for i, j in pairs])
    torch.testing.assert_close(pair_distance(z0).float(), squared.mean(0).sqrt())


def test_sweep_writes_a_point_a_scale(
    tmp_path: Path, tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_folder(make_components(tokenizer), tmp_path / "model")
    write_shapes(tmp_path / "data", num_train=1, num_test=3, size_px=32)
    random_clip().save_pretrained(tmp_path / "clip")
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    arguments = [tmp_path / "model", "--data", tmp_path / "data", "--out", tmp_path / "out"]
    arguments += ["--guidance_sweep", "[1,6]", "--sweep_captions", 2, "--sweep_images", 2]
    arguments += ["--sweep_steps", 2, "--clip", tmp_path / "clip", "--device", "cpu"]
    arguments += ["--num_images", 0]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 0
    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())["guidance"]
    assert figures["captions"] == 2
    assert [point["guidance_scale"] for point in figures["points"]] == [1, 6]
    for point in figures["points"]:
        assert point["diversity"]["mean"] > 0
        assert -1 <= point["clip_score"]["mean"] <= 1
        assert point["fidelity"]["se"] >= 0
    assert (tmp_path / "out" / "guidance_sweep.png").is_file()
