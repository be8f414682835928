"""The two demos, with models of a few thousand parameters and a handful of steps."""

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes_pipeline import tiny_pipeline
from fakes_scripts import run_script
from PIL import Image

from latentdiff.cli.demo import _distance
from latentdiff.config.io import load_config, parse_arguments
from latentdiff.config.text_to_image import Config
from latentdiff.data.folder.folder import read_folder
from latentdiff.data.shapes import (
    BACKGROUNDS,
    COLOURS,
    FACE_KINDS,
    KINDS,
    SIZES,
    Scene,
    heldout_pairs,
    in_style,
    render,
    split_scenes,
    write_shapes,
)
from latentdiff.evaluation.report.prompt_following import scene_of
from latentdiff.training import distributed as launching
from latentdiff.training.text_to_image.train_t2i import train

SMALL = (
    *("--data.resolution=32", "--train.max_steps=2", "--train.batch_size=4", "--train.ema=false"),
    *("--train.mixed_precision=fp32", "--eval.every_steps=0", "--eval.num_heldout=8"),
)


def run(script: str, arguments: Sequence[str]) -> Any:
    """Run a script in this process; return its exit status."""
    return run_script(script, *arguments)


def test_demo_fine_tunes_and_shows_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "base")
    out = tmp_path / "demo"

    def here(command: str, arguments: Sequence[str]) -> int:
        assert command == "train"
        return train(parse_arguments(Config, arguments))

    monkeypatch.setattr(launching, "launch", here)
    wanted = ["--out", str(out), "--num_train", "20", *SMALL]
    assert run("demo.py", [*wanted, "--model", str(tmp_path / "base")]) == 0
    said = capsys.readouterr().out
    for name in ("before.png", "sheet.png", "model/pipeline"):
        assert (out / name).exists()
        assert str(out / name) in said
    assert Image.open(out / "sheet.png").width > 8 * 128
    assert re.search(r"by \d+ of 255 gray levels .* 4 unrelated prompts by \d+\n", said)
    folder = read_folder(out / "smiling")
    smiling = [record.captions[0].startswith("a smiling large") for record in folder]
    assert any(smiling)
    assert not all(smiling)
    config = load_config(out / "model" / "config.yaml")
    assert (config.model.pretrained, config.train.max_steps) == (str(tmp_path / "base"), 2)
    assert run("demo.py", [*wanted, "--model", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_drift_is_the_mean_difference_in_gray_levels() -> None:
    black, gray, white = (Image.new("RGB", (4, 4), (level,) * 3) for level in (0, 100, 255))
    assert _distance([black, white], [gray, white]) == 50
    assert _distance([gray], [gray]) == 0


def test_demo_from_scratch_trains_with_its_config_and_hands_on_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[str]] = []

    def refuse(command: str, arguments: Sequence[str]) -> int:
        asked.append(arguments)
        return 3

    monkeypatch.setattr(launching, "launch", refuse)
    monkeypatch.chdir(tmp_path)
    write_shapes("demo-scratch-run/shapes", num_train=3000, num_test=100)
    assert run("demo_scratch.py", []) == 3
    assert asked == [["--config", "demo_scratch"]]
    config = load_config("demo_scratch")
    assert Path(config.data.root) == Path("demo-scratch-run/shapes")
    assert Path(config.output_dir) == Path("demo-scratch-run/model")


@pytest.mark.parametrize(
    ("num_cores", "has_gpu", "expected"), [(2, 0, 2), (8, 0, 2), (1, 0, 1), (8, 1, 1)]
)
def test_launch_shares_the_cores(
    num_cores: int, has_gpu: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []

    def note(command: list[str], *, env: dict[str, str]) -> Any:
        calls.append((command, env))
        return SimpleNamespace(wait=lambda: 7)

    monkeypatch.setattr(subprocess, "Popen", note)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: bool(has_gpu))
    assert launching.launch("train", ["--seed=1"]) == 7
    command, env = calls[0]
    assert command[command.index("--nproc_per_node") + 1] == str(expected)
    assert command[-4:] == ["--module", "latentdiff", "train", "--seed=1"]
    assert env["OMP_NUM_THREADS"] == str(num_cores // expected)


@pytest.mark.parametrize(
    ("sent", "code", "is_passed_on"), [(signal.SIGINT, 130, False), (signal.SIGTERM, 143, True)]
)
def test_launch_ends_with_its_processes_after_a_signal(
    sent: signal.Signals, code: int, is_passed_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    def wait() -> int:
        os.kill(os.getpid(), sent)
        return 1

    process = SimpleNamespace(wait=wait, terminate=lambda: ended.append("terminated"))
    monkeypatch.setattr(subprocess, "Popen", lambda command, env: process)
    before = signal.getsignal(sent)
    assert launching.launch("train", []) == code
    assert bool(ended) == is_passed_on
    assert signal.getsignal(sent) == before


def test_launch_returns_the_exit_code_of_its_processes(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert launching.launch("train", ["--train.max_step=5"]) == 2
    err = capfd.readouterr().err
    assert "did you mean train.max_steps?" in err
    assert "ChildFailedError" not in err


def test_demo_refuses_a_bad_setting_before_it_makes_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("demo.py", ["--train.max_step=5"]) == 2
    assert "did you mean train.max_steps?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", FACE_KINDS)
def test_face_is_plain_on_every_colour_and_stays_where_it_belongs(kind: str) -> None:
    for colour in COLOURS:
        for background in BACKGROUNDS:
            plain = Scene(kind, colour, "large", background)
            [smiling] = in_style([plain], "smiling")
            assert (
                smiling.caption == f"a smiling large {colour} {kind} on a {background} background"
            )
            images = [
                np.asarray(render(one, np.random.default_rng(3)), np.int64)
                for one in (plain, smiling)
            ]
            changed = np.abs(images[0] - images[1]).sum(2) > 30
            rows, columns = np.nonzero(changed)
            assert changed.sum() > 100
            assert max(np.ptp(rows), np.ptp(columns)) < 1.05 * SIZES["large"] * 64
            face = images[1][rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert face.sum(2).min() < 100
            assert face.sum(2).max() > 700


def test_smiling_world_holds_out_the_same_combinations_and_leaves_the_plain_one_alone(
    tmp_path: Path,
) -> None:
    root = write_shapes(tmp_path / "a", num_train=9, num_test=3, style="smiling")
    assert write_shapes(tmp_path / "a", num_train=9, num_test=3, style="smiling") == root
    with pytest.raises(FileExistsError):
        write_shapes(tmp_path / "a", num_train=9, num_test=3)
    folder = read_folder(root)
    seen, unseen = ({one.caption for one in in_style(part, "smiling")} for part in split_scenes())
    assert {record.captions[0] for record in folder.split("train")} <= seen
    assert {record.captions[0] for record in folder.split("test")} <= unseen
    assert not seen & unseen
    assert {kind for kind in KINDS if any(kind in caption for caption in seen)} == set(FACE_KINDS)
    with pytest.raises(ValueError, match="expected one of: smiling"):
        write_shapes(tmp_path / "b", style="sad")
    with pytest.raises(ValueError, match=r"pair_fraction=0\.5, expected 0"):
        write_shapes(tmp_path / "b", style="smiling", pair_fraction=0.5)
    with pytest.raises(ValueError, match="expected 0 without a style"):
        write_shapes(tmp_path / "b", plain_fraction=0.5)
    plain = write_shapes(tmp_path / "c", num_train=2, num_test=1)
    assert (plain / "shapes.json").read_text() == (
        '{"num_train": 2, "num_test": 1, "size_px": 64, "pair_fraction": 0.0, "seed": 0}'
    )
    assert "style" not in (plain / "train" / "metadata.jsonl").read_text()


def test_held_out_pairs_of_coloured_kinds_are_in_no_training_image(tmp_path: Path) -> None:
    root = write_shapes(tmp_path, num_train=300, num_test=40, pair_fraction=1.0)

    def coloured(split: str) -> list[frozenset[tuple[str, str]]]:
        scenes = [scene_of(one.captions[0]) for one in read_folder(root).split(split)]
        assert all(f" {scene.relation} " in scene.caption for scene in scenes)
        return [
            frozenset({(one.kind, one.colour), (str(one.other_kind), str(one.other_colour))})
            for one in scenes
        ]

    assert len(heldout_pairs()) == 67  # a tenth of 36 * 37 / 2
    assert not heldout_pairs() & set(coloured("train"))
    assert heldout_pairs() >= set(coloured("test"))
    assert len(set(coloured("test"))) > 20


def test_singles_are_drawn_as_they_were_before_pairs_had_sizes() -> None:
    image = render(Scene("star", "red", "small", "teal"), np.random.default_rng(3))
    assert np.asarray(image).mean(axis=(0, 1)).round(3).tolist() == [14.323, 104.792, 109.792]
