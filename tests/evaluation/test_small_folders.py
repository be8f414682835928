"""Folders of few images: what can be estimated is written, the rest is named at once."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes_clip import random_clip
from fakes_data import noise_image
from fakes_models import make_components, save_folder
from fakes_pipeline import tiny_tokenizer
from fakes_scripts import run_script
from transformers import CLIPTokenizer

from latentdiff.evaluation import evaluate as evaluation
from latentdiff.evaluation import run as running

pytest.importorskip("matplotlib")
QUICK = ["--device", "cpu", "--steps", 1, "--guidance_scale", 2, "--num_images", 8]
SECTIONS = ("heldout", *running.OF_IMAGES)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tokenizer: CLIPTokenizer) -> Path:
    """model/ and clip/ of a few thousand parameters."""
    root = tmp_path_factory.mktemp("evaluate")
    torch.manual_seed(0)
    save_folder(make_components(tokenizer), root / "model")
    random_clip().save_pretrained(root / "clip")
    tiny_tokenizer().save_pretrained(root / "clip")
    return root


def photographs(folder: Path, num: int, caption: str = "a wall clock (12:{:02})") -> Path:
    folder.mkdir()
    for k in range(num):
        noise_image(k).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(caption.format(k))
    return folder


def with_one_heldout(folder: Path, num: int) -> Path:
    """As the default split of so few images may be: one of them is held out."""
    photographs(folder, num - 1)
    photographs(folder / "test", 1)
    return folder


def evaluate(root: Path, data: Path, out: Path, *options: object) -> int:
    nets = ["--clip", root / "clip", "--features", root / "clip"]
    where = ["--data", data, "--out", out]
    return int(run_script("evaluate.py", root / "model", *where, *QUICK, *nets, *options) or 0)


def metrics(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "metrics.json").read_text()))


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from numbers(one)
    elif isinstance(value, float):
        yield value


@pytest.mark.parametrize("num", [2, 3, 40])
def test_each_section_of_a_small_folder_is_estimated_or_named(
    root: Path, tmp_path: Path, num: int
) -> None:
    data, out = photographs(tmp_path / "data", num), tmp_path / "out"
    assert evaluate(root, data, out, "--split", "all") == 0
    found = metrics(out)
    for name in SECTIONS:
        assert (name in found) != (name in found["left_out"]), name
    assert "heldout" in found
    assert "clip_score" in found
    assert "diversity" in found
    assert ("fidelity" in found) == (num >= 4)
    assert all(abs(x) < float("inf") for x in numbers(found))
    page = (out / "report.html").read_text()
    assert all(why.split("(")[0].strip() in page for why in found["left_out"].values())


@pytest.mark.parametrize("split", [["--split", "all"], []])
def test_one_image_is_refused_before_a_model_is_loaded(
    root: Path,
    tmp_path: Path,
    split: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One image, and forty of which the default split holds out one."""
    monkeypatch.setattr(evaluation, "open_eval_model", None)
    monkeypatch.setattr(evaluation, "load_metric_nets", None)
    make, num = (photographs, 1) if split else (with_one_heldout, 40)
    data = make(tmp_path / "data", num)
    assert evaluate(root, data, tmp_path / "out", *split) == 2
    message = capsys.readouterr().err
    assert "nothing can be estimated" in message
    assert "the data has 1 image, an interval needs two or more" in message
    assert "--split all" in message
    assert not (tmp_path / "out").exists()


def test_what_one_image_allows_is_written(root: Path, tmp_path: Path) -> None:
    data, out = with_one_heldout(tmp_path / "data", 40), tmp_path / "out"
    bound = ["--bound", "--chain", "4", "--image_steps", 0, "--draws", 2, "--pilot", 1]
    sweep = ["--guidance_sweep", "[1,2]", "--sweep_steps", 1, "--sweep_images", 2]
    assert evaluate(root, data, out, *bound, *sweep) == 0
    found = metrics(out)
    assert {"bound", "guidance"} <= found.keys()
    assert set(SECTIONS) <= found["left_out"].keys()
    assert all(name not in found for name in SECTIONS)


def test_one_caption_of_many_images_leaves_the_loss(root: Path, tmp_path: Path) -> None:
    data, out = photographs(tmp_path / "data", 3, "a (red:1.5) shape"), tmp_path / "out"
    assert evaluate(root, data, out, "--split", "all", "--compare", root / "model") == 0
    found = metrics(out)
    assert found["compare"]["heldout"]["verdict"] == "cannot tell"
    assert "1 different caption" in found["left_out"]["clip_score"]


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        ("heldout_loss_section", ["heldout"]),
        ("fidelity_section", ["fidelity"]),
        ("generate", list(running.OF_IMAGES)),
    ],
)
def test_a_section_that_fails_costs_itself_alone(  # noqa: PLR0917  (fixtures)
    root: Path,
    tmp_path: Path,
    broken: str,
    names: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, out = photographs(tmp_path / "data", 5), tmp_path / "out"
    assert evaluate(root, data, out, "--split", "all") == 0
    before = metrics(out)

    def fail(*_: object, **__: object) -> None:
        raise ValueError("it went wrong")

    monkeypatch.setattr(running, broken, fail)
    assert evaluate(root, data, out, "--split", "all") == 2
    assert "it went wrong" in capsys.readouterr().err
    found = metrics(out)
    assert found.keys() == before.keys() - set(names)
    for name in names:
        assert name in found["left_out"]
    assert "it went wrong" in (out / "report.html").read_text()


def test_what_is_done_is_written_when_a_person_stops_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "generate", interrupt)
    data, out = photographs(tmp_path / "data", 5), tmp_path / "out"
    try:
        status = evaluate(root, data, out, "--split", "all")
    except KeyboardInterrupt:
        status = 130
    assert status == 130
    assert "heldout" in metrics(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bound", "--draws", 0], "draws=0"),
        (["--batch_size", 0], "batch_size=0"),
    ],
)
def test_bad_options_and_results_are_named_before_a_model_is_loaded(  # noqa: PLR0917  (fixtures)
    root: Path,
    tmp_path: Path,
    options: list[object],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluation, "open_eval_model", None)
    data, out = photographs(tmp_path / "data", 5), tmp_path / "out"
    assert evaluate(root, data, out, "--split", "all", *options) == 2
    assert message in capsys.readouterr().err
    out.mkdir()
    (out / "metrics.json").write_text("{")
    assert evaluate(root, data, out, "--split", "all") == 2
    assert "metrics.json is not valid JSON" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert evaluate(root, data, tmp_path / "file", "--split", "all") == 2
    assert "is a file" in capsys.readouterr().err
